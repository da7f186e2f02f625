"""Positions against tables written out by hand, for both families, and against the library where both rules agree."""

import pytest
import torch
from conftest import load_pair, make_prompt

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


SPEC, SPEC_2_5 = spec_of("qwen2_vl"), spec_of("qwen2_5_vl", tokens_per_second=2)


def prompt_of(ids, images=None, videos=None, seconds=()):
    grid = lambda g: None if g is None else torch.tensor(g)
    return Prompt(Sample("t:1", "?", "A"), torch.tensor(ids), None, grid(images), None, grid(videos), list(seconds))


def table(prompt, spec):
    positions, after = prompt_positions(prompt, spec)
    return positions.tolist(), after


def test_text():
    assert table(prompt_of([1, 2, 3]), SPEC) == ([[0, 1, 2]] * 3, 3)


def test_image():
    # Two words, 2 x 3 merged patches, one word. The word follows the largest position, 2 + 2, of the image.
    prompt = prompt_of([1, 2, *[IMAGE] * 6, 3], images=[[1, 4, 6]])
    expected = [[0, 1, 2, 2, 2, 2, 2, 2, 5], [0, 1, 2, 2, 2, 3, 3, 3, 5], [0, 1, 2, 3, 4, 2, 3, 4, 5]]
    assert table(prompt, SPEC) == (expected, 6)
    assert table(prompt, SPEC_2_5) == (expected, 6)


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


SHORT = [
    [],
    [("image", (1, 4, 4))],
    [("video", (2, 4, 6))],
    [("video", (2, 4, 4)), ("image", (1, 6, 4)), ("video", (2, 6, 4))],
]


@pytest.mark.parametrize("kinds", SHORT, ids=["text", "image", "video", "two videos and an image"])
def test_equal_to_the_library_where_both_rules_agree(checkpoints, kinds):
    policy, naive, tokenizer = load_pair(checkpoints["qwen2_vl"])
    prompt = make_prompt(tokenizer, kinds)
    types = torch.zeros_like(prompt.input_ids)
    types[prompt.input_ids == policy.spec.image_token_id] = 1
    types[prompt.input_ids == policy.spec.video_token_id] = 2
    expected, deltas = naive.model.get_rope_index(
        prompt.input_ids[None], image_grid_thw=prompt.image_grid_thw, video_grid_thw=prompt.video_grid_thw,
        mm_token_type_ids=types[None], attention_mask=torch.ones_like(types)[None],
    )  # fmt: skip
    positions, after = prompt_positions(prompt, policy.spec)
    assert torch.equal(positions, expected[-3:, 0])
    assert after == int(deltas) + len(prompt.input_ids)
