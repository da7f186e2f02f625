"""The demo of temporal grounding: its clips show what their rows say, and a short run of it learns."""

import json

import numpy as np
import pytest

from demo.grounding import FRAMES, LENGTHS, GroundingSpec, as_words, draw_span, random_span
from demo.synthetic import COLOURS, FPS, make_demo_set
from rewards.grounding import read_span, span_iou
from video.dataset import read_samples
from video.frames import VideoSettings, read_video

PIXELS = VideoSettings(nframes=FRAMES, min_pixels=784, max_pixels=784)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return make_demo_set(tmp_path_factory.mktemp("moments"), GroundingSpec(seed=3, train=32, val=8, warmup=16))


def test_the_shape_is_there_exactly_while_the_row_says_so(paths):
    for sample in read_samples(paths["train"]):
        frames, rate = read_video(sample.videos[0], PIXELS, 28)
        colour = next(rgb for name, rgb in COLOURS.items() if name in sample.problem)
        near = (frames.float() - np.array(colour, np.float32)[None, :, None, None]).abs().mean(1) < 60
        shown = (near.sum(dim=(1, 2)) > 20).tolist()
        start, end = read_span(sample.answer)
        assert rate == FPS and shown == [start <= n / FPS < end for n in range(FRAMES)], sample.problem


def test_spans_have_their_lengths_and_reach_both_ends():
    rng = np.random.default_rng(0)
    spans = [random_span(rng) for _ in range(2000)]
    assert {end - start for start, end in spans} == set(range(LENGTHS[0], LENGTHS[1] + 1))
    assert min(start for start, _ in spans) == 0 and max(end for _, end in spans) == FRAMES
    assert as_words((2, 7)) == "1.0 to 3.5"
    assert draw_span(rng, "red", "square", (2, 7)).shape == (FRAMES, 28, 28, 3)


def test_without_the_video_no_constant_answer_overlaps_by_more_than_a_third():
    rng = np.random.default_rng(0)
    truths = [tuple(frame / FPS for frame in random_span(rng)) for _ in range(4000)]
    answers = [(a / FPS, b / FPS) for a in range(FRAMES) for b in range(a + 1, FRAMES + 1)]
    best = max(np.mean([span_iou(answer, truth) for truth in truths]) for answer in answers)
    assert 0.32 < best < 0.35


def test_the_warm_up_teaches_the_form_alone(paths):
    """The times of its completions know nothing of the video: they overlap with the truth as chance has it."""
    rows = [json.loads(line) for line in paths["warmup"].read_text().splitlines()]
    given = [(read_span(text), read_span(row["solution"])) for row in rows for text in row["completions"]]
    assert all(row["problem_type"] == "temporal grounding" and row["duration"] == FRAMES / FPS for row in rows)
    assert all(span is not None for span, _ in given) and np.mean([span_iou(*pair) for pair in given]) < 0.4
