"""The clips of demo/grounding.py: answers are what the frames show, and the words alone allow little."""

import itertools

import numpy as np
import pytest

from demo.grounding import FPS, LONGEST, SECONDS, make_grounding, questions, random_shape, thought
from demo.synthetic import COLOURS
from grpo.config import parse_config
from rewards.grounding import read_span, span_iou
from rewards.think_format import think_format
from video.dataset import read_samples
from video.frames import VideoSettings, read_video

PARTS = {"train": 1, "val": 12, "warmup": 4}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grounding")
    make_grounding(folder, 3, PARTS)
    return folder


def test_a_shape_is_seen_in_the_seconds_of_its_answer_and_in_no_other(made):
    """In the decoded video, by the colour of the question."""
    settings = VideoSettings(nframes=SECONDS * FPS, min_pixels=784, max_pixels=784)
    palette = np.array(list(COLOURS.values()))
    for sample in read_samples(made / "data/val.jsonl"):
        asked = list(COLOURS).index(sample.problem.split()[3])
        frames = read_video(sample.videos[0], settings, 28)[0].permute(0, 2, 3, 1).numpy().astype(int)
        nearest = ((frames[..., None, :] - palette) ** 2).sum(-1).argmin(-1)
        seen = ((nearest == asked) & (frames.max(-1) > 150)).sum((1, 2)) >= 9
        start, end = (int(time) for time in read_span(sample.answer))
        assert seen.tolist() == [start * FPS <= frame < end * FPS for frame in range(SECONDS * FPS)], sample.key


def test_the_best_answer_without_the_video():
    """Over all clips: "2 to 7" overlaps by 0.279 in the mean, and no answer by more."""
    lengths = range(1, LONGEST + 1)
    weights = {(s, s + n): 1 / LONGEST / (SECONDS - n + 1) for n in lengths for s in range(SECONDS - n + 1)}
    mean = lambda guess: sum(weight * span_iou(guess, span) for span, weight in weights.items())
    guesses = {guess: mean(guess) for guess in itertools.combinations(range(SECONDS + 1), 2)}
    assert guesses[2, 7] == pytest.approx(max(guesses.values())) == pytest.approx(0.279, abs=5e-4)

    drawn = [*map(random_shape, itertools.repeat(np.random.default_rng(0), 1500))]
    assert {(one.start, one.end) for one in drawn} == set(weights)
    by_words = {}  # what the question says and its clip's times are independent
    for one in drawn:
        by_words.setdefault(one.colour, []).append((one.start, one.end))
    for spans in by_words.values():
        assert np.mean(spans, 0) == pytest.approx([3.0, 5.0], abs=0.3)  # four standard errors


def test_the_warm_up_tells_no_time_of_a_named_shape(made):
    """Its answers to such a question overlap the true one as chance does, by 0.189 in the mean."""
    rng = np.random.default_rng(0)
    drawn = [*map(random_shape, itertools.repeat(rng, 600))]
    rows = [questions(rng, shown, "warmup") for shown in drawn]
    spans = [[read_span(text) for text in named["completions"]] for named, _ in rows]
    overlaps = [span_iou(span, (shown.start, shown.end)) for shown, own in zip(drawn, spans) for span in own]
    assert len(overlaps) == 2400 and np.mean(overlaps) == pytest.approx(0.189, abs=0.03)
    for shown, (_, anything) in zip(drawn, rows):
        said = [str(second) if shown.start <= second < shown.end else "-" for second in range(SECONDS)]
        assert anything["completions"] == [f"<think> {' '.join(said)}</think><answer>seen</answer>"]
    for sample in read_samples(made / "data/warmup.jsonl"):
        for text in sample.completions:
            assert think_format(text, sample) == 1
            if span := read_span(text[text.index("<answer>") :]):
                assert text.startswith(thought(range(*map(int, span))))


def test_made_once_and_the_same_again(made, tmp_path):
    before = (made / "data/val.jsonl").stat().st_mtime_ns
    make_grounding(made, 3, PARTS)
    assert (made / "data/val.jsonl").stat().st_mtime_ns == before
    make_grounding(tmp_path, 4, PARTS)
    make_grounding(tmp_path, 3, PARTS)
    for name in ("val.jsonl", "warmup.jsonl", "videos/val_00003.mp4"):
        assert (tmp_path / "data" / name).read_bytes() == (made / "data" / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "made.json", "start"]


def test_the_settings_name_what_is_made():
    config = parse_config(["--config", "demo/grounding.yaml"])
    assert (config.model, config.data) == ("runs/grounding/start", ("runs/grounding/data/train.jsonl",))
    assert config.nframes == SECONDS * FPS and not config.demo
