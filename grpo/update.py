"""Gradient steps: the GRPO update of a scored batch, and the supervised step of a warm-up."""

import math
from dataclasses import dataclass, replace

import torch

from grpo.advantage import has_signal
from grpo.data import batched
from grpo.distributed import clip_gradients, reduce_between_nodes
from grpo.loss import policy_loss, token_weights
from grpo.packing import pack
from grpo.types import Packed, Rollout


def learning_rate(step, steps, peak, schedule, warmup_steps):
    """The rate of `step` (0-based) of `steps`: linear warm-up, then linear or cosine decay towards 0, or constant."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(steps - warmup_steps, 1)
    return peak * {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "constant": 1.0}[schedule]


def set_learning_rate(optimizer, rate):
    for group in optimizer.param_groups:
        group["lr"] = rate


def schedule(optimizer, step, config):
    """Sets and returns the learning rate of a GRPO step."""
    rate = learning_rate(step, config.steps, config.learning_rate, config.lr_schedule, config.lr_warmup_steps)
    set_learning_rate(optimizer, rate)
    return rate


def make_optimizer(policy, config):
    """AdamW over the trained parameters, the fp32 masters. Norms and biases, all that is one row of numbers, are not
    decayed, as in Hugging Face's Trainer."""
    trained = [p for p in policy.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, config.adam_beta2), fused=True)
    start_moments(optimizer)
    return optimizer


def start_moments(optimizer):
    """Gives every parameter its moments at once, all zero, as AdamW itself would at the first gradient: so that what a
    checkpoint holds does not depend on which parameters have had one."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            zeros = {kind: torch.zeros_like(parameter) for kind in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **zeros}


@dataclass
class Chunk:
    """Prompts and completions of one forward and backward; tensors are flat over its N completion tokens."""

    packed: Packed
    lengths: list
    advantages: torch.Tensor | None = None
    sampler_logprobs: torch.Tensor | None = None
    old_logprobs: torch.Tensor | None = None
    ref_logprobs: torch.Tensor | None = None
    features: torch.Tensor | None = None


def make_chunks(prompts, rollouts, config, policy, processes):
    """The `Chunk`s of this process's prompts and scored rollouts, a forward each.

    Groups that config filters out are left out. While the tower is frozen, the vision features that sampling used are
    those of reference and policy too. Every process gets the same number of chunks, for each forward of a
    sharded model is collective: where samples were skipped or left out, placeholders of no weight take their place.
    """
    pairs = zip(prompts, rollouts)
    kept = [(p, group) for p, group in pairs if not config.filter_groups or has_signal(group.parts["accuracy"])]
    made = []
    for batch in batched(kept, config.prompts_per_forward):
        lengths = [n for _, group in batch for n in group.lengths]
        advantages = torch.cat([group.advantages for _, group in batch])
        made.append(
            Chunk(
                pack([p for p, _ in batch], [group.tokens for _, group in batch], policy.spec).to(policy.device),
                lengths,
                advantages.repeat_interleave(torch.tensor(lengths)).to(policy.device),
                torch.cat([row for _, group in batch for row in group.logprobs]).to(policy.device),
                features=torch.cat([group.features for _, group in batch]) if config.freeze_vision else None,
            )
        )
    if processes.world > 1:
        share = math.ceil(config.prompts_per_step / processes.world)
        made += [placeholder(policy, config) for _ in range(math.ceil(share / config.prompts_per_forward) - len(made))]
    return made


def placeholder(policy, config):
    """A chunk of one prompt token and one completion token, of no completion that counts."""
    one = torch.zeros(1, dtype=torch.long)
    text = Packed(torch.zeros(1, 2, dtype=torch.long), torch.zeros(3, 1, 2, dtype=torch.long), one, one, one,
                  [(1, (1,))], None, None, None)  # fmt: skip
    features = torch.zeros(0, device=policy.device) if config.freeze_vision else None
    return Chunk(text.to(policy.device), lengths=[], features=features)


@torch.no_grad()
def add_reference(reference, made, temperature):
    """Log-probabilities of the frozen model for each chunk: one prompt pass a group, pixels included."""
    for chunk in made:
        chunk.ref_logprobs, _ = reference(chunk.packed, temperature, chunk.features, entropy=False)


def count_totals(made, processes):
    """{"tokens", "completions"} of the step over all chunks and processes: the one denominator, computed once."""
    lengths = [n for chunk in made for n in chunk.lengths]
    return processes.sum({"tokens": sum(lengths), "completions": len(lengths)})


def update(policy, optimizer, made, config, processes):
    """μ passes of forward, clipped loss, backward, gradient clip and optimizer step. Returns metrics.

    They are means over the step's tokens, of the first pass but for the clip shares, which are of the last; the norm of
    the gradient; and how many updates were left out.

    The first pass runs on the weights that the old log-probabilities are of, so it yields them: they need no forward.
    """
    totals, metrics = count_totals(made, processes), {}
    for number in range(config.updates_per_batch):
        sums = dict.fromkeys(("loss", "entropy", "clip_low_share", "clip_high_share", "sampler_gap"), 0.0)
        sums |= {"kl": 0.0} if config.kl_coef else {}
        for chunk in made:
            reduce_between_nodes(policy, chunk is made[-1])
            logprobs, entropy = policy(chunk.packed, config.temperature, chunk.features)
            if not chunk.lengths:
                (0 * logprobs.sum()).backward()
                continue
            if number == 0:
                chunk.old_logprobs = logprobs.detach()
            weights = token_weights(chunk.lengths, config.loss_normaliser, totals, config.max_new_tokens)
            loss, parts = policy_loss(
                logprobs, chunk.old_logprobs, chunk.advantages, weights.to(policy.device),
                config.clip_low, config.clip_high, chunk.ref_logprobs, config.kl_coef,
                chunk.sampler_logprobs, config.importance_cap,
            )  # fmt: skip
            (loss * processes.world).backward()  # a sharded gradient is averaged over processes; the loss is a sum
            for name, value in {"loss": loss.detach() * totals["tokens"], "entropy": entropy.sum(), **parts}.items():
                sums[name] += value
        norm = apply_gradients(policy, optimizer, config.grad_clip)
        sums = processes.sum({name: float(value) for name, value in sums.items()})
        means = {name: value / max(totals["tokens"], 1) for name, value in sums.items()}
        if number == 0:
            metrics = means | {"grad_norm": norm, "updates_skipped": 0}
        metrics["clip_low_share"], metrics["clip_high_share"] = means["clip_low_share"], means["clip_high_share"]
        metrics["updates_skipped"] += not math.isfinite(norm)
    return metrics


def apply_gradients(policy, optimizer, grad_clip):
    """Clips the gradient's norm and steps; an update whose norm is not finite is left out. Returns the norm."""
    for parameter in policy.parameters():
        if parameter.requires_grad and parameter.grad is None:  # a tower that saw text alone
            parameter.grad = torch.zeros_like(parameter)
    norm = clip_gradients(policy, grad_clip)
    if 0 < norm < math.inf:  # all groups skipped or without signal: no step, on one process as on several
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def supervised_step(policy, optimizer, prompts, targets, config, processes):
    """One step of maximum likelihood on targets, B lists of (C,) tokens. Returns (loss, [(C,) probabilities of each
    target's tokens]). Every prompt weighs the same, however many targets it has."""
    # A supervised step has no accuracy to filter by, no features, and a number of prompts of its own.
    config = replace(config, filter_groups=False, freeze_vision=False, prompts_per_step=config.sft_prompts_per_step)
    groups = [Rollout(group, [torch.zeros(len(t)) for t in group], [], []) for group in targets]
    for group in groups:
        group.advantages = torch.full((len(group.tokens),), 1.0 / sum(group.lengths))
    made = make_chunks(prompts, groups, config, policy, processes)
    count = max(processes.sum({"prompts": len(prompts)})["prompts"], 1)
    total, probabilities = 0.0, []
    for chunk in made:
        logprobs, _ = policy(chunk.packed, entropy=False)
        loss = -(logprobs * chunk.advantages).sum() / count if chunk.lengths else 0 * logprobs.sum()
        (loss * processes.world).backward()
        total += loss.item()
        probabilities += logprobs.detach().exp().cpu().split(chunk.lengths) if chunk.lengths else []
    apply_gradients(policy, optimizer, config.grad_clip)
    return processes.sum({"loss": total})["loss"], probabilities
