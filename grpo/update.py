"""Gradient steps: the GRPO update of a scored batch, and the supervised step of a warm-up."""

import math

import torch

from grpo.data import chunks
from grpo.loss import policy_loss, token_weights
from grpo.packing import pack


def learning_rate(step, steps, peak, schedule, warmup_steps):
    """The rate of `step` (0-based) of `steps`: linear warm-up, then linear or cosine decay towards 0, or constant."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(steps - warmup_steps, 1)
    return peak * {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "constant": 1.0}[schedule]


def make_optimizer(policy, config):
    """AdamW over the trained parameters, whose own precision (fp32) is that of the masters."""
    trained = [p for p in policy.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        trained, lr=0.0, betas=(0.9, config.adam_beta2), weight_decay=config.weight_decay, fused=True
    )


class Batch:
    """What an update needs of this process's share of a step, cut into chunks of prompts that are one forward each.

    The number of chunks is the same in every process, for each forward of a sharded model is collective: where samples
    were skipped or filtered out, chunks are empty and a placeholder of weight 0 takes their place.
    """

    def __init__(self, groups, share, config, processes, spec):
        count = math.ceil(math.ceil(share / processes.world) / config.prompts_per_forward)
        self.chunks = chunks(groups, config.prompts_per_forward)
        self.chunks += [[] for _ in range(count - len(self.chunks))] if processes.world > 1 else []
        self.packed = [
            pack([p for p, _ in c], [r.tokens for _, r in c], spec).to(processes.device) if c else None
            for c in self.chunks
        ]
"""
"""
