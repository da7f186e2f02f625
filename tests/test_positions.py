"""Positions against tables written out by hand, for both families, and against the library where both rules agree."""

import pytest
import torch
import transformers
from conftest import FAMILIES, PROMPT_KINDS, load_pair, make_prompt

from grpo.engine.model import ModelSpec
from grpo.families import load_family
from grpo.positions import prompt_positions
from video.dataset import Sample
from video.prompt import Prompt

IMAGE, VIDEO = 7, 8


def spec_of(name, **vision):
    family = load_family(name)
    config = family.model_class.config_class(image_token_id=IMAGE, video_token_id=VIDEO, vision_config=vision)
    return ModelSpec.of(config, [0], None)


SPEC, SPEC_2_5, SPEC_3 = spec_of("qwen2_vl"), spec_of("qwen2_5_vl", tokens_per_second=2), spec_of("qwen3_vl")
SPECS = [spec_of(name) for name in FAMILIES]


def prompt_of(ids, images=None, videos=None, seconds=()):
    grid = lambda g: None if g is None else torch.tensor(g)
    return Prompt(Sample("t:1", "?", "A"), torch.tensor(ids), None, grid(images), None, grid(videos), list(seconds))


def table(prompt, spec):
    positions, after = prompt_positions(prompt, spec)
    return positions.tolist(), after


@pytest.mark.parametrize("spec", SPECS)
def test_text(spec):
    assert table(prompt_of([1, 2, 3]), spec) == ([[0, 1, 2]] * 3, 3)


@pytest.mark.parametrize("spec", SPECS)
def test_image(spec):
    # Two words, 2 x 3 merged patches, one word. The word follows the largest position, 2 + 2, of the image.
    prompt = prompt_of([1, 2, *[IMAGE] * 6, 3], images=[[1, 4, 6]])
    expected = [[0, 1, 2, 2, 2, 2, 2, 2, 5], [0, 1, 2, 2, 2, 3, 3, 3, 5], [0, 1, 2, 3, 4, 2, 3, 4, 5]]
    assert table(prompt, spec) == (expected, 6)


def test_short_video():
    prompt = prompt_of([1, *[VIDEO] * 4, 3, 3], videos=[[2, 2, 4]], seconds=[1.0])
    expected = [[0, 1, 1, 2, 2, 3, 4], [0, 1, 1, 1, 1, 3, 4], [0, 1, 2, 1, 2, 3, 4]]
    assert table(prompt, SPEC) == (expected, 5)


def test_long_small_video():
    """More time steps than rows or columns: text follows the last *time* step; transformers 5 would put it at 2."""
    prompt = prompt_of([1, *[VIDEO] * 5, 3], videos=[[5, 2, 2]], seconds=[1.0])
    assert table(prompt, SPEC) == ([[0, 1, 2, 3, 4, 5, 6], [0, 1, 1, 1, 1, 1, 6], [0, 1, 1, 1, 1, 1, 6]], 7)


def test_qwen2_5_spaces_time_by_seconds():
    """Half a second a step at 2 positions a second: 1 apart. 0.75 s: 1.5, truncated: 0, 1, 3. 4 s: 8 apart."""
    for seconds, times in ((0.5, [1, 2, 3]), (0.75, [1, 2, 4]), (4.0, [1, 9, 17])):
        prompt = prompt_of([1, *[VIDEO] * 3, 3], videos=[[3, 2, 2]], seconds=[seconds])
        after = max(times) + 1
        assert table(prompt, SPEC_2_5) == ([[0, *times, after], [0, 1, 1, 1, after], [0, 1, 1, 1, after]], after + 1)


def test_qwen3_has_a_run_for_each_time_step_and_counts_the_text_between():
    """A stamp of two tokens and a start mark before each of two time steps of 1 x 2 merged patches, an end mark after.

    A run starts after the text before it; its time is one position, and the end mark follows its larger side, 2.
    """
    step = [1, 1, 2, VIDEO, VIDEO, 3]
    prompt = prompt_of([*step, *step, 4], videos=[[2, 2, 4]], seconds=[1.0])
    expected = [
        [0, 1, 2, 3, 3, 5, 6, 7, 8, 9, 9, 11, 12],
        [0, 1, 2, 3, 3, 5, 6, 7, 8, 9, 9, 11, 12],
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12],
    ]
    assert table(prompt, SPEC_3) == (expected, 13)


def test_two_videos_and_an_image():
    ids = [*[VIDEO] * 3, 1, *[IMAGE] * 2, *[VIDEO] * 2]
    prompt = prompt_of(ids, images=[[1, 4, 2]], videos=[[3, 2, 2], [2, 2, 2]], seconds=[1.0, 1.0])
    expected = [[0, 1, 2, 3, 4, 4, 6, 7], [0, 0, 0, 3, 4, 5, 6, 6], [0, 0, 0, 3, 4, 4, 6, 6]]
    assert table(prompt, SPEC) == (expected, 8)


@pytest.mark.parametrize(
    ("ids", "videos"),
    [([VIDEO] * 3, [[2, 2, 2]]), ([VIDEO], [[2, 2, 2]]), ([1], [[1, 2, 2]]), ([VIDEO, 1, VIDEO], [[2, 2, 2]])],
)
def test_placeholders_that_do_not_fit_the_grids_are_refused(ids, videos):
    """A cut prompt must never pass."""
    with pytest.raises(ValueError, match="t:1"):
        prompt_positions(prompt_of(ids, videos=videos, seconds=[1.0]), SPEC)


@pytest.mark.parametrize("ids", [[VIDEO] * 3, [VIDEO], [1], [VIDEO, 1, 1], [VIDEO, 1, VIDEO, 1, VIDEO]])
def test_runs_that_do_not_fit_the_grids_are_refused(ids):
    """Two time steps of one merged patch are two runs of one placeholder, whatever stands between them."""
    with pytest.raises(ValueError, match="t:1"):
        prompt_positions(prompt_of(ids, videos=[[2, 2, 2]], seconds=[1.0]), SPEC_3)
    assert prompt_positions(prompt_of([VIDEO, 1, VIDEO], videos=[[2, 2, 2]], seconds=[1.0]), SPEC_3)[1] == 3


SHORT = [
    [],
    [("image", (1, 4, 4))],
    [("video", (2, 4, 6))],
    [("video", (2, 4, 4)), ("image", (1, 6, 4)), ("video", (2, 6, 4))],
]


@pytest.mark.parametrize("kinds", SHORT, ids=["text", "image", "video", "two videos and an image"])
def test_equal_to_the_library_where_both_rules_agree(tiny, kinds):
    assert_equal_to_the_library(*tiny, kinds)


def test_qwen3_is_equal_to_the_library_on_a_long_video_too(checkpoints):
    """No run has more than one time step, so the rule that transformers 5 departs from makes no difference."""
    assert_equal_to_the_library(*load_pair(checkpoints["qwen3_vl"]), PROMPT_KINDS["long small video"])


def test_the_library_lets_text_overlap_a_long_video(checkpoints):
    """After 9 time steps of 2 x 2 patches transformers 5 places the text 1 after the first step, transformers 4.57 and
    this project after the last. If this fails, transformers has the rule of the weights again."""
    with pytest.raises(AssertionError):
        assert_equal_to_the_library(*load_pair(checkpoints["qwen2_vl"]), PROMPT_KINDS["long small video"])


def assert_equal_to_the_library(policy, naive, tokenizer, kinds):
    """Half a second a step is one position apart in Qwen2.5-VL, as in Qwen2-VL."""
    videos = any(kind == "video" for kind, _ in kinds)
    if videos and naive.config.model_type == "qwen2_5_vl" and transformers.__version__.startswith("5.17."):
        pytest.skip("transformers 5.17 rounds the seconds of a step down, to 0")
    prompt = make_prompt(tokenizer, kinds)
    prompt.seconds_per_grid = [0.5] * len(prompt.seconds_per_grid)
    types = torch.zeros_like(prompt.input_ids)
    types[prompt.input_ids == policy.spec.image_token_id] = 1
    types[prompt.input_ids == policy.spec.video_token_id] = 2
    expected, deltas = naive.model.get_rope_index(
        prompt.input_ids[None], image_grid_thw=prompt.image_grid_thw, video_grid_thw=prompt.video_grid_thw,
        mm_token_type_ids=types[None], attention_mask=torch.ones_like(types)[None],
        second_per_grid_ts=torch.tensor(prompt.seconds_per_grid),
    )  # fmt: skip
    positions, after = prompt_positions(prompt, policy.spec)
    assert torch.equal(positions, expected[-3:, 0])
    assert after == int(deltas) + len(prompt.input_ids)
