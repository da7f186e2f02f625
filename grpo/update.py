"""The GRPO update of scored groups: micro-batches, reference log-probabilities, gradient steps, optimizer."""

import math

import torch

from grpo.advantage import has_signal
from grpo.batch import chunked, dummy, pack_groups
from grpo.engine.distributed import clip_grad_norm, reduce_between_nodes, reduce_sum, world_size
from grpo.loss import policy_loss, token_weights


def make_micro_batches(groups, policy, config, prompts_per_step, frozen_vision=False):
    """The `MicroBatch`es of this rank's groups, config.prompts_per_forward prompts each.

    Every forward of a sharded model is collective, so every rank gets the same number of micro-batches: dummies fill up
    if samples were skipped or groups filtered out. prompts_per_step counts the prompts of all ranks.
    """
    batches = [pack_groups(own, policy.spec, frozen_vision) for own in chunked(groups, config.prompts_per_forward)]
    if world_size() > 1:
        forwards = math.ceil(math.ceil(prompts_per_step / world_size()) / config.prompts_per_forward)
        batches += [dummy(frozen_vision) for _ in range(forwards - len(batches))]
    return [batch.to(policy.device) for batch in batches]


def micro_batches(groups, policy, config):
    """The `MicroBatch`es of a GRPO step. The dynamic filter leaves out groups without signal; while the vision tower is
    frozen, reference and policy use the features that sampling computed."""
    kept = [g for g in groups if not config.dynamic_filter or has_signal(g.parts["accuracy"])]
    return make_micro_batches(kept, policy, config, config.prompts_per_step, config.freeze_vision)


@torch.no_grad()
def add_reference(reference, batches, temperature):
    """Adds the log-probabilities of the frozen model to each micro-batch: one prompt pass a group, pixels included."""
    for batch in batches:
        batch.ref_logprobs, _ = reference(batch, temperature, entropy=False)


def update(policy, optimizer, batches, config):
    """μ passes of forward, clipped loss, backward, gradient clip and optimizer step. Returns metrics.

    Metrics are means over the step's tokens in the first pass (clip fractions: in the last), the norm of the gradient,
    and how many updates were skipped. The first pass runs on the weights that sampled, so its log-probabilities are the
    old ones: they need no forward of their own.
    """
    # 1) One token denominator for the whole step, over all micro-batches and ranks
    lengths = [n for batch in batches for n in batch.lengths]
    totals, metrics = reduce_sum({"tokens": sum(lengths), "completions": len(lengths)}), {}
    for epoch in range(config.ppo_epochs):
        # 2) Forward and backward of each micro-batch: gradients add up
        names = ("loss", "entropy", "clip_low_frac", "clip_high_frac", "sampler_logprob_diff")
        sums = dict.fromkeys((*names, "kl") if config.kl_coef else names, 0.0)
        for batch in batches:
            reduce_between_nodes(policy, batch is batches[-1])
            for name, value in backward(policy, batch, totals, config, first=epoch == 0).items():
                sums[name] += value
        # 3) Optimizer step, and means over the step's tokens
        norm = apply_gradients(policy, optimizer, config.grad_clip)
        sums = reduce_sum({name: float(value) for name, value in sums.items()})
        means = {name: value / max(totals["tokens"], 1) for name, value in sums.items()}
        if epoch == 0:
            metrics = means | {"grad_norm": norm, "updates_skipped": 0}
        metrics["clip_low_frac"], metrics["clip_high_frac"] = means["clip_low_frac"], means["clip_high_frac"]
        metrics["updates_skipped"] += not math.isfinite(norm)
    return metrics


def backward(policy, batch, totals, config, first):
    """Adds the gradient of one micro-batch; returns {metric: sum over its tokens}. `first`: its log-probabilities are
    the old ones."""
    logprobs, entropy = policy(batch, config.temperature)
    if not batch.lengths:
        (0 * logprobs.sum()).backward()
        return {}
    if first:
        batch.old_logprobs = logprobs.detach()
    weights = token_weights(batch.lengths, config.loss_normaliser, totals, config.max_new_tokens)
    loss, sums = policy_loss(
        logprobs, batch.old_logprobs, batch.advantages, weights.to(policy.device),
        config.clip_eps_low, config.clip_eps_high, batch.ref_logprobs, config.kl_coef,
        batch.sampler_logprobs, config.tis_cap,
    )  # fmt: skip
    (loss * world_size()).backward()  # FSDP averages gradients over ranks; the loss is a sum
    return {"loss": loss.detach() * totals["tokens"], "entropy": entropy.sum(), **sums}


def apply_gradients(policy, optimizer, grad_clip):
    """Clips the norm of the gradient and steps, unless the norm is not finite. Returns the norm."""
    for parameter in policy.parameters():
        if parameter.requires_grad and parameter.grad is None:  # a tower that saw text alone
            parameter.grad = torch.zeros_like(parameter)
    norm = clip_grad_norm(policy, grad_clip)
    if 0 < norm < math.inf:  # 0: all groups skipped or without signal
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


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
