"""The loss on flat completion tokens: pure functions of tensors, tables by name, no model and no configuration.

    loss = sum_t w_t * ( -gain_t + kl_coef * kl_t - entropy_coef * entropy_t )

N tokens of C completions; `completion` (N,) int64 is the number of each token's completion in the micro-batch, from 0:
lengths [3 2 1] -> [0 0 0 1 1 2]. The weights w_t hold the whole normalisation, so that the losses of micro-batches and
ranks add up. A loss of your own is one function and one line of `LOSSES`. `docs/algorithms.md` has every formula beside
its paper.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

SAPO_TEMPERATURES = 1.0, 1.05  # of positive and of other advantages, as in the paper


def token_weights(
    lengths: Sequence[int], normaliser: str, totals: dict, max_new_tokens: int, trained: Sequence[bool] | None = None
) -> Tensor:
    """(N,) weight of each token of completions with these lengths; 0 if `trained` says that its completion is masked.

    totals: {"tokens", "completions"} of the whole step, over all micro-batches and ranks, computed once beforehand.
    "tokens" counts the tokens that train; "completions" counts masked completions, too (as TRL does).
    "token": 1 / all tokens (DAPO). "sequence": 1 / (own length * all completions) (DeepSeekMath, Open-R1-Video).
    "constant": 1 / (max_new_tokens * all completions) (Dr. GRPO, arXiv 2503.20783).

    lengths [1 2], totals {"tokens": 3, "completions": 2}, max_new_tokens 4:
    "token" [1/3 1/3 1/3], "sequence" [1/2 1/4 1/4], "constant" [1/8 1/8 1/8]
    """
    lengths = torch.as_tensor(lengths)
    per_completion = {
        "token": torch.full(lengths.shape, 1.0 / max(totals["tokens"], 1)),
        "sequence": 1.0 / (lengths.clamp(min=1) * max(totals["completions"], 1)),
        "constant": torch.full(lengths.shape, 1.0 / (max_new_tokens * max(totals["completions"], 1))),
    }[normaliser]
    if trained is not None:
        per_completion = per_completion * torch.as_tensor(trained)
    return per_completion.repeat_interleave(lengths)


def sequence_sum(values: Tensor, completion: Tensor) -> Tensor:
    """(N,) sum over the completion of each token. values [1 3 5], completion [0 0 1] -> [4 4 5]"""
    return values.new_zeros(len(values)).index_add(0, completion, values)[completion]


def sequence_mean(values: Tensor, completion: Tensor) -> Tensor:
    """(N,) mean over the completion of each token. values [1 3 5], completion [0 0 1] -> [2 2 5]"""
    return sequence_sum(values, completion) / sequence_sum(torch.ones_like(values), completion)


# 1) Ratios of the policy to its old self, (N,): (logprobs, old_logprobs, completion) -> ratio


def token_ratio(logprobs: Tensor, old_logprobs: Tensor, completion: Tensor | None) -> Tensor:
    return (logprobs - old_logprobs).exp()


def sequence_ratio(logprobs: Tensor, old_logprobs: Tensor, completion: Tensor) -> Tensor:
    """GSPO: the geometric mean of the token ratios of the completion, the same for each of its tokens."""
    return sequence_mean(logprobs - old_logprobs, completion).exp()


def sequence_token_ratio(logprobs: Tensor, old_logprobs: Tensor, completion: Tensor) -> Tensor:
    """GSPO-token: the value of the sequence ratio, the gradient of the token alone."""
    log_ratio = sequence_mean((logprobs - old_logprobs).detach(), completion)
    return (logprobs - logprobs.detach() + log_ratio).exp()


# 2) Gains, (N,), to be maximised: (ratio, logprobs, advantages, clip_eps_low, clip_eps_high, dual_clip) -> gain.
#    A gain ignores the arguments that it has no use for.


def ppo(ratio: Tensor, logprobs: Tensor, advantages: Tensor, low: float, high: float, dual: float | None) -> Tensor:
    """The clip. dual_clip c > 1 keeps the gain of a negative advantage above c * advantage."""
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
    return gain if dual is None else torch.where(advantages < 0, torch.maximum(gain, dual * advantages), gain)


def cispo(ratio: Tensor, logprobs: Tensor, advantages: Tensor, low: float, high: float, dual: float | None) -> Tensor:
    """The clipped ratio is a constant weight of the log-probability, so that every token keeps a gradient."""
    return ratio.clamp(1 - low, 1 + high).detach() * advantages * logprobs


def sapo(ratio: Tensor, logprobs: Tensor, advantages: Tensor, low: float, high: float, dual: float | None) -> Tensor:
    """A sigmoid in place of the clip; its slope is 1 at ratio 1."""
    temperature = torch.where(advantages > 0, *SAPO_TEMPERATURES)
    return torch.sigmoid(temperature * (ratio - 1)) * 4 / temperature * advantages


LOSSES = {  # --loss: (ratio, gain)
    "ppo": (token_ratio, ppo),
    "gspo": (sequence_ratio, ppo),
    "gspo_token": (sequence_token_ratio, ppo),
    "cispo": (token_ratio, cispo),
    "cispo_sequence": (sequence_ratio, cispo),
    "sapo": (token_ratio, sapo),
    "sapo_sequence": (sequence_ratio, sapo),
}


# 3) KL(policy || reference) of each sampled token, (N,): (logprobs, ref_logprobs) -> kl


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Unbiased; negative for about half of the tokens."""
    return logprobs - ref_logprobs


def kl_k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Biased as a value; in the loss, on-policy, its gradient is that of the KL."""
    return (logprobs - ref_logprobs).square() / 2


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Unbiased and never negative."""
    difference = ref_logprobs - logprobs
    return difference.exp() - difference - 1


KL_ESTIMATORS = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}  # --kl_estimator


def completion_kl(logprobs: Tensor, ref_logprobs: Tensor, completion: Tensor, estimator: str = "k1") -> Tensor:
    """(C,) KL summed over the tokens of each completion. `--kl_in reward` takes kl_coef times it from each reward,
    before the advantages."""
    kl = KL_ESTIMATORS[estimator](logprobs, ref_logprobs)
    return kl.new_zeros(int(completion[-1]) + 1).index_add(0, completion, kl)


def tis_weight(
    old_logprobs: Tensor, sampler_logprobs: Tensor, completion: Tensor | None, cap: float, mode: str = "token_truncate"
) -> Tensor:
    """(N,) importance weight of the scorer against a sampler whose arithmetic differs (Yao et al. 2025, "Your efficient
    RL framework secretly brings you off-policy RL training"). Modes: the ratio of the token, or of the whole
    completion; above the cap it is truncated to the cap, or masked to 0."""
    level, form = mode.split("_")
    difference = old_logprobs - sampler_logprobs
    ratio = (sequence_sum(difference, completion) if level == "sequence" else difference).exp()
    return ratio.clamp(max=cap) if form == "truncate" else ratio.masked_fill(ratio > cap, 0.0)


TIS_MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")  # --tis_mode


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, weights: Tensor,
    clip_eps_low: float, clip_eps_high: float, ref_logprobs: Tensor | None = None, kl_coef: float = 0.0,
    sampler_logprobs: Tensor | None = None, tis_cap: float | None = None, *,
    loss: str = "ppo", completion: Tensor | None = None, dual_clip: float | None = None,
    kl_estimator: str = "k3", kl_correction: bool = False, tis_mode: str = "token_truncate",
    entropy: Tensor | None = None, entropy_coef: float = 0.0,
) -> tuple[Tensor, dict]:  # fmt: skip
    """Returns (loss, {metric: sum over the tokens whose weight is not 0}); all tensors are (N,), none is written to.

    `completion` is needed by sequence ratios and sequence modes alone. kl_correction multiplies the KL by the ratio
    (DeepSeek-V3.2). `entropy` must carry a gradient if entropy_coef is not 0.
    """
    ratio_of, gain_of = LOSSES[loss]
    ratio = ratio_of(logprobs, old_logprobs, completion)
    gain = gain_of(ratio, logprobs, advantages, clip_eps_low, clip_eps_high, dual_clip)
    if tis_cap is not None:
        gain = gain * tis_weight(old_logprobs, sampler_logprobs, completion, tis_cap, tis_mode)
    per_token, logged = -gain, {}
    if ref_logprobs is not None:
        logged["kl"] = kl = KL_ESTIMATORS[kl_estimator](logprobs, ref_logprobs)
        per_token = per_token + kl_coef * (kl * ratio if kl_correction else kl)
    if entropy is not None:
        logged["entropy"] = entropy
    if entropy_coef:
        per_token = per_token - entropy_coef * entropy
    with torch.no_grad():
        logged["clip_low_frac"] = ((ratio < 1 - clip_eps_low) & (advantages < 0)).float()
        logged["clip_high_frac"] = ((ratio > 1 + clip_eps_high) & (advantages > 0)).float()
        if sampler_logprobs is not None:
            logged["sampler_logprob_diff"] = (old_logprobs - sampler_logprobs).abs()
        sums = {name: (values * (weights != 0)).sum() for name, values in logged.items()}
    return (weights * per_token).sum(), sums
