"""Mini-batches: k of them in mu passes equal a naive loop over plain transformers' forwards, on one process and on two.

Adam's eps is 1 here: a step is then nearly linear in the gradient, so that weights can be compared as gradients are. By
its default Adam makes a whole step of the rounding of a gradient that is 0.
"""

import random
import sys
from pathlib import Path

import pytest
import torch
from conftest import load_pair, naive_logits, random_completions
from mini_batch_update import COMMON, RATE, REWARDS, SEED, SETTINGS, TRUNCATED, all_updates, config_of, groups_of
from processes import finish, start_command

from demo.tiny import build_tiny_model
from grpo import update
from grpo.batch import MicroBatch, RolloutGroup, pack
from grpo.config import parse_config
from grpo.engine.optimizer import make_optimizer, set_learning_rate
from grpo.update import mini_batches

CPU, MOMENTS = torch.device("cpu"), ("exp_avg", "exp_avg_sq")


@pytest.fixture(scope="module")
def folders(checkpoints, tmp_path_factory):
    """(policy, reference), of other weights."""
    return checkpoints["qwen2_vl"], build_tiny_model(tmp_path_factory.mktemp("reference"), seed=2)


@pytest.fixture(scope="module")
def alone(folders):
    return all_updates(*folders, CPU)


def scores(model, spec, group, temperature):
    """[(log-probabilities, entropy) of the tokens of each completion] of one forward each."""
    rows = []
    for tokens in group.tokens:
        logprobs = (naive_logits(model, spec, group.prompt, tokens) / temperature).log_softmax(-1)
        allowed = [t for t in range(logprobs.shape[-1]) if t not in spec.never_sampled]
        entropy = -(logprobs[:, allowed].exp() * logprobs[:, allowed]).sum(-1)
        rows.append((logprobs.gather(-1, tokens[:, None])[:, 0], entropy))
    return rows


def token_clip(own, old, ref, advantage, tokens, completions):
    """The loss of one completion of the setting of this name."""
    (now, entropy), ratio = own, (own[0] - old).exp()
    gain = torch.minimum(ratio * advantage, ratio.clamp(0.98, 1.03) * advantage)
    return (-gain + 0.1 * ((ref - now).exp() - (ref - now) - 1) - 0.05 * entropy).sum() / tokens


def unmixed(own, old, ref, advantage, tokens, completions):
    return token_clip((own[0], 0 * own[1]), old, ref, advantage, tokens, completions)


def gspo(own, old, ref, advantage, tokens, completions):
    ratio = (own[0] - old).mean().exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(0.7, 1.3) * advantage) / completions


LOSS = dict(zip(SETTINGS, (token_clip, gspo, unmixed)))


def naive_advantages(name, old, ref):
    """{slot: (G,)} from the rewards; old, ref: {slot: log-probabilities of each completion}."""
    rewards = {slot: torch.tensor(REWARDS[slot]) for slots in SETTINGS[name][1] for slot in slots}
    if name == "token clip":  # over all 15 rewards
        spread = torch.cat([*rewards.values()]).std()
    if "KL" in name:
        taken = lambda slot: torch.stack([(-5.5 - 0.1 * slot - r).sum() for r in ref[slot]])  # the sampler's
        rewards = {slot: r - 0.1 * taken(slot) for slot, r in rewards.items()}
    centred = {slot: r - r.mean() for slot, r in rewards.items()}
    divided = {
        "token clip": lambda slot: centred[slot] / (spread + 1e-4),
        "one mini-batch": lambda slot: centred[slot],
    }.get(name, lambda slot: centred[slot] / (rewards[slot].std() + 1e-4))
    return {slot: divided(slot) for slot in rewards}


def naive_update(name, folders):
    """What `one_update` does, by transformers' own forwards of each prompt and completion, one at a time."""
    policy, model, tokenizer = load_pair(folders[0])
    reference, spec, config = load_pair(folders[1])[1], policy.spec, config_of(name)
    groups = {group.prompt.sample.slot: group for group in groups_of(tokenizer, range(5))}
    with torch.no_grad():
        plain = lambda m: {s: [row for row, _ in scores(m, spec, g, config.temperature)] for s, g in groups.items()}
        old, ref = plain(model), plain(reference)
    advantages, order, seeded = naive_advantages(name, old, ref), [], random.Random(SEED)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, (0.9, config.adam_beta2), eps=1.0, weight_decay=0.0)
    for _ in range(config.ppo_epochs):
        parts = SETTINGS[name][1]
        for slots in seeded.sample(parts, len(parts)) if len(parts) > 1 else parts:
            chosen = [(s, n) for s in slots for n in range(3) if name != "token clip" or (s, n) != TRUNCATED]
            tokens = sum(len(groups[s].tokens[n]) for s, n in chosen)
            own = {s: scores(model, spec, groups[s], config.temperature) for s in slots}
            loss = sum(
                LOSS[name](own[s][n], old[s][n], ref[s][n], advantages[s][n], tokens, 3 * len(slots)) for s, n in chosen
            )
            loss.backward()
            assert any(p.grad.any() for p in model.parameters()), "a gradient of 0 would make no step"
            optimizer.step()
            optimizer.zero_grad()
            order.append(slots)
    moments = {k: {f"model.{n}": optimizer.state[p][k] for n, p in model.named_parameters()} for k in MOMENTS}
    after = {f"model.{n}": p.detach() for n, p in model.named_parameters()}
    return {"order": order, "old": old, "advantages": advantages, "after": after, **moments}


def assert_same_update(ours, theirs):
    """Moments, and what each weight moved by, are equal to 1e-5 of the norm of the tensor. A weight is a number in
    fp32, so that it may also be off by twice its own rounding, of 2^-24, at each of at most 6 steps."""
    for key in MOMENTS:
        assert ours[key].keys() == theirs[key].keys()
        for name, tensor in theirs[key].items():
            gap, norm = (ours[key][name] - tensor).norm().item(), tensor.norm().item()
            assert gap <= 1e-5 * norm, f"{key} of {name}: off by {gap:.1e} of {norm:.1e}"
    for name, before in ours["before"].items():
        gap, moved = (ours["after"][name] - theirs["after"][name]).abs(), theirs["after"][name] - before
        assert moved.any() and (gap <= 1e-5 * moved.norm() + 12 * 2**-24 * before.abs()).all(), name


@pytest.mark.parametrize("name", SETTINGS)
def test_mini_batches_equal_a_naive_loop(alone, folders, name):
    ours, theirs = alone[name], naive_update(name, folders)
    assert ours["order"] == theirs["order"], "a seeded order, another one in each pass"
    assert ours["metrics"]["clip_low_frac"] > 0 and ours["metrics"]["clip_high_frac"] > 0, "later passes are off-policy"
    for slot, logprobs in ours["old"]:
        torch.testing.assert_close(logprobs, torch.cat(theirs["old"][slot]), atol=2e-5, rtol=0)
    for slot, _, advantages in ours["groups"]:
        torch.testing.assert_close(advantages, theirs["advantages"][slot], atol=2e-6, rtol=1e-6)
    assert_same_update(ours, theirs)


def test_what_the_order_is(alone):
    """Slots are those of all processes; each pass has an order of its own, drawn from the run's seed and the step."""
    name = "token clip"
    assert alone[name]["order"] == [[4], [0, 1], [2, 3], [2, 3], [4], [0, 1]]


@pytest.mark.slow
def test_two_processes_equal_one(alone, folders, tmp_path):
    """Same mini-batches in the same order, same deviation of the batch, same update. Slots 0, 2 and 4 are of rank 0:
    the mini-batch [4] is a dummy's on rank 1."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               Path(__file__).with_name("mini_batch_update.py"), *folders, tmp_path / "two.pt"]  # fmt: skip
    finish(start_command(command))
    together = torch.load(tmp_path / "two.pt")
    for name, one in alone.items():
        two = together[name]
        assert two["order"] == one["order"]
        assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-5, abs=1e-6)
        for ours, theirs in zip(two["groups"], one["groups"], strict=True):
            assert ours[0] == theirs[0] and ours[1] == pytest.approx(theirs[1], rel=1e-6)
            if name == "token clip":  # rewards are as they were: the deviation over both ranks is equal to the bit
                assert torch.equal(ours[2], theirs[2])
        assert_same_update(two, one)
        for results in (one, two):
            for mixed, expected in results["mixed"].values():
                torch.testing.assert_close(mixed, expected)


@pytest.fixture
def setting(folders):
    """(policy, naive model, tokenizer)."""
    return load_pair(folders[0])


@pytest.mark.parametrize("more, forwards", [
    ((), 5),  # one mini-batch, one pass: each micro-batch is computed once, forward and backward
    (("--ppo_epochs", "3"), 15),
    (("--mini_batch_size", "2"), 10),  # once for the old log-probabilities
    (("--mini_batch_size", "5"), 5),
    (("--mini_batch_size", "2", "--ppo_epochs", "3"), 20),
])  # fmt: skip
def test_old_log_probabilities_cost_a_forward_only_if_there_are_mini_batches(setting, more, forwards):
    policy, naive, tokenizer = setting
    config, groups, passes = parse_config([*COMMON, "--kl_coef", "0", *more]), groups_of(tokenizer, range(5)), []
    policy.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    steps = mini_batches(groups, policy, config)
    batches = [batch for batches in steps for batch in batches]
    update.add_advantages(batches, config)
    update.update(policy, make_optimizer(policy, config), steps, config, SEED)
    assert len(passes) == forwards
    assert passes == sorted(passes), "old log-probabilities first, of the weights that sampled"


def test_masked_completions_by_hand(setting):
    """Lengths 2, 5, 6 and, truncated, 6: 1/13 for each token of the others, and metrics are means over the 13."""
    policy, naive, tokenizer = setting
    config = parse_config([*COMMON, "--kl_coef", "0", "--mask_truncated"])
    group = groups_of(tokenizer, [0])[0]
    group.tokens.append(random_completions(tokenizer, (6,), seed=9)[0])
    group.logprobs.append(torch.full((6,), -3.0))
    group.finished, group.advantages = [True, True, True, False], torch.tensor([1.0, -2.0, 0.5, 100.0])
    [[batch]] = mini_batches([group], policy, config)
    assert update.trained_completions(batch, config) == [True, True, True, False]

    class Keep:
        """An optimizer that keeps the gradients."""

        def step(self):
            self.gradients = {n: p.grad.clone() for n, p in policy.named_parameters()}

        def zero_grad(self, set_to_none):
            policy.zero_grad(set_to_none=set_to_none)

    keep = Keep()
    metrics = update.update(policy, keep, [[batch]], config, SEED)
    logprobs, entropy = policy(batch, config.temperature)
    expected = -(logprobs[:13] * batch.advantages[:13]).sum() / 13
    named = dict(policy.named_parameters())
    for (name, _), gradient in zip(named.items(), torch.autograd.grad(expected, named.values(), allow_unused=True)):
        ours = keep.gradients[name]
        assert gradient is None and not ours.any() or (ours - gradient).norm() <= 1e-5 * gradient.norm(), name
    assert metrics["loss"] == pytest.approx(-float(batch.advantages[:13].sum()) / 13)
    assert metrics["entropy"] == pytest.approx(entropy[:13].mean().item())
    gap = (logprobs.detach() - batch.sampler_logprobs)[:13].abs().mean()
    assert metrics["sampler_logprob_diff"] == pytest.approx(gap.item(), rel=1e-5)


def test_a_step_whose_completions_are_all_truncated_changes_nothing(setting):
    policy, naive, tokenizer = setting
    config, group = parse_config([*COMMON, "--kl_coef", "0", "--mask_truncated"]), groups_of(tokenizer, [0])[0]
    group.finished = [False] * 3
    steps = mini_batches([group], policy, config)
    update.add_advantages(steps[0], config)
    optimizer, before = make_optimizer(policy, config), [p.detach().clone() for p in policy.parameters()]
    set_learning_rate(optimizer, 1.0)
    metrics = update.update(policy, optimizer, steps, config, SEED)
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters()))
    assert metrics["grad_norm"] == metrics["updates_skipped"] == 0 and "loss" not in metrics


@pytest.mark.parametrize("chunk", [2**26, 2**9], ids=["one chunk", "recomputed chunks"])
def test_gradient_of_the_entropy_is_that_of_its_definition(setting, monkeypatch, chunk):
    """Tokens that are never sampled have a logit of -inf: 0 · log 0 must not make the gradient nan."""
    policy, naive, tokenizer = setting
    monkeypatch.setattr("grpo.policy.LOGITS_PER_CHUNK", chunk)
    group = groups_of(tokenizer, [0])[0]
    batch = pack([group.prompt], [group.tokens], policy.spec)
    _, entropy = policy(batch, 0.9, entropy_gradient=True)
    ours = torch.autograd.grad(entropy.sum(), [*policy.parameters()], allow_unused=True)
    expected = sum(entropy.sum() for _, entropy in scores(naive, policy.spec, group, 0.9))
    theirs = torch.autograd.grad(expected, [*naive.parameters()], allow_unused=True)
    torch.testing.assert_close(entropy.sum(), expected)
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine is None) == (other is None)
        assert mine is None or (mine.isfinite().all() and (mine - other).norm() <= 2e-5 * other.norm())


def test_kl_in_the_reward_by_hand():
    """Sampler less reference: 1 + 2 = 3 in the first completion, -4 in the second; each times 0.1."""
    config = parse_config([*COMMON, "--kl_coef", "0.1", "--kl_in", "reward", "--kl_estimator", "k1"])
    group = RolloutGroup(None, [torch.zeros(2), torch.zeros(1)], [], [], [], rewards=[1.0, 1.0])
    batch = MicroBatch(*[None] * 5, groups=[], rollouts=[group], completion=torch.tensor([0, 0, 1]))
    batch.sampler_logprobs, batch.ref_logprobs = torch.tensor([-1.0, -1.0, -5.0]), torch.tensor([-2.0, -3.0, -1.0])
    update.add_advantages([batch], config)
    assert group.rewards == pytest.approx([0.7, 1.4])
    deviation = 0.7 / 2**0.5  # of the sample
    expected = torch.tensor([-0.35, -0.35, 0.35]) / (deviation + 1e-4)
    torch.testing.assert_close(batch.advantages, expected)
