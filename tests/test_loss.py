"""Loss, KL, advantages and weights against numbers worked out by hand; `test_trl.py` compares them with TRL's own."""

import math
import re
from pathlib import Path

import pytest
import torch

from grpo.advantage import batch_moments, batch_std, group_advantages, has_signal
from grpo.loss import KL_ESTIMATORS, LOSSES, completion_kl, kl_k1, kl_k2, kl_k3, policy_loss, tis_weight, token_weights


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


def policy_loss_before(
    logprobs, old_logprobs, advantages, weights, clip_eps_low, clip_eps_high,
    ref_logprobs=None, kl_coef=0.0, sampler_logprobs=None, tis_cap=None,
):  # fmt: skip
    """policy_loss as it was at commit ec5cfe2, before the table of losses, verbatim."""
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


@pytest.mark.parametrize("tis_cap", [None, 1.1])
@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
@pytest.mark.parametrize("with_reference", [False, True])
def test_defaults_are_equal_to_the_bit(with_reference, kl_coef, tis_cap):
    """A run with the default flags trains the weights that it trained before the table of losses, to the bit."""
    for seed in range(5):
        gen = torch.Generator().manual_seed(seed)
        start, old, advantages, ref, sampler = (torch.randn(1001, generator=gen) for _ in range(5))
        weights = torch.rand(1001, generator=gen) / 1001
        results = []
        for function in (policy_loss_before, policy_loss):
            logprobs = start.clone().requires_grad_()
            loss, sums = function(
                logprobs,
                old,
                advantages,
                weights,
                0.2,
                0.28,
                ref if with_reference else None,
                kl_coef,
                sampler,
                tis_cap,
            )
            loss.backward()
            results.append({"loss": loss, "grad": logprobs.grad, **sums})
        before, now = results
        assert before.keys() == now.keys()
        assert all(torch.equal(before[name], now[name]) for name in before)


# Two completions: tokens with ratios 2 and 8 (sequence ratio 4), advantage 1; ratio 1/2, advantage -1.
LOGPROBS, ADVANTAGES, COMPLETION = t(2, 8, 0.5).log(), t(1, 1, -1), torch.tensor([0, 0, 1])


def gains(loss, clip_eps_low, clip_eps_high, weights=(1, 10, 100), **options):
    """(loss, gradient) with old log-probabilities 0."""
    logprobs = LOGPROBS.clone().requires_grad_()
    value, _ = policy_loss(
        logprobs, t(0, 0, 0), ADVANTAGES, t(*weights), clip_eps_low, clip_eps_high,
        loss=loss, completion=COMPLETION, **options,
    )  # fmt: skip
    value.backward()
    return value.item(), logprobs.grad.tolist()


def test_gspo_by_hand():
    """Ratio 4 twice: 4·1 + 4·10 - 1/2·100 = -6 without a clip. d/dlogp of each token: 4·(1 + 10)/2. Clipped at 3: no
    gradient for both tokens of the first completion; the second is clipped at 0.8."""
    value, gradient = gains("gspo", 1.0, 9.0)
    assert value == pytest.approx(-44 + 50) and gradient == pytest.approx([-22, -22, 50])
    value, gradient = gains("gspo", 0.2, 2.0)
    assert value == pytest.approx(-33 + 80) and gradient == pytest.approx([0, 0, 0])


def test_gspo_token_by_hand():
    """The value of GSPO; each token has its own gradient, 4 times its weight: equal to GSPO's if the weights of a
    completion are equal (GSPO, arXiv 2507.18071, section 4.3)."""
    value, gradient = gains("gspo_token", 1.0, 9.0)
    assert value == pytest.approx(-44 + 50) and gradient == pytest.approx([-4, -40, 50])
    assert gains("gspo_token", 1.0, 9.0, (1, 1, 1))[1] == pytest.approx(gains("gspo", 1.0, 9.0, (1, 1, 1))[1])
    assert gains("gspo_token", 0.2, 2.0)[1] == [0, 0, 0]


def test_cispo_by_hand():
    """Weights min(2, 3), min(8, 3) and, with a bound below, max(0.5, 0.8): each times its log-probability."""
    ln2 = math.log(2)
    value, gradient = gains("cispo", 1.0, 2.0)
    assert value == pytest.approx(-2 * ln2 - 3 * 10 * 3 * ln2 + 0.5 * 100 * -ln2)
    assert gradient == pytest.approx([-2, -30, 50])
    assert gains("cispo", 0.2, 2.0)[1] == pytest.approx([-2, -30, 80])
    assert gains("cispo_sequence", 1.0, 2.0)[1] == pytest.approx([-3, -30, 50])


def test_sapo_by_hand():
    """Advantage 1: 4·sigmoid(1) and 4·sigmoid(7); advantage -1, temperature 1.05: 4/1.05·sigmoid(-0.525). The gradient
    at ratio r is 4·s(1 - s)·r·A, which is A at r = 1."""
    sigmoid = lambda x: 1 / (1 + math.exp(-x))
    value, gradient = gains("sapo", 0.2, 0.2)
    expected = -4 * sigmoid(1) - 40 * sigmoid(7) + 100 * 4 / 1.05 * sigmoid(-0.525)
    assert value == pytest.approx(expected, rel=1e-6)
    assert gradient[0] == pytest.approx(-4 * sigmoid(1) * sigmoid(-1) * 2)
    logprobs = t(-1, -1).requires_grad_()
    policy_loss(logprobs, logprobs.detach(), t(0.5, -2), t(1, 1), 0.2, 0.2, loss="sapo")[0].backward()
    torch.testing.assert_close(logprobs.grad, t(-0.5, 2))


def test_dual_clip_by_hand():
    """Ratio 8, advantages -1 and 1, dual clip 3: max(min(-8, -1.2), -3) = -3 without a gradient; min(8, 1.2) as before.
    Ratio 2 is below 3: -2, with its gradient."""
    logprobs = t(8, 8, 2).log().requires_grad_()
    loss, _ = policy_loss(logprobs, t(0, 0, 0), t(-1, 1, -1), t(1, 10, 100), 0.2, 0.2, dual_clip=3.0)
    loss.backward()
    assert loss.item() == pytest.approx(3 - 12 + 200)
    torch.testing.assert_close(logprobs.grad, t(0, 0, 200))


def test_kl_estimators_by_hand():
    """logp - ref = 2: k1 2, k2 2, k3 exp(-2) + 1; = -2: k1 -2, k2 2, k3 exp(2) - 3."""
    logprobs, ref = t(-1, -3), t(-3, -1)
    torch.testing.assert_close(kl_k1(logprobs, ref), t(2, -2))
    torch.testing.assert_close(kl_k2(logprobs, ref), t(2, 2))
    torch.testing.assert_close(kl_k3(logprobs, ref), t(math.exp(-2) + 1, math.exp(2) - 3))


def test_corrected_kl_by_hand():
    """Ratio 2, logp - ref = 1: kl_coef · 2 · 1; the gradient is that of r·k1: kl_coef · (2·1 + 2)."""
    logprobs = t(math.log(2)).requires_grad_()
    loss, sums = policy_loss(
        logprobs, t(0), t(0), t(1), 0.2, 0.2, logprobs.detach() - 1, 0.5, kl_estimator="k1", kl_correction=True
    )
    loss.backward()
    assert loss.item() == pytest.approx(1.0) and logprobs.grad.item() == pytest.approx(2.0)
    assert sums["kl"].item() == pytest.approx(1.0)


@pytest.mark.parametrize("name, corrected, pulls", [
    ("k1", False, "nowhere"), ("k2", False, "exactly"), ("k3", False, "forward"),
    ("k1", True, "exactly"), ("k3", True, "exactly"),
])  # fmt: skip
def test_gradient_of_the_kl_in_the_loss(name, corrected, pulls):
    """The mean over samples of each estimator's gradient, on-policy, summed over a vocabulary of 7: the gradient of
    KL(policy || reference), the gradient of KL(reference || policy), or 0."""
    gen = torch.Generator().manual_seed(0)
    logits = torch.randn(7, generator=gen, dtype=torch.float64).requires_grad_()
    ref = torch.randn(7, generator=gen, dtype=torch.float64).log_softmax(-1)
    logprobs = logits.log_softmax(-1)
    exact = {
        "exactly": (logprobs.exp() * (logprobs - ref)).sum(),
        "forward": (ref.exp() * (ref - logprobs)).sum(),
        "nowhere": 0 * logits.sum(),
    }[pulls]
    kl = KL_ESTIMATORS[name](logprobs, ref)
    estimate = (logprobs.exp().detach() * kl * ((logprobs - logprobs.detach()).exp() if corrected else 1)).sum()
    (ours,) = torch.autograd.grad(estimate, logits, retain_graph=True)
    torch.testing.assert_close(ours, torch.autograd.grad(exact, logits)[0])


def test_kl_in_the_reward_pulls_with_k1_alone():
    """A reward's gradient is the mean of its value times grad log p. Near the reference the pull of k2 and k3 vanishes:
    a tenth of the distance gives a tenth of the KL's gradient, but less than a hundredth times 1.1 of theirs."""
    gen = torch.Generator().manual_seed(0)
    start, direction = torch.randn(2, 7, generator=gen, dtype=torch.float64)

    def pull(name, distance):
        logits = (start + distance * direction).requires_grad_()
        logprobs, ref = logits.log_softmax(-1), start.log_softmax(-1)
        reward = KL_ESTIMATORS[name](logprobs.detach(), ref)
        (ours,) = torch.autograd.grad((logprobs.exp() * reward).sum(), logits, retain_graph=True)
        (exact,) = torch.autograd.grad((logprobs.exp() * (logprobs - ref)).sum(), logits)
        return ours, exact

    torch.testing.assert_close(*pull("k1", 0.1))
    for name in ("k2", "k3"):
        far, near = pull(name, 0.1)[0].norm(), pull(name, 0.01)[0].norm()
        assert near < 0.011 * far


def test_completion_kl_by_hand():
    """Sums over the tokens of each completion; k1 of (1, 2 | -4)."""
    kl = completion_kl(t(-1, -1, -5), t(-2, -3, -1), torch.tensor([0, 0, 1]))
    torch.testing.assert_close(kl, t(3, -4))


@pytest.mark.parametrize("mode, weights", [
    ("token_truncate", (2, 3, 0.5)), ("token_mask", (2, 0, 0.5)),
    ("sequence_truncate", (3, 3, 0.5)), ("sequence_mask", (0, 0, 0.5)),
])  # fmt: skip
def test_tis_modes_by_hand(mode, weights):
    """Scorer over sampler: 2 and 4 in the first completion (8 together), 0.5 in the second; cap 3."""
    ratio = tis_weight(t(2, 4, 0.5).log(), t(0, 0, 0), torch.tensor([0, 0, 1]), 3.0, mode)
    torch.testing.assert_close(ratio, t(*weights))


def test_entropy_bonus_by_hand():
    """It is maximised, under the weights of the loss; without entropy_coef it is only summed up."""
    logprobs, entropy = t(0, 0), t(2, 5).requires_grad_()
    loss, sums = policy_loss(logprobs, logprobs, t(0, 0), t(1, 10), 0.2, 0.2, entropy=entropy, entropy_coef=0.1)
    loss.backward()
    assert loss.item() == pytest.approx(-0.1 * (2 + 50)) and sums["entropy"].item() == 7
    torch.testing.assert_close(entropy.grad, t(-0.1, -1))
    loss, sums = policy_loss(logprobs, logprobs, t(1, 1), t(1, 10), 0.2, 0.2, entropy=entropy)
    assert loss.item() == -11 and sums["entropy"].item() == 7


@pytest.mark.parametrize("normaliser, weights", [
    ("token", (1 / 3, 0, 0, 1 / 3, 1 / 3)), ("sequence", (1 / 3, 0, 0, 1 / 6, 1 / 6)),
    ("constant", (1 / 12, 0, 0, 1 / 12, 1 / 12)),
])  # fmt: skip
def test_masked_completions_by_hand(normaliser, weights):
    """Lengths 1, 2, 2, the second masked: its tokens leave the denominator of "token"; the others count it still."""
    trained = [True, False, True]
    ours = token_weights([1, 2, 2], normaliser, {"tokens": 3, "completions": 3}, 4, trained)
    torch.testing.assert_close(ours, torch.tensor(weights))


def test_metrics_leave_masked_tokens_out():
    old = t(0, 0)
    _, sums = policy_loss(
        t(1, 1), old, t(1, 1), t(1, 0), 0.2, 0.2, t(0, 0), 0.1, t(-1, -1), kl_estimator="k1", entropy=t(3, 3)
    )
    expected = {"kl": 1, "entropy": 3, "clip_low_frac": 0, "clip_high_frac": 1, "sampler_logprob_diff": 1}
    assert {name: value.item() for name, value in sums.items()} == expected


def test_micro_batches_of_a_sequence_loss_add_up():
    """Completions are numbered from 0 in each micro-batch."""
    gen = torch.Generator().manual_seed(0)
    logprobs, old, advantages, weights = (torch.randn(6, generator=gen, dtype=torch.float64) for _ in range(4))
    loss = lambda part, completion: policy_loss(
        logprobs[part], old[part], advantages[part], weights[part], 0.2, 0.2, loss="gspo", completion=completion
    )[0]
    whole = loss(slice(6), torch.tensor([0, 0, 0, 1, 1, 2]))
    parts = loss(slice(3), torch.tensor([0, 0, 0])) + loss(slice(3, 6), torch.tensor([0, 0, 1]))
    torch.testing.assert_close(parts, whole)


def test_rloo_by_hand():
    """Each reward less the mean of the three others: 1 - 0, 0 - 1/3."""
    torch.testing.assert_close(group_advantages([1, 0, 0, 0], "rloo"), torch.tensor([1, -1 / 3, -1 / 3, -1 / 3]))


GROUPS = [[1.0, 0.0], [3.0, 2.0], [2.0, 2.0]]


@pytest.mark.parametrize("name, deviation, equal", [
    # rewards 1 0 3 2 2 2: mean 5/3, squares 22, (22 - 6·25/9) / 5 = 16/15
    ("batch", math.sqrt(16 / 15), [0.0, 0.0]),
    # less the group's mean: ±1/2 ±1/2 0 0: squares 1, 1 / 5
    ("reinforce_baseline", math.sqrt(1 / 5), [0.0, 0.0]),
])  # fmt: skip
def test_batch_deviation_by_hand(name, deviation, equal):
    assert batch_std(batch_moments(GROUPS, name)) == pytest.approx(deviation)
    expected = torch.tensor([0.5, -0.5]) / (deviation + 1e-4)
    torch.testing.assert_close(group_advantages(GROUPS[0], name, deviation), expected)
    assert group_advantages(GROUPS[2], name, deviation).tolist() == equal


@pytest.mark.parametrize("name", ["batch", "reinforce_baseline"])
def test_batch_deviation_is_one_over_all_ranks(name):
    """The moments of three ranks, one of them without a group, add up to those of one rank."""
    ranks = [batch_moments(groups, name) for groups in (GROUPS[:1], [], GROUPS[1:])]
    summed = {key: sum(rank[key] for rank in ranks) for key in ranks[0]}
    assert summed == batch_moments(GROUPS, name)


def test_batch_deviation_of_equal_rewards_is_0():
    """0.1 is not exact: rounding must not make the variance negative."""
    assert batch_std(batch_moments([[0.1] * 7] * 3, "batch")) == pytest.approx(0, abs=1e-6)
    assert batch_std(batch_moments([], "batch")) == 0


def test_the_loss_that_the_readme_adds_and_its_test(monkeypatch):
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    part = readme[readme.index("- **A loss**") : readme.index("- **An advantage**")]
    code = [line.removeprefix("      ") for line in part.splitlines() if line.startswith("      ") or not line]
    loss, row, its_test = re.fullmatch(
        r'\n*(def capped.*?)\n+("capped".*?)\n+(def test.*)', "\n".join(code), re.S
    ).groups()
    names = {"torch": torch, "token_ratio": LOSSES["ppo"][0]}
    exec(loss, names)
    exec(f"row = {{{row}\n}}", names)
    monkeypatch.setitem(LOSSES, "capped", names["row"]["capped"])
    exec(its_test, names)
    names["test_capped"]()
