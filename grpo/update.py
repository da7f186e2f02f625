"""The update of a step: micro-batches, reference log-probabilities, advantages, gradient steps."""

import math
import random

import torch
from torch.distributed.tensor import DTensor

from grpo.advantage import BATCH_VALUES, batch_moments, batch_std, group_advantages, has_signal
from grpo.batch import chunked, dummy, pack_groups
from grpo.engine.distributed import clip_grad_norm, gather, gather_data, reduce_between_nodes, reduce_sum, world_size
from grpo.loss import completion_kl, policy_loss, token_weights


def make_micro_batches(groups, policy, prompts_per_forward, frozen_vision=False):
    """The `MicroBatch`es of this rank's groups, prompts_per_forward prompts each.

    Every forward of a sharded model is collective, so every rank gets as many micro-batches as the rank with the most:
    dummies fill up if samples were skipped or groups filtered out.
    """
    batches = [pack_groups(own, policy.spec, frozen_vision) for own in chunked(groups, prompts_per_forward)]
    batches += [dummy(frozen_vision) for _ in range(max(gather(len(batches))) - len(batches))]
    return [batch.to(policy.device) for batch in batches]


def mini_batches(groups, policy, config):
    """The micro-batches of each optimizer step: config.mini_batch_size prompts of all ranks, in the order in which they
    were drawn; 0: all of the step's prompts.

    The dynamic filter leaves out groups without signal. While the vision tower is frozen, reference and policy use the
    features that sampling computed. Prompts drawn as 0 to 5, of which 2 has no signal, are the mini-batches [0 1],
    [3 4], [5] for a size of 2.
    """
    kept = [g for g in groups if not config.dynamic_filter or has_signal(g.parts["accuracy"])]
    parts = [kept]
    if config.mini_batch_size:
        drawn = sorted(slot for slots in gather_data([g.prompt.sample.slot for g in kept]) for slot in slots)
        steps = chunked(drawn, config.mini_batch_size) or [[]]
        parts = [[g for g in kept if g.prompt.sample.slot in slots] for slots in steps]
    return [make_micro_batches(own, policy, config.prompts_per_forward, config.freeze_vision) for own in parts]


@torch.no_grad()
def add_reference(reference, batches, temperature):
    """Adds the log-probabilities of the frozen model to each micro-batch: one prompt pass a group, pixels included."""
    for batch in batches:
        batch.ref_logprobs, _ = reference(batch, temperature, entropy=False)


@torch.no_grad()
def sync_reference(reference, policy, alpha):
    """reference <- alpha · policy + (1 - alpha) · reference (TR-DPO's soft update, arXiv 2404.09656, eq. 5)."""
    local = lambda p: p.to_local() if isinstance(p, DTensor) else p
    for frozen, own in zip(reference.parameters(), policy.parameters(), strict=True):
        local(frozen).lerp_(local(own).to(frozen.dtype), alpha)


@torch.no_grad()
def add_old_logprobs(policy, batches, temperature):
    """Adds the log-probabilities of the weights that sampled, before a gradient step changes them."""
    for batch in batches:
        batch.old_logprobs, _ = policy(batch, temperature, entropy=False)


def add_advantages(batches, config):
    """Adds the advantages of all groups, from their rewards.

    With --kl_in reward, β times the KL of each completion to the reference is first taken from its reward, by the
    log-probabilities of the sampler.
    """
    for batch in batches if config.kl_coef and config.kl_in == "reward" else ():
        if batch.rollouts:
            logprobs = (batch.sampler_logprobs, batch.ref_logprobs, batch.completion)
            kl = iter((config.kl_coef * completion_kl(*logprobs, config.kl_estimator)).tolist())
            for group in batch.rollouts:
                group.rewards = [reward - next(kl) for reward in group.rewards]
    groups, spread = [group for batch in batches for group in batch.rollouts], None
    if config.advantage in BATCH_VALUES:
        spread = batch_std(reduce_sum(batch_moments([g.rewards for g in groups], config.advantage)))
    for group in groups:
        group.advantages = group_advantages(group.rewards, config.advantage, spread)


def update(policy, optimizer, steps, config, seed=0):
    """ppo_epochs passes over the mini-batches `steps` of a rollout, in an order drawn from `seed`, each an optimizer
    step. Returns metrics.

    Metrics are means over the rollout's tokens in the first pass (clip fractions: in the last), the mean norm of the
    gradient in the first pass, and how many updates were skipped. The first optimizer step of a rollout runs on the
    weights that sampled, so its log-probabilities are the old ones: with one mini-batch they need no forward of their
    own.
    """
    if len(steps) > 1:
        add_old_logprobs(policy, [batch for batches in steps for batch in batches], config.temperature)
    metrics, order = {"updates_skipped": 0}, random.Random(seed)
    for epoch in range(config.ppo_epochs):
        norms, sums, tokens = [], {}, 0
        for batches in order.sample(steps, len(steps)) if len(steps) > 1 else steps:
            norm, totals = optimizer_step(policy, optimizer, batches, config)
            norms.append(norm)
            tokens += totals.pop("tokens")
            sums = {name: sums.get(name, 0) + value for name, value in totals.items()}
        # If nothing was trained, its metrics are absent, not 0.
        means = {name: value / tokens for name, value in sums.items()} if tokens else {}
        if epoch == 0:
            metrics |= means | {"grad_norm": sum(norms) / len(norms)}
        metrics |= {name: means[name] for name in ("clip_low_frac", "clip_high_frac") if name in means}
        metrics["updates_skipped"] += sum(not math.isfinite(norm) for norm in norms)
    return metrics


def optimizer_step(policy, optimizer, batches, config):
    """One gradient over all micro-batches and ranks, clipped, and one step of the optimizer.

    Returns (norm of the gradient, {metric: sum over the tokens of all ranks, "tokens": their number}).
    """
    # 1) One denominator for all micro-batches and ranks, computed once
    lengths = [n for batch in batches for n in batch.lengths]
    trained = [own for batch in batches for own in trained_completions(batch, config)]
    tokens = sum(n for n, own in zip(lengths, trained) if own)
    totals = reduce_sum({"tokens": tokens, "completions": len(lengths)})

    # 2) Forward and backward of each micro-batch: gradients add up
    names = ("loss", "entropy", "clip_low_frac", "clip_high_frac", "sampler_logprob_diff")
    sums = dict.fromkeys((*names, "kl") if config.kl_coef else names, 0.0)
    for batch in batches:
        reduce_between_nodes(policy, batch is batches[-1])
        for name, value in backward(policy, batch, totals, config).items():
            sums[name] += value

    # 3) Optimizer step
    norm = apply_gradients(policy, optimizer, config.grad_clip)
    sums = reduce_sum({name: float(value) for name, value in sums.items()})
    return norm, sums | {"tokens": totals["tokens"]}


def trained_completions(batch, config):
    """[whether each completion trains]: with --mask_truncated, one that the length limit truncated does not."""
    return [finished or not config.mask_truncated for group in batch.rollouts for finished in group.finished]


def backward(policy, batch, totals, config):
    """Adds the gradient of one micro-batch; returns {metric: sum over its tokens}."""
    logprobs, entropy = policy(batch, config.temperature, entropy_gradient=config.entropy_coef != 0)
    if not batch.rollouts:
        (0 * logprobs.sum()).backward()
        return {}
    if batch.old_logprobs is None:  # the first update of a rollout
        batch.old_logprobs = logprobs.detach()
    trained = trained_completions(batch, config)
    weights = token_weights(batch.lengths, config.loss_normaliser, totals, config.max_new_tokens, trained)
    kl_coef = config.kl_coef if config.kl_in == "loss" else 0.0
    loss, sums = policy_loss(
        logprobs, batch.old_logprobs, batch.advantages, weights.to(policy.device),
        config.clip_eps_low, config.clip_eps_high, batch.ref_logprobs, kl_coef, batch.sampler_logprobs, config.tis_cap,
        loss=config.loss, completion=batch.completion, dual_clip=config.dual_clip, kl_estimator=config.kl_estimator,
        kl_correction=config.kl_correction, tis_mode=config.tis_mode, entropy=entropy,
        entropy_coef=config.entropy_coef,
    )  # fmt: skip
    (loss * world_size()).backward()  # FSDP averages gradients over ranks; the loss is a sum
    return {"loss": loss.detach() * totals["tokens"], **sums}


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
