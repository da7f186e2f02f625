"""The demo set: mp4 videos of a coloured shape, with four-option questions, some of which only time can answer.

What a single frame reveals: the middle of the path has one distribution for all four directions. So the set of frames
without their order (mean frame, shuffled frames) tells the axis at most, never which way along it; and a reversed video
is distributed exactly like a video of the opposite direction. No motion can hide its direction from both the middle and
the start of its path, because their difference *is* the direction. So the first frame alone allows 84% (the best guess
of the direction from the shape's position), a middle frame 34%: the path is short compared with the video's side.
"""

import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import av
import numpy as np

from video.pool import WorkerPool

SIDE, FRAMES, FPS = 28, 8, 2  # of every video; SIDE in pixels, even as h264 requires
RADIUS = 0.12  # of a shape, relative to the side
TRAVEL = (0.35, 0.50)  # first to last frame, relative to the side; if longer, the first frame tells the direction
COLOURS = {"red": (225, 40, 40), "green": (40, 205, 70), "blue": (50, 90, 240), "yellow": (240, 220, 50)}
SHAPES = ("square", "circle", "triangle", "cross")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # (x, y): x to the right, y down
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}
PLACES = {"west": (-1, 0), "east": (1, 0), "north": (0, -1), "south": (0, 1)}  # no word that names a direction
LETTERS = "ABCD"
QUESTIONS = {  # by category: what is asked, and the four options
    "direction": ("Which direction does the shape move?", tuple(DIRECTIONS)),
    "place": ("Where is the shape?", tuple(PLACES)),
    "colour": ("What colour is the shape?", tuple(COLOURS)),
    "shape": ("What shape is it?", SHAPES),
}
# What is asked about the videos of a part, in turn; a shape stands still if its place is asked. Of eight training
# questions six are for the direction; two ask what the warm-up has taught, so that it stays known.
ASKED = {
    "train": (("colour",), *[("direction",)] * 3, ("place",), *[("direction",)] * 3),
    "val": (("direction", "colour", "shape"), ("place",)),
    "warmup": (("direction", "colour"), ("place",)),
}
MANIFEST = "demo.json"  # written last: a folder that has it is complete


@dataclass(frozen=True)
class DemoSpec:
    """What determines a demo set, byte for byte (with one version of the encoder)."""

    seed: int = 0
    train: int = 2048  # videos to train on, each with one question
    val: int = 400  # held-out videos, half of which move
    warmup: int = 1536  # videos of the warm-up, half of which move


@dataclass(frozen=True)
class Scene:
    """What one video shows."""

    colour: str
    shape: str
    direction: str  # of a shape that moves; the place of a shape that stands still
    centres: tuple[tuple[float, float], ...]  # (x, y) of the shape's centre in each frame, in pixels
    background: tuple[int, int, int]


def make_demo_set(folder: str | Path, spec: DemoSpec = DemoSpec()) -> dict[str, Path]:
    """Writes videos and rows under `folder`; returns the paths of train.jsonl, val.jsonl and warmup.jsonl by name.

    No two parts share a video. If the folder already holds a complete set of the same `spec` by the same code, it is
    used again; else the new set replaces the old one, folder `videos` included, once it is complete. Rows have the
    fields of open-r1-video-4k, plus `category`; `opposite`, the letter of the answer if time ran backwards, if that is
    another; and, in the warm-up, `completions`.
    """
    paths = {part: Path(folder) / f"{part}.jsonl" for part in ASKED}
    code = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()  # of this file: an older version made other rows
    text = json.dumps(asdict(spec) | {"code": code}, sort_keys=True)
    counts = {part: getattr(spec, part) for part in paths}
    make = lambda aside: write_parts(aside, spec.seed, counts, scenes_and_questions, draw)
    make_once(Path(folder) / MANIFEST, text, ("videos", *(path.name for path in paths.values())), make)
    return paths


def make_once(manifest: Path, text: str, names: tuple[str, ...], make: Callable[[Path], None]) -> None:
    """Makes the files and folders `names` beside the file `manifest`, unless they are there and it holds `text`.

    `make` writes them to the folder that it is given; they replace older ones once they are complete.
    """
    folder = manifest.parent
    there = lambda: all((folder / name).exists() for name in (manifest.name, *names)) and manifest.read_text() == text
    if there():
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=folder) as name:
        aside = Path(name)
        make(aside)
        if there():  # another process was quicker, and what it made is in use
            return
        manifest.unlink(missing_ok=True)
        for made in names:
            if (folder / made).is_dir():
                os.replace(folder / made, aside / f"old-{made}")
            os.replace(aside / made, folder / made)
        manifest.write_text(text)


def write_parts(folder: Path, seed: int, counts: dict[str, int], scenes: Callable, draw: Callable) -> list[dict]:
    """Writes videos/PART_00000.mp4, ... and PART.jsonl for each part, and returns all rows.

    counts: how many videos each part has. scenes(rng, part, count) yields for each what `draw` takes, and its rows.
    Processes encode: threads would wait for each other, as the encoder holds Python's lock most of the time.
    """
    made = []
    (folder / "videos").mkdir(parents=True)
    with closing(WorkerPool(film, min(os.cpu_count() or 1, 8), timeout=60.0)) as pool:  # seconds for one video
        for number, (part, count) in enumerate(counts.items()):
            rows, written, rng = [], [], np.random.default_rng([seed, number])
            for index, (scene, questions) in enumerate(scenes(rng, part, count)):
                video = f"videos/{part}_{index:05d}.mp4"
                written.append(pool.submit(folder / video, draw, *scene))
                rows += [{**row, "video": video} for row in questions]
            for video in written:
                video.result()
            (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            made += rows
    return made


def scenes_and_questions(rng: np.random.Generator, part: str, count: int) -> Iterator[tuple[tuple, list[dict]]]:
    """Yields each of `count` scenes of a part, as a tuple of it alone, with its rows. Directions, places and letters
    take turns, so that all are asked equally often."""
    drawn = Counter()  # how often each entry of ASKED has had its turn
    for index in range(count):
        categories = ASKED[part][index % len(ASKED[part])]
        scene = random_scene(rng, categories != ("place",), drawn[categories])
        rows = [question(rng, scene, category, drawn[categories] // 4) for category in categories]
        drawn[categories] += 1
        yield (scene,), [{**row, "completions": completions(row)} for row in rows] if part == "warmup" else rows


def completions(row: dict) -> list[str]:
    """The targets of the warm-up, which teach the form of an answer and nothing about motion.

    A question for the direction gets one for each option: `<think> up B</think><answer>B</answer>` for "B. up". Any
    other question gets the one with its true answer, because a pretrained model would know how to see it. The letter
    stands right after its word because the tiny model then learns in half the steps which letter that is.
    """
    options = row["options"] if row["category"] == "direction" else [row["original_answer"]]
    return [f"<think> {option[3:]} {option[0]}</think><answer>{option[0]}</answer>" for option in options]


def question(rng: np.random.Generator, scene: Scene, category: str, turn: int) -> dict:
    """A row without its video. The answer's place among the options is `turn` modulo 4, so letters are balanced."""
    asked, names = QUESTIONS[category]
    answer = {"colour": scene.colour, "shape": scene.shape}.get(category, scene.direction)
    names = [str(name) for name in rng.permutation([name for name in names if name != answer])]
    names.insert(turn % 4, answer)
    letter = dict(zip(names, LETTERS))
    options = [f"{letter[name]}. {name}" for name in names]
    row = {
        "problem": "\n".join((asked, *options)),
        "solution": f"<answer>{letter[answer]}</answer>",
        "original_question": asked,
        "original_answer": f"{letter[answer]}. {answer}",
        "options": options,
        "problem_type": "multiple choice",
        "category": category,
    }
    if category == "direction":
        row["opposite"] = letter[OPPOSITE[answer]]
    return row


def random_scene(rng: np.random.Generator, moves: bool, index: int) -> Scene:
    """A shape that moves, or one that stands still; directions (or places) take turns by `index`, the rest is random.

    One rule draws the path's middle for all directions: uniform over where the path would fit along either axis.
    """
    colour, shape = str(rng.choice(tuple(COLOURS))), str(rng.choice(SHAPES))
    half = rng.uniform(*TRAVEL) * SIDE / 2 if moves else 0.0
    margin = RADIUS * SIDE + half
    middle = rng.uniform(margin, SIDE - margin, size=2)
    ways = DIRECTIONS if moves else PLACES
    direction = tuple(ways)[index % 4]
    if not moves:
        away = rng.uniform(*TRAVEL) * SIDE / 2
        middle = SIDE / 2 + away * np.array(ways[direction]) + rng.uniform(-1, 1, size=2) * SIDE / 16
    path = middle + np.linspace(-half, half, FRAMES)[:, None] * np.array(ways[direction])
    background = tuple(int(level) for level in rng.integers(0, 30, size=3))
    return Scene(colour, shape, direction, tuple((float(x), float(y)) for x, y in path), background)


def film(path: Path, draw: Callable, *scene) -> None:
    """Writes the video of the frames that draw(*scene) returns."""
    write_video(path, draw(*scene), FPS)


def draw(scene: Scene) -> np.ndarray:
    """The frames of a scene, uint8 (T, H, W, 3)."""
    video = np.full((FRAMES, SIDE, SIDE, 3), scene.background, np.uint8)
    for frame, centre in zip(video, scene.centres):
        frame[inside(scene.shape, centre, RADIUS * SIDE)] = COLOURS[scene.colour]
    return video


def inside(shape: str, centre: tuple[float, float], radius: float) -> np.ndarray:
    """Which pixels a shape covers, whose centre (x, y) and radius are in pixels: bool (SIDE, SIDE)."""
    grid = np.arange(SIDE) + 0.5  # centres of pixels
    dx, dy = grid[None, :] - centre[0], grid[:, None] - centre[1]
    if shape == "square":
        return (abs(dx) <= radius) & (abs(dy) <= radius)
    if shape == "circle":
        return dx**2 + dy**2 <= radius**2
    if shape == "triangle":
        return (abs(dy) <= radius) & (2 * abs(dx) <= dy + radius)
    return ((abs(dx) <= radius / 3) & (abs(dy) <= radius)) | ((abs(dy) <= radius / 3) & (abs(dx) <= radius))


def write_video(path: str | Path, frames: np.ndarray, fps: int) -> None:
    """Encodes uint8 frames (T, H, W, 3) as h264 in mp4, at a quality that keeps small shapes' colours."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"preset": "ultrafast", "crf": "8"})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        stream.codec_context.thread_count = 1  # the same frames then give the same bytes on any machine
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
