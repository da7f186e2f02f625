"""A demo of temporal grounding: mp4 videos in which a shape is seen for a while, and the question when that is.

Whoever does not see the video can do no better than the best constant answer, "2.5 to 5.5", whose mean overlap with
the truth is BLIND.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from demo.synthetic import COLOURS, FPS, SHAPES, SIDE, DemoSpec, inside

FRAMES = 16  # of a video, which lasts 8 s
RADIUS = 0.25  # of the shape, relative to the side
LENGTHS = (3, 6)  # frames that show the shape: from 1.5 s to 3 s
GUESSES = 4  # completions of a question of the warm-up


@dataclass(frozen=True)
class GroundingSpec(DemoSpec):
    """What determines a set, byte for byte (with one version of the encoder); each video has one question."""

    train: int = 2048
    val: int = 200
    warmup: int = 512

    def clips(self, rng: np.random.Generator, part: str) -> Iterator[tuple[np.ndarray, list[dict]]]:
        for _ in range(getattr(self, part)):
            colour, shape, span = str(rng.choice(tuple(COLOURS))), str(rng.choice(SHAPES)), random_span(rng)
            row = {
                "problem": f"When does the {colour} {shape} appear?",
                "solution": f"<answer>{as_words(span)}</answer>",
                "problem_type": "temporal grounding",
                "duration": FRAMES / FPS,
            }
            if part == "warmup":
                row["completions"] = [f"<answer>{as_words(random_span(rng))}</answer>" for _ in range(GUESSES)]
            yield draw_span(rng, colour, shape, span), [row]


def random_span(rng: np.random.Generator) -> tuple[int, int]:
    """(first frame with the shape, first frame without it again), of a length within LENGTHS."""
    length = int(rng.integers(LENGTHS[0], LENGTHS[1] + 1))
    start = int(rng.integers(0, FRAMES - length + 1))
    return start, start + length


def as_words(span: tuple[int, int]) -> str:
    """in: frames (2, 7) at 2 frames a second; out: "1.0 to 3.5"."""
    return f"{span[0] / FPS} to {span[1] / FPS}"


def draw_span(rng: np.random.Generator, colour: str, shape: str, span: tuple[int, int]) -> np.ndarray:
    """The frames of a video, uint8 (FRAMES, SIDE, SIDE, 3): a shape that stands still from span[0] until span[1]."""
    x, y = rng.uniform(RADIUS * SIDE, SIDE - RADIUS * SIDE, size=2)
    video = np.empty((FRAMES, SIDE, SIDE, 3), np.uint8)
    video[:] = rng.integers(0, 30, size=3)
    grid = np.arange(SIDE) + 0.5  # centres of pixels
    video[span[0] : span[1], inside(shape, grid[None, :] - x, grid[:, None] - y, RADIUS * SIDE)] = COLOURS[colour]
    return video
