"""Loss, KL, advantages and weights against numbers worked out by hand, and TRL's published formula written out."""

import math

import pytest
import torch

from grpo.advantage import group_advantages, has_signal
from grpo.loss import kl_k3, policy_loss, token_weights


def t(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_loss_by_hand():
    """Ratios 1.5, 0.5, 1.5, 0.5 with advantages +2, +2, -1, -1, clip 0.2 below and 0.3 above."""
    logprobs = t(1.5, 0.5, 1.5, 0.5).log()
    loss, sums = policy_loss(logprobs, torch.zeros(4), t(2, 2, -1, -1), t(1, 10, 100, 1000), 0.2, 0.3)
    # min(3, 1.3·2) = 2.6; min(1, 0.8·2) = 1; min(-1.5, -1.3) = -1.5; min(-0.5, -0.8) = -0.8
    assert loss.item() == pytest.approx(-2.6 - 10 + 150 + 800)
    assert (sums["clip_high_frac"].item(), sums["clip_low_frac"].item()) == (1, 1)


def test_gradient_by_hand():
    """d/dlogp of -ratio·A is -ratio·A where the clip does not bite, 0 where it does, on the right side only."""
    logprobs = t(1.5, 0.5, 1.5, 0.5).log().requires_grad_()
    loss, _ = policy_loss(logprobs, torch.zeros(4), t(2, 2, -1, -1), torch.ones(4), 0.2, 0.3)
    loss.backward()
    torch.testing.assert_close(logprobs.grad, t(0, -1, 1.5, 0))


def test_first_pass_gradient_is_the_policy_gradient():
    logprobs = t(-1, -2).requires_grad_()
    policy_loss(logprobs, logprobs.detach(), t(0.5, -2), t(0.25, 0.25), 0.2, 0.2)[0].backward()
    torch.testing.assert_close(logprobs.grad, t(-0.125, 0.5))


def test_kl_by_hand():
    """ref - logp = ln 2: 2 - ln 2 - 1; = -ln 2: 1/2 + ln 2 - 1; equal: exactly 0."""
    kl = kl_k3(t(-1, -1, -1), t(-1 + math.log(2), -1 - math.log(2), -1))
    torch.testing.assert_close(kl, t(1 - math.log(2), math.log(2) - 0.5, 0))
    logprobs = t(-1, -1).requires_grad_()
    loss, sums = policy_loss(
        logprobs, logprobs.detach(), t(0, 0), t(1, 1), 0.2, 0.2, t(-1 + math.log(2), -1 - math.log(2)), kl_coef=0.5
    )
    loss.backward()
    assert sums["kl"].item() == pytest.approx(0.5)
    torch.testing.assert_close(logprobs.grad, 0.5 * t(1 - 2, 1 - 0.5))  # beta · (1 - exp(ref - logp))


def test_kl_is_an_unbiased_estimate():
    p, q = torch.randn(2, 50, dtype=torch.float64).log_softmax(-1)
    exact = (p.exp() * (p - q)).sum()
    torch.testing.assert_close((p.exp() * kl_k3(p, q)).sum(), exact)


@pytest.mark.parametrize("normaliser", ["token", "sequence", "constant"])
def test_equals_trl_formula(normaliser):
    """TRL 1.x GRPOTrainer.compute_loss, padded and masked as there: loss_type "grpo", "dapo" (bnpo over the whole
    batch) and "dr_grpo", with beta."""
    gen = torch.Generator().manual_seed(0)
    lengths, longest, beta = [3, 5, 1, 4], 5, 0.04
    shape = (len(lengths), longest)
    logp, old, ref = (-torch.rand(shape, generator=gen, dtype=torch.float64) * 2 for _ in range(3))
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    advantages = torch.randn(len(lengths), generator=gen, dtype=torch.float64)

    coef_1 = torch.exp(logp - old)
    coef_2 = torch.clamp(coef_1, 1 - 0.2, 1 + 0.28)
    per_token = -torch.min(coef_1 * advantages[:, None], coef_2 * advantages[:, None])
    per_token = per_token + beta * (torch.exp(ref - logp) - (ref - logp) - 1)
    expected = {
        "sequence": ((per_token * mask).sum(-1) / mask.sum(-1)).mean(),
        "token": (per_token * mask).sum() / mask.sum(),
        "constant": (per_token * mask).sum() / (len(lengths) * longest),
    }[normaliser]

    totals = {"tokens": sum(lengths), "completions": len(lengths)}
    weights = token_weights(lengths, normaliser, totals, max_new_tokens=longest)
    flat_advantages = advantages.repeat_interleave(torch.tensor(lengths))
    loss, _ = policy_loss(logp[mask], old[mask], flat_advantages, weights, 0.2, 0.28, ref[mask], beta)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-7)


@pytest.mark.parametrize("normaliser", ["token", "sequence", "constant"])
def test_micro_batches_add_up(normaliser):
    """The denominator is the step's, so that uneven micro-batches give the whole batch's loss."""
    lengths = [2, 9, 1, 4]
    totals = {"tokens": 16, "completions": 4}
    values = torch.arange(16.0) - 5
    whole = (token_weights(lengths, normaliser, totals, 12) * values).sum()
    first = (token_weights(lengths[:2], normaliser, totals, 12) * values[:11]).sum()
    second = (token_weights(lengths[2:], normaliser, totals, 12) * values[11:]).sum()
    torch.testing.assert_close(first + second, whole)


def test_nothing_is_written_to():
    inputs = [torch.randn(4) for _ in range(6)]
    copies = [x.clone() for x in inputs]
    policy_loss(*inputs[:4], 0.2, 0.2, inputs[4], 0.1, inputs[5], 2.0)
    assert all(torch.equal(a, b) for a, b in zip(inputs, copies))


def test_truncated_importance_sampling():
    """exp(old - sampler) = 4 is capped at 2; 0.5 stays. It multiplies the policy term, not the KL."""
    old = t(0, 0)
    loss, sums = policy_loss(old, old, t(1, 1), t(1, 1), 0.2, 0.2, None, 0.0, t(-math.log(4), math.log(2)), 2.0)
    assert loss.item() == pytest.approx(-2 - 0.5)
    assert sums["sampler_logprob_diff"].item() == pytest.approx(math.log(4) + math.log(2))


def test_advantages_by_hand():
    """Rewards 1, 0, 0, 0: mean 1/4, sample standard deviation 1/2 (the population's would be 0.433)."""
    expected = torch.tensor([0.75, -0.25, -0.25, -0.25]) / (0.5 + 1e-4)
    torch.testing.assert_close(group_advantages([1, 0, 0, 0]), expected)
    torch.testing.assert_close(group_advantages([1, 0, 0, 0], "none"), torch.tensor([0.75, -0.25, -0.25, -0.25]))


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 1 / 3])
def test_equal_rewards_have_no_advantage(reward):
    """0.1 and 1/3 are not exact: rounding in the mean must not be blown up by the division."""
    assert group_advantages([reward] * 7).tolist() == [0.0] * 7


def test_filter_looks_at_accuracy():
    """Completions that are all right, or all wrong, leave nothing to learn."""
    assert not has_signal([1.0, 1.0]) and not has_signal([0.0, 0.0]) and has_signal([0.0, 1.0])
