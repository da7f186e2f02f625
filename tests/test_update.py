"""The step as a whole, on a tiny model: denominators, passes, filters, precision, schedules, supervised step."""

import copy
import math

import pytest
import torch
from conftest import FAMILIES, PROMPT_KINDS, assert_close_to_scale, load_pair, make_prompt, random_completions
from transformers.trainer_pt_utils import get_parameter_names

from grpo import model as models
from grpo import update
from grpo.batch import Rollout
from grpo.config import parse_config
from grpo.engine.distributed import Processes
from grpo.policy import Policy
from grpo.rollout import rollout
from grpo.sampler import SamplingSettings, sample
from rewards import parse_rewards

ALONE = Processes(0, 1, torch.device("cpu"), None)


@pytest.fixture
def setting(checkpoints):
    """(policy, two prompts, their scored rollouts with some signal)."""
    policy, _, tokenizer = load_pair(checkpoints["qwen2_vl"])
    prompts = [make_prompt(tokenizer, PROMPT_KINDS["video"], seed=i) for i in (0, 1)]
    rollouts = sample(policy, prompts, 3, SamplingSettings(max_new_tokens=6), [1, 2], tokenizer)
    for group, advantages in zip(rollouts, ((1.0, -1.0, 0.0), (0.5, 0.5, -1.0))):
        group.advantages = torch.tensor(advantages)
        group.parts = {"accuracy": [1.0, 0.0, 0.0]}
    rollouts[1].tokens[0] = rollouts[1].tokens[0][:2]
    rollouts[1].logprobs[0] = rollouts[1].logprobs[0][:2]
    return policy, prompts, rollouts


def config_of(*flags):
    return parse_config(["--preset", "demo", "--prompts_per_step", "2", "--grad_clip", "1000", *flags])


def gradients(policy, prompts, rollouts, config):
    """The gradient of one update, caught before the optimizer sees it."""
    caught = {}

    class Catch:
        def step(self):
            caught.update({n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None})

        def zero_grad(self, set_to_none):
            policy.zero_grad(set_to_none=set_to_none)

    chunks = update.make_chunks(prompts, rollouts, config, policy, ALONE)
    metrics = update.update(policy, Catch(), chunks, config, ALONE)
    return caught, metrics


@pytest.mark.parametrize("normaliser", ["token", "sequence", "constant"])
def test_accumulation_equals_one_batch(setting, normaliser):
    """Two forwards of one prompt each, of uneven lengths, give the gradient and loss of one forward of both."""
    policy, prompts, rollouts = setting
    assert sum(rollouts[0].lengths) != sum(rollouts[1].lengths)
    flags = ("--loss_normaliser", normaliser)
    whole, metrics = gradients(policy, prompts, rollouts, config_of(*flags, "--prompts_per_forward", "2"))
    parts, part_metrics = gradients(policy, prompts, rollouts, config_of(*flags, "--prompts_per_forward", "1"))
    assert len(whole) > 20
    for name in whole:
        assert_close_to_scale(parts[name], whole[name], 1e-4, name)
    for name in ("loss", "entropy", "grad_norm", "sampler_logprob_diff"):
        assert part_metrics[name] == pytest.approx(metrics[name], rel=1e-4, abs=1e-6)


def test_kl_at_step_one_is_that_of_equal_models(setting):
    """Policy and reference are equal: a KL would show other positions or pixels in one of them."""
    policy, prompts, rollouts = setting
    reference = Policy(copy.deepcopy(policy.model).requires_grad_(False), policy.spec)
    config = config_of("--kl_coef", "0.1")
    chunks = update.make_chunks(prompts, rollouts, config, policy, ALONE)
    update.add_reference(reference, chunks, config.temperature)
    metrics = update.update(policy, update.make_optimizer(policy, config), chunks, config, ALONE)
    assert 0 <= metrics["kl"] < 1e-6
    assert metrics["sampler_logprob_diff"] < 1e-5


def test_reference_sees_the_pixels(setting):
    """With the policy as its own reference, changing the video changes both alike, and the KL stays 0."""
    policy, prompts, rollouts = setting
    chunks = update.make_chunks(prompts, rollouts, config_of(), policy, ALONE)
    update.add_reference(policy, chunks, 1.0)
    before = chunks[0].ref_logprobs
    prompts[0].pixel_values_videos = prompts[0].pixel_values_videos.flip(0)
    chunks = update.make_chunks(prompts, rollouts, config_of(), policy, ALONE)
    update.add_reference(policy, chunks, 1.0)
    assert (chunks[0].ref_logprobs - before).abs().max() > 1e-2


def test_an_error_in_the_tower_is_an_error(setting, monkeypatch):
    """Never text-only log-probabilities instead."""
    policy, prompts, rollouts = setting
    chunks = update.make_chunks(prompts, rollouts, config_of(), policy, ALONE)

    def fail(*args, **kwargs):
        raise RuntimeError("broken tower")

    monkeypatch.setattr(policy.model.model.visual, "forward", fail)
    with pytest.raises(RuntimeError, match="broken tower"):
        update.add_reference(policy, chunks, 1.0)
    with pytest.raises(RuntimeError, match="broken tower"):
        update.update(policy, update.make_optimizer(policy, config_of()), chunks, config_of(), ALONE)


def test_later_passes_compare_with_the_first(setting):
    """mu = 2: the second pass's ratio is against the log-probabilities of the first, and it moves the weights again."""
    policy, prompts, rollouts = setting
    config = config_of("--ppo_epochs", "2", "--clip_eps_low", "0.001", "--clip_eps_high", "0.001")
    optimizer = update.make_optimizer(policy, config)
    update.set_learning_rate(optimizer, 1e-2)
    chunks = update.make_chunks(prompts, rollouts, config, policy, ALONE)
    metrics = update.update(policy, optimizer, chunks, config, ALONE)
    assert metrics["clip_low_frac"] + metrics["clip_high_frac"] > 0, "a large step must leave a narrow clip"
    with torch.no_grad():
        now, _ = policy(chunks[0].packed)
    assert (now - chunks[0].old_logprobs).abs().max() > 1e-3, "old log-probabilities must not follow the weights"


def test_filtered_groups_do_not_train(setting):
    """Raw accuracy decides, though advantages differ (as a format reward makes them)."""
    policy, prompts, rollouts = setting
    rollouts[1].parts["accuracy"] = [0.0, 0.0, 0.0]
    assert (
        len(update.make_chunks(prompts, rollouts, config_of("--dynamic_filter"), policy, ALONE)[0].packed.groups) == 1
    )
    assert len(update.make_chunks(prompts, rollouts, config_of(), policy, ALONE)[0].packed.groups) == 2


def test_small_updates_are_not_lost(setting):
    """lr 1e-6 moves fp32 masters; in bf16 it would move almost none."""
    policy, prompts, rollouts = setting
    config = config_of()
    optimizer = update.make_optimizer(policy, config)
    update.set_learning_rate(optimizer, 1e-6)
    before = [p.detach().clone() for p in policy.parameters()]
    update.update(policy, optimizer, update.make_chunks(prompts, rollouts, config, policy, ALONE), config, ALONE)
    assert all(p.dtype == torch.float32 for p in policy.parameters())
    moved = sum((a != b).sum().item() for a, b in zip(before, policy.parameters()))
    lost = sum((a.bfloat16() != b.bfloat16()).sum().item() for a, b in zip(before, policy.parameters()))
    assert moved > 50_000 and lost < moved / 20


def test_update_raises_what_was_better(setting):
    """The sign of the whole: after a step completions with positive advantage are likelier, the others less."""
    policy, prompts, rollouts = setting
    config = config_of("--kl_coef", "0")
    optimizer = update.make_optimizer(policy, config)
    update.set_learning_rate(optimizer, 1e-3)
    chunks = update.make_chunks(prompts, rollouts, config, policy, ALONE)
    update.update(policy, optimizer, chunks, config, ALONE)
    with torch.no_grad():
        now, _ = policy(chunks[0].packed)
    gain = ((now - chunks[0].old_logprobs) * chunks[0].advantages).sum()
    assert gain > 0


def test_a_gradient_that_is_not_finite_is_left_out(setting):
    policy, prompts, rollouts = setting
    rollouts[0].advantages = torch.tensor([math.inf, 0.0, 0.0])
    config = config_of()
    optimizer = update.make_optimizer(policy, config)
    update.set_learning_rate(optimizer, 1e-3)
    before = [p.detach().clone() for p in policy.parameters()]
    metrics = update.update(
        policy, optimizer, update.make_chunks(prompts, rollouts, config, policy, ALONE), config, ALONE
    )
    assert metrics["updates_skipped"] == 1
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters()))


def test_gradient_norm_is_clipped(setting):
    policy, prompts, rollouts = setting
    caught, metrics = gradients(policy, prompts, rollouts, config_of("--grad_clip", "0.01"))
    assert metrics["grad_norm"] > 0.01
    norm = math.sqrt(sum(float(g.pow(2).sum()) for g in caught.values()))
    assert norm == pytest.approx(0.01, rel=1e-3)


def test_supervised_step_weighs_prompts_equally(setting):
    policy, prompts, _ = setting
    targets = [random_completions(None, (4,)), random_completions(None, (3, 5, 2), seed=1)]
    with torch.no_grad():
        means = [policy(chunk.packed)[0].mean().item() for chunk in chunks_of(policy, prompts, targets)]
    loss, probabilities = update.supervised_step(
        policy, update.make_optimizer(policy, config_of()), prompts, targets, config_of(), ALONE
    )
    assert loss == pytest.approx(-sum(means) / 2, rel=1e-5)
    assert [len(p) for p in probabilities] == [4, 3, 5, 2]


def chunks_of(policy, prompts, targets):
    groups = [Rollout(t, [torch.zeros(len(x)) for x in t], [], [], advantages=torch.zeros(len(t))) for t in targets]
    return update.make_chunks(prompts, groups, config_of("--prompts_per_forward", "1"), policy, ALONE)


@pytest.mark.parametrize("family", FAMILIES)
def test_weight_decay_leaves_out_what_hugging_faces_trainer_leaves_out(checkpoints, family):
    """One step of gradients that are 0 moves decayed weights alone: by the rate times the decay."""
    policy, naive, _ = load_pair(checkpoints[family])
    optimizer = update.make_optimizer(policy, config_of("--weight_decay", "0.1"))
    update.set_learning_rate(optimizer, 0.5)
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
    rates = lambda kind, warmup: [update.learning_rate(s, 4, 1.0, kind, warmup) for s in range(4)]
    assert rates("linear", 0) == [1, 0.75, 0.5, 0.25]
    assert rates("linear", 2) == [0.5, 1, 1, 0.5]
    assert rates("constant", 0) == [1] * 4
    assert rates("cosine", 0) == pytest.approx([1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2])


def test_a_frozen_tower_runs_once_a_step_for_sampler_reference_and_policy(checkpoints, monkeypatch):
    """On two videos and a text; the log-probabilities are those of towers that run each time."""
    policy, _, tokenizer = load_pair(checkpoints["qwen2_vl"])
    kinds = [PROMPT_KINDS["video"], PROMPT_KINDS["text"], PROMPT_KINDS["video"]]
    prompts = [make_prompt(tokenizer, kind, seed=i) for i, kind in enumerate(kinds)]
    passes, tower = [], models.vision_features
    monkeypatch.setattr(models, "vision_features", lambda model, *given: passes.append(1) or tower(model, *given))

    def step(*flags):
        config = config_of("--prompts_per_rollout", "3", "--prompts_per_forward", "1", *flags)
        rollouts = rollout(policy, prompts, tokenizer, parse_rewards(("accuracy:1",)), config, 0)
        chunks = update.make_chunks(prompts, rollouts, config, policy, ALONE)
        update.add_reference(policy, chunks, 1.0)
        passes.clear()
        _, metrics = gradients(policy, prompts, rollouts, config)
        return torch.cat([chunk.ref_logprobs for chunk in chunks]), len(passes)

    apart, many = step()
    policy.model.model.visual.requires_grad_(False)
    shared, none = step("--freeze_vision")
    assert (many, none) == (2, 0), "vision passes of the update"
    torch.testing.assert_close(shared, apart, atol=1e-5, rtol=0)
    passes.clear()
    rollout(
        policy,
        prompts,
        tokenizer,
        parse_rewards(("accuracy:1",)),
        config_of("--prompts_per_rollout", "3", "--freeze_vision"),
        0,
    )
    assert passes == [1], "sampling uses the one pass too"
