"""The step as a whole, on a tiny model: denominators, passes, filters, precision, schedules, supervised step."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from conftest import FAMILIES, PROMPT_KINDS, assert_close_to_scale, load_pair, make_prompt
from transformers.trainer_pt_utils import get_parameter_names

from grpo import update
from grpo.batch import pack
from grpo.config import parse_config
from grpo.engine.optimizer import learning_rate, make_optimizer, set_learning_rate
from grpo.engine.warmup import determined, supervised_step, target_groups
from grpo.policy import Policy
from grpo.rollout import rollout
from grpo.sampler import SamplingSettings, generate
from rewards import parse_rewards


@pytest.fixture
def setting(checkpoints):
    """(policy, the scored groups of two prompts, with some signal)."""
    policy, _, tokenizer = load_pair(checkpoints["qwen2_vl"])
    prompts = [make_prompt(tokenizer, PROMPT_KINDS["video"], seed=i) for i in (0, 1)]
    groups = generate(policy, prompts, 3, SamplingSettings(max_new_tokens=6), [1, 2], tokenizer)
    for group, advantages in zip(groups, ((1.0, -1.0, 0.0), (0.5, 0.5, -1.0))):
        group.advantages = torch.tensor(advantages)
        group.parts = {"accuracy": [1.0, 0.0, 0.0]}
    groups[1].tokens[0] = groups[1].tokens[0][:2]
    groups[1].logprobs[0] = groups[1].logprobs[0][:2]
    return policy, groups


def config_of(*flags):
    return parse_config(
        ["--preset", "demo", "--prompts_per_step", "2", "--grad_clip", "1000", "--ppo_epochs", "1", *flags]
    )


def gradients(policy, groups, config):
    """The gradient of one update, caught before the optimizer sees it."""
    caught = {}

    class Catch:
        def step(self):
            caught.update({n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None})

        def zero_grad(self, set_to_none):
            policy.zero_grad(set_to_none=set_to_none)

    metrics = update.update(policy, Catch(), update.mini_batches(groups, policy, config), config)
    return caught, metrics


@pytest.mark.parametrize("normaliser", ["token", "sequence", "constant"])
def test_accumulation_equals_one_batch(setting, normaliser):
    """Two forwards of one prompt each, of uneven lengths, give the gradient and loss of one forward of both."""
    policy, groups = setting
    assert sum(groups[0].lengths) != sum(groups[1].lengths)
    flags = ("--loss_normaliser", normaliser)
    whole, metrics = gradients(policy, groups, config_of(*flags, "--prompts_per_forward", "2"))
    parts, part_metrics = gradients(policy, groups, config_of(*flags, "--prompts_per_forward", "1"))
    assert len(whole) > 20
    for name in whole:
        assert_close_to_scale(parts[name], whole[name], 1e-4, name)
    for name in ("loss", "entropy", "grad_norm", "sampler_logprob_diff"):
        assert part_metrics[name] == pytest.approx(metrics[name], rel=1e-4, abs=1e-6)


def test_kl_at_step_one_is_that_of_equal_models(setting):
    """Policy and reference are equal: a KL would show other positions or pixels in one of them."""
    policy, groups = setting
    reference = Policy(copy.deepcopy(policy.model).requires_grad_(False), policy.spec)
    config = config_of("--kl_coef", "0.1")
    (batches,) = update.mini_batches(groups, policy, config)
    update.add_reference(reference, batches, config.temperature)
    metrics = update.update(policy, make_optimizer(policy, config), [batches], config)
    assert 0 <= metrics["kl"] < 1e-6
    assert metrics["sampler_logprob_diff"] < 1e-5


def test_reference_sees_the_pixels(setting):
    """With the policy as its own reference, changing the video changes both alike, and the KL stays 0."""
    policy, groups = setting
    (batches,) = update.mini_batches(groups, policy, config_of())
    update.add_reference(policy, batches, 1.0)
    before = batches[0].ref_logprobs
    groups[0].prompt.pixel_values_videos = groups[0].prompt.pixel_values_videos.flip(0)
    (batches,) = update.mini_batches(groups, policy, config_of())
    update.add_reference(policy, batches, 1.0)
    assert (batches[0].ref_logprobs - before).abs().max() > 1e-2


def test_an_error_in_the_tower_is_an_error(setting, monkeypatch):
    """Never text-only log-probabilities instead."""
    policy, groups = setting
    (batches,) = update.mini_batches(groups, policy, config_of())

    def fail(*args, **kwargs):
        raise RuntimeError("broken tower")

    monkeypatch.setattr(policy.model.model.visual, "forward", fail)
    with pytest.raises(RuntimeError, match="broken tower"):
        update.add_reference(policy, batches, 1.0)
    with pytest.raises(RuntimeError, match="broken tower"):
        update.update(policy, make_optimizer(policy, config_of()), [batches], config_of())


def test_later_passes_compare_with_the_first(setting):
    """mu = 2: the second pass's ratio is against the log-probabilities of the first, and it moves the weights again."""
    policy, groups = setting
    config = config_of("--ppo_epochs", "2", "--clip_eps_low", "0.001", "--clip_eps_high", "0.001")
    optimizer = make_optimizer(policy, config)
    set_learning_rate(optimizer, 1e-2)
    (batches,) = update.mini_batches(groups, policy, config)
    metrics = update.update(policy, optimizer, [batches], config)
    assert metrics["clip_low_frac"] + metrics["clip_high_frac"] > 0, "a large step must leave a narrow clip"
    with torch.no_grad():
        now, _ = policy(batches[0])
    assert (now - batches[0].old_logprobs).abs().max() > 1e-3, "old log-probabilities must not follow the weights"


def test_filtered_groups_do_not_train(setting):
    """Raw accuracy decides, though advantages differ (as a format reward makes them)."""
    policy, groups = setting
    groups[1].parts["accuracy"] = [0.0, 0.0, 0.0]
    own = [(len(group.prompt.input_ids), tuple(group.lengths)) for group in groups]
    assert [batch.groups for batch in update.mini_batches(groups, policy, config_of("--dynamic_filter"))[0]] == [
        own[:1]
    ]
    assert [batch.groups for batch in update.mini_batches(groups, policy, config_of())[0]] == [own]


def test_small_updates_are_not_lost(setting):
    """lr 1e-6 moves fp32 masters; in bf16 it would move almost none."""
    policy, groups = setting
    config = config_of()
    optimizer = make_optimizer(policy, config)
    set_learning_rate(optimizer, 1e-6)
    before = [p.detach().clone() for p in policy.parameters()]
    update.update(policy, optimizer, update.mini_batches(groups, policy, config), config)
    assert all(p.dtype == torch.float32 for p in policy.parameters())
    moved = sum((a != b).sum().item() for a, b in zip(before, policy.parameters()))
    lost = sum((a.bfloat16() != b.bfloat16()).sum().item() for a, b in zip(before, policy.parameters()))
    assert moved > 50_000 and lost < moved / 20


def test_update_raises_what_was_better(setting):
    """The sign of the whole: after a step completions with positive advantage are likelier, the others less."""
    policy, groups = setting
    config = config_of("--kl_coef", "0")
    optimizer = make_optimizer(policy, config)
    set_learning_rate(optimizer, 1e-3)
    (batches,) = update.mini_batches(groups, policy, config)
    update.update(policy, optimizer, [batches], config)
    with torch.no_grad():
        now, _ = policy(batches[0])
    gain = ((now - batches[0].old_logprobs) * batches[0].advantages).sum()
    assert gain > 0


def test_a_gradient_that_is_not_finite_is_left_out(setting):
    policy, groups = setting
    groups[0].advantages = torch.tensor([math.inf, 0.0, 0.0])
    config = config_of()
    optimizer = make_optimizer(policy, config)
    set_learning_rate(optimizer, 1e-3)
    before = [p.detach().clone() for p in policy.parameters()]
    metrics = update.update(policy, optimizer, update.mini_batches(groups, policy, config), config)
    assert metrics["updates_skipped"] == 1
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters()))


def test_gradient_norm_is_clipped(setting):
    policy, groups = setting
    caught, metrics = gradients(policy, groups, config_of("--grad_clip", "0.01"))
    assert metrics["grad_norm"] > 0.01
    norm = math.sqrt(sum(float(g.pow(2).sum()) for g in caught.values()))
    assert norm == pytest.approx(0.01, rel=1e-3)


def test_supervised_step_weighs_prompts_equally(tiny_vl):
    """The mean over prompts of the mean over a prompt's target tokens, however many targets it has."""
    policy, _, tokenizer = tiny_vl
    targets, prompts = [("left",), ("up up", "right up left down up", "down down down down down")], []
    for seed, completions in enumerate(targets):
        prompt = make_prompt(tokenizer, PROMPT_KINDS["video"], seed=seed)
        prompt.sample = replace(prompt.sample, completions=completions)
        prompts.append(prompt)
    groups, _ = target_groups(prompts, tokenizer, policy.spec, max_tokens=50)
    tokens = [group.tokens for group in groups]
    for own, texts in zip(tokens, targets):
        assert [tokenizer.decode(t[:-1]) for t in own] == list(texts)
        assert all(int(t[-1]) == tokenizer.eos_token_id for t in own)
    lengths = [[len(t) for t in own] for own in tokens]
    assert [len(own) for own in lengths] == [1, 3] and len(set(lengths[1])) == 3
    with torch.no_grad():
        logprobs = [policy(pack([p], [own], policy.spec))[0] for p, own in zip(prompts, tokens)]
    optimizer = make_optimizer(policy, config_of())
    loss, probabilities = supervised_step(policy, optimizer, groups, config_of())
    assert loss == pytest.approx(-sum(own.mean().item() for own in logprobs) / 2, rel=1e-5)
    assert [len(p) for p in probabilities] == sum(lengths, [])
    torch.testing.assert_close(torch.cat(probabilities), torch.cat(logprobs).exp(), rtol=1e-4, atol=1e-7)


def test_a_token_is_determined_unless_completions_part_at_it():
    completions = [[1, 2, 5, 9], [1, 3, 5, 9], [1, 3, 6, 7, 9], [1, 2, 5, 9]]
    expected = [[1, 0, 1, 1], [1, 0, 0, 1], [1, 0, 0, 1, 1], [1, 0, 1, 1]]
    assert [own.int().tolist() for own in determined([torch.tensor(own) for own in completions])] == expected
    assert determined([torch.tensor([4, 4])])[0].all()


@pytest.mark.parametrize("family", FAMILIES)
def test_weight_decay_leaves_out_what_hugging_faces_trainer_leaves_out(checkpoints, family):
    """One step of gradients that are 0 moves decayed weights alone: by the rate times the decay."""
    policy, naive, _ = load_pair(checkpoints[family])
    optimizer = make_optimizer(policy, config_of("--weight_decay", "0.1"))
    set_learning_rate(optimizer, 0.5)
    for parameter in policy.parameters():
        parameter.data.fill_(1.0)
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    values = {name: p.unique().tolist() for name, p in policy.model.named_parameters()}
    # Trainer goes by torch's LayerNorm and by names, which miss the RMSNorms of Qwen2.5-VL's tower ("norm1", "ln_q").
    norms = list({type(module) for module in naive.modules() if type(module).__name__.endswith("Norm")})
    decayed = set(get_parameter_names(naive, norms, ["bias"]))
    assert {name for name, value in values.items() if value == [pytest.approx(0.95)]} == decayed
    assert {name for name, value in values.items() if value == [1.0]} == values.keys() - decayed


def test_schedules_by_hand():
    rates = lambda kind, warmup: [learning_rate(s, 4, 1.0, kind, warmup) for s in range(4)]
    assert rates("linear", 0) == [1, 0.75, 0.5, 0.25]
    assert rates("linear", 2) == [0.5, 1, 1, 0.5]
    assert rates("constant", 0) == [1] * 4
    assert rates("cosine", 0) == pytest.approx([1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2])


def test_a_frozen_tower_runs_once_a_step_for_sampler_reference_and_policy(tiny, monkeypatch):
    """On two videos and a text; the log-probabilities are those of towers that run each time."""
    policy, _, tokenizer = tiny
    kinds = [PROMPT_KINDS["video"], PROMPT_KINDS["text"], PROMPT_KINDS["video"]]
    prompts = [make_prompt(tokenizer, kind, seed=i) for i, kind in enumerate(kinds)]
    passes, family = [], type(policy.spec.family)
    tower = family.vision_features
    monkeypatch.setattr(family, "vision_features", lambda *given: passes.append(1) or tower(*given))

    def step(*flags):
        config = config_of("--prompts_per_rollout", "3", "--prompts_per_forward", "1", *flags)
        groups = rollout(policy, prompts, tokenizer, parse_rewards(("accuracy:1",)), config, 0)
        (batches,) = update.mini_batches(groups, policy, config)
        update.add_reference(policy, batches, 1.0)
        update.add_advantages(batches, config)
        passes.clear()
        _, metrics = gradients(policy, groups, config)
        return torch.cat([batch.ref_logprobs for batch in batches]), len(passes)

    apart, many = step()
    policy.model.model.visual.requires_grad_(False)
    shared, none = step("--freeze_vision")
    assert (many, none) == (2, 0), "vision passes of the update"
    torch.testing.assert_close(shared, apart, atol=1e-5, rtol=0)
    passes.clear()
    config = config_of("--prompts_per_rollout", "3", "--freeze_vision")
    rollout(policy, prompts, tokenizer, parse_rewards(("accuracy:1",)), config, 0)
    assert passes == [1], "sampling uses the one pass too"
