"""Vision features kept on disk: the same to the bit, made once, and of this tower alone."""

import pytest
import torch
from conftest import PROMPT_KINDS, make_prompt
from processes import assert_same_run, launch, metrics_of, run_here, weights_of

from grpo.config import parse_config
from grpo.engine.feature_cache import keep_features
from grpo.errors import ConfigError
from grpo.families.base import Family
from grpo.policy import features_of

GIGABYTES = 1.0


@pytest.fixture
def passes(monkeypatch):
    """The grids of each pass of a tower."""
    grids, real = [], Family.vision_features
    note = lambda self, model, pixels, grid: grids.append(grid.tolist()) or real(self, model, pixels, grid)
    monkeypatch.setattr(Family, "vision_features", note)
    return grids


def prompts_of(tokenizer, *kinds):
    return [make_prompt(tokenizer, PROMPT_KINDS[kind], seed=number) for number, kind in enumerate(kinds)]


def test_features_are_made_once_and_equal_to_the_bit(tiny_vl, tmp_path, passes):
    policy, _, tokenizer = tiny_vl
    for prompt in prompts_of(tokenizer, "video", "image"):
        expected = features_of(policy, [prompt])[0]
        keep_features(policy, tmp_path / "kept", GIGABYTES)
        passes.clear()
        assert torch.equal(features_of(policy, [prompt])[0], expected) and len(passes) == 1
        keep_features(policy, tmp_path / "kept", GIGABYTES)  # as another process would
        assert torch.equal(features_of(policy, [prompt])[0], expected) and len(passes) == 1
        policy.cached_tower = None


def test_an_entry_is_of_one_video_whatever_shares_its_batch(tiny_vl, tmp_path, passes):
    policy, _, tokenizer = tiny_vl
    prompts = prompts_of(tokenizer, "two videos", "text", "image and video")
    expected = features_of(policy, prompts)
    keep_features(policy, tmp_path, GIGABYTES)
    passes.clear()
    for batch in (prompts, prompts[:1], prompts[1:], prompts[::-1]):
        for ours, prompt in zip(features_of(policy, batch), batch):
            theirs = expected[[prompt is other for other in prompts].index(True)]
            assert torch.allclose(ours, theirs, atol=1e-5)
    assert [len(grids) for grids in passes] == [1] * 4


def test_another_video_weight_or_precision_is_another_entry(tiny_vl, tmp_path, passes):
    policy, _, tokenizer = tiny_vl
    (prompt,) = prompts_of(tokenizer, "video")

    def seen():
        keep_features(policy, tmp_path, GIGABYTES)
        passes.clear()
        with_cache = features_of(policy, [prompt])[0]
        made, policy.cached_tower = len(passes), None
        assert torch.equal(with_cache, features_of(policy, [prompt])[0])
        return made == 0

    assert not seen() and seen()
    prompt.pixel_values_videos[-1, -1] += 1
    assert not seen() and seen()
    with torch.no_grad():
        next(policy.model.model.visual.parameters()).view(-1)[0] += 1
    assert not seen() and seen()
    policy.model.model.visual.bfloat16()
    assert not seen() and seen()


def test_frames_that_are_shuffled_for_one_step_are_not_kept(tiny_vl, tmp_path):
    policy, _, tokenizer = tiny_vl
    keep_features(policy, tmp_path, GIGABYTES)
    features_of(policy, prompts_of(tokenizer, "video"), keep=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_entry_is_a_miss(tiny_vl, tmp_path, passes, damage):
    policy, _, tokenizer = tiny_vl
    (prompt,) = prompts_of(tokenizer, "video")
    keep_features(policy, tmp_path, GIGABYTES)
    expected = features_of(policy, [prompt])[0]
    (entry,) = tmp_path.glob("*.features")
    whole, middle = entry.read_bytes(), entry.stat().st_size // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    entry.write_bytes({"cut": whole[:middle], "flipped": flipped, "empty": b""}[damage])
    passes.clear()
    assert torch.equal(features_of(policy, [prompt])[0], expected) and len(passes) == 1
    assert entry.read_bytes() == whole, "replaced"


def test_a_tower_that_is_trained_is_refused_in_one_line():
    with pytest.raises(ConfigError, match="--feature_cache kept: the vision tower is trained.*--freeze_vision"):
        parse_config(["--preset", "demo", "--feature_cache", "kept"])
    for frozen in (["--freeze_vision"], ["--lora_rank", "4"]):
        assert parse_config(["--preset", "demo", "--feature_cache", "kept", *frozen]).freeze_vision


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [("--freeze_vision",), ("--lora_rank", "4", "--learning_rate", "1e-2")])
def test_a_second_epoch_runs_no_vision_pass(world, tmp_path, passes, frozen):
    """Metrics and weights are those of a run without the cache, to the bit."""
    more = (*frozen, "--prompts_per_step", "12", "--steps", "4", "--prompts_per_rollout", "1", "--eval_batch", "1")
    kept = ("--feature_cache", str(tmp_path / "kept"))
    plain = run_here(tmp_path / "plain", world, *more)
    passes.clear()
    assert run_here(tmp_path / "cached", world, *more, *kept) == plain
    assert metrics_of(tmp_path / "cached") == metrics_of(tmp_path / "plain")
    if frozen == ("--freeze_vision",):
        ours, theirs = weights_of(tmp_path / "cached", 4), weights_of(tmp_path / "plain", 4)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    distinct = len(list((tmp_path / "kept").iterdir()))
    assert len(passes) == distinct and 24 < distinct <= 24 + 5, "each video of two epochs and two evaluations: once"
    passes.clear()
    assert run_here(tmp_path / "again", world, *more, *kept) == plain and not passes


@pytest.mark.slow
def test_ranks_that_share_a_prompt_keep_what_each_encodes(world, tmp_path):
    more = ("--freeze_vision", "--prompts_per_step", "12", "--steps", "4", "--learning_rate", "1e-5")
    kept = ("--feature_cache", str(tmp_path / "kept"), "--sequence_parallel", "2")
    alone = run_here(tmp_path / "1", world, *more)
    entries = lambda: {path.name: path.stat().st_ino for path in (tmp_path / "kept").iterdir()}
    for name in ("first", "second"):
        before = entries() if name == "second" else {}
        together, _ = launch(2, tmp_path / name, world, *more, *kept)
        assert_same_run(together, alone, tmp_path / name, tmp_path / "1", step=4)
    assert 48 < len(before) <= 58 and entries() == before, "nothing was written anew"
