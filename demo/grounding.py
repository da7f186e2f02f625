"""Clips that ask when a shape is seen, and a tiny model to answer: `python -m demo.grounding` makes both, once.

A clip of eight seconds shows a shape for one to three whole seconds, and nothing else. The words of the question say
nothing about the time: of all answers that need no video, "2 to 7" overlaps most, by 0.279 in the mean over all clips.
A thought writes down second by second whether the shape is seen, and the answer follows from the thought:
`<think> - - 2 3 - - - -</think><answer>2 to 4</answer>`.

The warm-up teaches this form with spans drawn by chance, and to write down when *anything* is seen. It never answers a
question for a named shape by the time at which that is seen: GRPO finds out.
"""

import argparse
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from demo.synthetic import COLOURS, FPS, SHAPES, SIDE, inside, make_once, write_parts
from demo.tiny import CHAT_WORDS, build_tiny_model

SECONDS = 8  # of a clip; FPS is 2, and two frames are one time step of the model
LONGEST = 3  # seconds that a shape is seen
RADIUS = 0.2  # of a shape, relative to the side
TARGETS = 4  # answers, all by chance, that the warm-up gives to a question for a named shape
PARTS = {"train": 1024, "val": 200, "warmup": 768}  # clips, with one question each, in the warm-up two


@dataclass(frozen=True)
class Shown:
    """What a clip shows, and when."""

    colour: str
    shape: str
    start: int  # second
    end: int
    centre: tuple[float, float]  # (x, y), in pixels


def random_shape(rng: np.random.Generator) -> Shown:
    """Every length is equally likely, and every start at which it fits."""
    length = int(rng.integers(1, LONGEST + 1))
    start = int(rng.integers(0, SECONDS - length + 1))
    x, y = rng.uniform(RADIUS, 1 - RADIUS, size=2) * SIDE
    return Shown(str(rng.choice(tuple(COLOURS))), str(rng.choice(SHAPES)), start, start + length, (float(x), float(y)))


def draw(shown: Shown, background: np.ndarray) -> np.ndarray:
    """The frames of a clip, uint8 (T, H, W, 3)."""
    frames = np.full((SECONDS * FPS, SIDE, SIDE, 3), background, np.uint8)
    covered = inside(shown.shape, shown.centre, RADIUS * SIDE)
    frames[shown.start * FPS : shown.end * FPS, covered] = COLOURS[shown.colour]
    return frames


def thought(seconds: range) -> str:
    """range(2, 4) -> "<think> - - 2 3 - - - -</think>" """
    return "<think>" + "".join(f" {s}" if s in seconds else " -" for s in range(SECONDS)) + "</think>"


def questions(rng: np.random.Generator, shown: Shown, part: str) -> list[dict]:
    """The rows about a clip, without its video."""
    row = {
        "problem": f"When does the {shown.colour} {shown.shape} appear?",
        "solution": f"<answer>{shown.start} to {shown.end}</answer>",
        "problem_type": "temporal grounding",
        "duration": float(SECONDS),
    }
    if part != "warmup":
        return [row]
    chance = [random_shape(rng) for _ in range(TARGETS)]
    by_chance = [f"{thought(range(s.start, s.end))}<answer>{s.start} to {s.end}</answer>" for s in chance]
    seen = f"{thought(range(shown.start, shown.end))}<answer>seen</answer>"
    anything = {"problem": "Is anything seen?", "solution": "<answer>seen</answer>", "problem_type": "free-form"}
    return [row | {"completions": by_chance}, anything | {"completions": [seen]}]


def clips(rng: np.random.Generator, part: str, count: int) -> Iterator[tuple[tuple, list[dict]]]:
    """Yields for each of `count` clips of a part what `draw` takes, and its rows."""
    for _ in range(count):
        shown, background = random_shape(rng), rng.integers(0, 30, size=3)
        yield (shown, background), questions(rng, shown, part)


def make_grounding(folder: Path, seed: int, parts: dict[str, int] = PARTS) -> None:
    """Writes `folder`/data and `folder`/start, the model, unless they are there, of this code and seed."""
    code = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()

    def make(aside: Path) -> None:
        rows = write_parts(aside / "data", seed, parts, clips, draw)
        texts = {text for row in rows for text in (row["problem"], *row.get("completions", ()))}
        corpus = " ".join((CHAT_WORDS, *sorted(texts)))
        build_tiny_model(aside / "start", seed=seed, corpus=corpus, vision={"patch_std": 0.03})

    make_once(folder / "made.json", json.dumps({"seed": seed, "parts": parts, "code": code}), ("data", "start"), make)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="demo.grounding", description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="runs/grounding", help="Folder of the clips and the model [%(default)s].")
    parser.add_argument("--seed", type=int, default=42, help="Seed of both [%(default)s].")
    given = parser.parse_args(arguments)
    make_grounding(Path(given.output), given.seed)
    print(f"{given.output}: clips and model are there; next: python train.py --config demo/grounding.yaml")


if __name__ == "__main__":
    main()
