"""The GRPO loss on flat completion tokens: pure functions of tensors.

    loss = sum_t w_t · ( -min(r_t A_t, clip(r_t, 1 - low, 1 + high) A_t) + beta · k3_t ),   r_t = exp(logp_t - old_t)
    k3_t = exp(ref_t - logp_t) - (ref_t - logp_t) - 1

DeepSeekMath, arXiv 2402.03300, eq. 3-4; separate low and high clip from DAPO, arXiv 2503.14476; k3 from
http://joschu.net/blog/kl-approx.html. The weights w_t hold the whole normalisation, so that the losses of micro-batches
and ranks add up. TRL 1.16 multiplies k3_t by r_t (`use_bias_correction_kl`, on by default), which changes the gradient
even if r_t is 1; DeepSeekMath and this file do not.
"""

import torch


def token_weights(lengths, normaliser, totals, max_new_tokens):
    """(N,) weight of each token of completions with these lengths.

    totals: {"tokens", "completions"} of the whole step, over all micro-batches and ranks, computed once beforehand.
    "token": 1 / all tokens (DAPO). "sequence": 1 / (own length · all completions) (DeepSeekMath, Open-R1-Video).
    "constant": 1 / (max_new_tokens · all completions) (Dr. GRPO, arXiv 2503.20783).

    lengths [1 2], totals {"tokens": 3, "completions": 2}, max_new_tokens 4:
    "token" [1/3 1/3 1/3], "sequence" [1/2 1/4 1/4], "constant" [1/8 1/8 1/8]
    """
    lengths = torch.as_tensor(lengths)
    per_completion = {
        "token": torch.full(lengths.shape, 1.0 / max(totals["tokens"], 1)),
        "sequence": 1.0 / (lengths.clamp(min=1) * max(totals["completions"], 1)),
        "constant": torch.full(lengths.shape, 1.0 / (max_new_tokens * max(totals["completions"], 1))),
    }[normaliser]
    return per_completion.repeat_interleave(lengths)


def kl_k3(logprobs, ref_logprobs):
    """(N,) unbiased, never negative estimate of KL(policy || reference) for each sampled token."""
    difference = ref_logprobs - logprobs
    return difference.exp() - difference - 1


def policy_loss(
    logprobs, old_logprobs, advantages, weights, clip_eps_low, clip_eps_high,
    ref_logprobs=None, kl_coef=0.0, sampler_logprobs=None, tis_cap=None,
):  # fmt: skip
    """Returns (loss, {metric: sum over tokens}); all inputs are (N,), none is written to.

    With `tis_cap` c the policy term of each token is weighted by min(exp(old - sampler), c): truncated importance
    sampling against a sampler whose arithmetic differs from the scorer's (Yao et al. 2025, "Your efficient RL
    framework secretly brings you off-policy RL training").
    """
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1 - clip_eps_low, 1 + clip_eps_high)
    gain = torch.minimum(ratio * advantages, clipped * advantages)
    if tis_cap is not None:
        gain = gain * (old_logprobs - sampler_logprobs).exp().clamp(max=tis_cap)
    per_token = -gain
    sums = {}
    if ref_logprobs is not None:
        kl = kl_k3(logprobs, ref_logprobs)
        per_token = per_token + kl_coef * kl
        sums["kl"] = kl.detach().sum()
    with torch.no_grad():
        sums["clip_low_frac"] = ((ratio < 1 - clip_eps_low) & (advantages < 0)).float().sum()
        sums["clip_high_frac"] = ((ratio > 1 + clip_eps_high) & (advantages > 0)).float().sum()
        if sampler_logprobs is not None:
            sums["sampler_logprob_diff"] = (old_logprobs - sampler_logprobs).abs().sum()
    return (weights * per_token).sum(), sums
