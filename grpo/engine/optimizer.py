"""AdamW on the fp32 masters, and its learning rate by step."""

import math

import torch


def make_optimizer(policy, config):
    """AdamW over the trained parameters, the fp32 masters. Weight decay leaves out norms and biases, all parameters of
    one dimension, as in Hugging Face's Trainer.

    The moments are zeros from the start, as AdamW would make them at the first gradient: what a checkpoint holds then
    does not depend on which parameters have had a gradient.
    """
    trained = [p for p in policy.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, config.adam_beta2), fused=True)
    for p in trained:
        zeros = {moment: torch.zeros_like(p) for moment in ("exp_avg", "exp_avg_sq")}
        optimizer.state[p] = {"step": torch.zeros((), device=p.device), **zeros}
    return optimizer


def learning_rate(step, steps, peak, schedule, warmup_steps):
    """The rate of `step` (0-based) of `steps`: linear warm-up, then linear or cosine decay towards 0, or constant."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(steps - warmup_steps, 1)
    return peak * {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "constant": 1.0}[schedule]


def schedule(optimizer, step, config):
    """Sets and returns the learning rate of a GRPO step."""
    rate = learning_rate(step, config.steps, config.learning_rate, config.lr_schedule, config.lr_warmup_steps)
    set_learning_rate(optimizer, rate)
    return rate


def set_learning_rate(optimizer, rate):
    for group in optimizer.param_groups:
        group["lr"] = rate
