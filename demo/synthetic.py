"""The demo set: mp4 videos of a moving shape, with four-option questions some of which only time can answer.

What a still picture may tell. The middle of the path is drawn from one distribution for all four directions, so the
set of frames without their order (mean frame, shuffled frames) says which axis at most, never which way along it; and a
video played backwards is distributed exactly as one of the opposite direction. No motion can hide its direction from
the path's middle and from its start at once: their difference *is* the direction. So the first frame alone allows 84%
(best guess from its position, of four ways), a middle one 34%: travel is short against the room.
"""

import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import av
import numpy as np

COLOURS = {"red": (225, 40, 40), "green": (40, 205, 70), "blue": (50, 90, 240), "yellow": (240, 220, 50)}
SHAPES = ("square", "circle", "triangle", "cross")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # x to the right, y down
PLACES = {"west": (-1, 0), "east": (1, 0), "north": (0, -1), "south": (0, 1)}  # no word that names a direction
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}
QUESTIONS = {
    "direction": "Which direction does the shape move?",
    "order": "Which colour comes first?",
    "place": "Where is the shape?",
    "colour": "What colour is the shape?",
    "shape": "What shape is it?",
}
LETTERS = "ABCD"
RADIUS = 0.12  # of a shape, relative to the side of the video
TRAVEL = (0.35, 0.50)  # first to last frame, relative to the side: no longer, or the first frame tells the direction
MANIFEST = "demo.json"  # written last: a folder that has it is complete


@dataclass(frozen=True)
class DemoSpec:
    """What determines a demo set, byte for byte (with one version of the encoder)."""

    seed: int = 0
    size: int = 28  # side of the square videos, in pixels; even, as h264 requires
    frames: int = 8
    fps: int = 2
    kinds: tuple[str, ...] = ("direction",)  # the kinds that RL trains: "direction", "order"
    train: int = 1024  # questions, one a video, spread evenly over `kinds`
    val: int = 256  # held-out videos of each of `kinds`; the first kind's are also asked for colour and shape
    warmup: int = 768  # videos of the warm-up, spread evenly over `kinds`

    def __post_init__(self):
        if self.size < 16 or self.size % 2:
            raise ValueError(f"demo size must be even and 16 or more, got {self.size}")
        if self.frames < 2 or self.fps < 1 or min(self.train, self.val, self.warmup) < 1:
            raise ValueError("demo sets need 2 or more frames, fps of 1 or more and a video in each part")
        if not self.kinds or not set(self.kinds) <= {"direction", "order"}:
            raise ValueError(f"demo kinds must be some of direction, order; got {self.kinds}")


def make_demo_set(folder: str | Path, spec: DemoSpec = DemoSpec()) -> dict[str, Path]:
    """Writes videos and rows under `folder`; returns the paths of train.jsonl, val.jsonl and warmup.jsonl by name.

    No video is in two parts. A complete folder of the same `spec` is used again; anything else there called `videos`
    is replaced, once the new set is complete. Rows are in the open-r1-video-4k form, plus `kind`, `opposite` (letter of
    the answer if time ran backwards; absent where time does not matter) and, in the warm-up, `completions`.
    """
    folder = Path(folder)
    paths = {part: folder / f"{part}.jsonl" for part in ("train", "val", "warmup")}
    manifest, text = folder / MANIFEST, json.dumps(asdict(spec), sort_keys=True)
    is_complete = lambda: manifest.is_file() and manifest.read_text() == text and all(map(Path.is_file, paths.values()))
    if is_complete():
        return paths
    folder.mkdir(parents=True, exist_ok=True)
    makers = {"train": train_rows, "val": val_rows, "warmup": warmup_rows}
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}-", dir=folder.parent) as name:
        aside = Path(name)
        (aside / "videos").mkdir()
        for number, (part, maker) in enumerate(makers.items()):
            rows = []
            for index, (scene, scene_rows) in enumerate(maker(np.random.default_rng([spec.seed, number]), spec)):
                video = f"videos/{part}_{index:05d}.mp4"
                write_video(aside / video, draw(scene, spec), spec.fps)
                rows += [{**row, "video": video} for row in scene_rows]
            (aside / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if is_complete():  # another process was quicker, and its set is in use
            return paths
        manifest.unlink(missing_ok=True)
        if (folder / "videos").exists():
            os.replace(folder / "videos", aside / "replaced")
        for made in ("videos", *(path.name for path in paths.values())):
            os.replace(aside / made, folder / made)
        manifest.write_text(text)
    return paths


@dataclass(frozen=True)
class Scene:
    """What a video shows. Positions are (x, y) of the centre in pixels."""

    kind: str  # "direction": one shape that moves; "place": one that is still; "order": two still ones in turn
    colours: tuple[str, ...]
    shapes: tuple[str, ...]
    direction: str  # or place
    centres: tuple[tuple[float, float], ...]  # of each frame
    background: tuple[int, int, int]


def train_rows(rng, spec: DemoSpec):
    """Yields (scene, rows) of the training set: one question a video, of a kind that RL trains."""
    for index in range(spec.train):
        kind = spec.kinds[index % len(spec.kinds)]
        scene = random_scene(rng, spec, kind, index // len(spec.kinds))
        yield scene, [question(rng, scene, kind, index // (4 * len(spec.kinds)))]


def val_rows(rng, spec: DemoSpec):
    """Yields (scene, rows) of the held-out set; each kind has `spec.val` questions (colour and shape as well)."""
    for kind in (*spec.kinds, "place"):
        asked = (kind, "colour", "shape") if kind == "direction" else (kind,)
        for index in range(spec.val):
            scene = random_scene(rng, spec, kind, index)
            yield scene, [question(rng, scene, name, index // 4) for name in asked]


def warmup_rows(rng, spec: DemoSpec):
    """Yields (scene, rows) of the warm-up: the form of an answer, and nothing of the trained kinds' truth.

    A question of a trained kind gets a completion for *each* option, with the letter that the named option has; a
    question for the colour, of the same video, gets its true one, and so does a question for the place of a shape that
    does not move: what a pretrained model would know how to see.
    """
    for index in range(spec.warmup):
        kind = spec.kinds[index % len(spec.kinds)]
        scene = random_scene(rng, spec, kind, index // len(spec.kinds))
        row = question(rng, scene, kind, index // (4 * len(spec.kinds)))
        names = [option[3:] for option in row["options"]]
        rows = [{**row, "completions": [completion(name, letter) for name, letter in zip(names, LETTERS)]}]
        if kind == "direction":
            rows.append(answered(question(rng, scene, "colour", index // 4)))
        yield scene, rows
        still = random_scene(rng, spec, "place", index)
        yield still, [answered(question(rng, still, "place", index // 4))]


def answered(row: dict) -> dict:
    """The row with its true answer as the one completion."""
    letter, _, name = row["original_answer"].partition(". ")
    return {**row, "completions": [completion(name, letter)]}


def completion(name: str, letter: str) -> str:
    """A thought that names an option, and the letter of that option."""
    return f"<think>I see {name} .</think><answer>{letter}</answer>"


def question(rng, scene: Scene, kind: str, turn: int) -> dict:
    """A row without its video. The answer's place among the options is `turn` modulo 4, so letters are balanced."""
    answer, others, opposite = {
        "direction": lambda: (scene.direction, tuple(DIRECTIONS), OPPOSITE[scene.direction]),
        "order": lambda: (scene.colours[0], tuple(COLOURS), scene.colours[-1]),
        "place": lambda: (scene.direction, tuple(PLACES), None),
        "colour": lambda: (scene.colours[0], tuple(COLOURS), None),
        "shape": lambda: (scene.shapes[0], SHAPES, None),
    }[kind]()
    options = [str(name) for name in rng.permutation([name for name in others if name != answer])]
    options.insert(turn % 4, answer)
    letter = dict(zip(options, LETTERS))
    lines = [f"{letter[name]}. {name}" for name in options]
    row = {
        "problem": "\n".join((QUESTIONS[kind], *lines)),
        "solution": f"<answer>{letter[answer]}</answer>",
        "original_question": QUESTIONS[kind],
        "original_answer": f"{letter[answer]}. {answer}",
        "options": lines,
        "problem_type": "multiple choice",
        "category": kind,
    }
    if kind == "direction":
        row["direction"] = scene.direction
    return row if opposite is None else {**row, "opposite": letter[opposite]}


def random_scene(rng, spec: DemoSpec, kind: str, turn: int) -> Scene:
    """A scene of `kind`. Directions (and first colours of "order") take turns, the rest is drawn at random.

    One rule draws the path's middle whatever the direction: uniform where the whole path would fit along either axis.
    """
    direction, half = "", 0.0
    colours, shapes = (str(rng.choice(tuple(COLOURS))),), (str(rng.choice(SHAPES)),)
    if kind == "direction":
        direction = tuple(DIRECTIONS)[turn % 4]
        half = rng.uniform(*TRAVEL) * spec.size / 2
    elif kind == "order":
        first = tuple(COLOURS)[turn % 4]
        colours = (first, str(rng.choice([name for name in COLOURS if name != first])))
        shapes = (str(rng.choice(SHAPES)), str(rng.choice(SHAPES)))
    margin = RADIUS * spec.size + half
    middle = rng.uniform(margin, spec.size - margin, size=2)
    if kind == "place":
        direction = tuple(PLACES)[turn % 4]
        away = rng.uniform(*TRAVEL) * spec.size / 2
        middle = spec.size / 2 + away * np.array(PLACES[direction]) + rng.uniform(-1, 1, size=2) * spec.size / 16
    step = np.array(DIRECTIONS.get(direction, (0, 0)))
    ways = np.linspace(-half, half, spec.frames)
    centres = tuple((float(x), float(y)) for x, y in middle + ways[:, None] * step)
    background = tuple(int(level) for level in rng.integers(0, 30, size=3))
    return Scene(kind, colours, shapes, direction, centres, background)


def draw(scene: Scene, spec: DemoSpec) -> np.ndarray:
    """The frames of a scene, uint8 (T, H, W, 3)."""
    video = np.empty((spec.frames, spec.size, spec.size, 3), np.uint8)
    video[:] = scene.background
    grid = np.arange(spec.size) + 0.5  # centres of pixels
    for number, (x, y) in enumerate(scene.centres):
        part = number * len(scene.colours) // spec.frames  # "order": the first half shows the first shape
        dx, dy = (grid[None, :] - x), (grid[:, None] - y)
        video[number][inside(scene.shapes[part], dx, dy, RADIUS * spec.size)] = COLOURS[scene.colours[part]]
    return video


def inside(shape: str, dx: np.ndarray, dy: np.ndarray, radius: float) -> np.ndarray:
    """Which pixels, given by their distance from the centre, a shape of this radius covers: bool (H, W)."""
    if shape == "square":
        return (abs(dx) <= radius) & (abs(dy) <= radius)
    if shape == "circle":
        return dx**2 + dy**2 <= radius**2
    if shape == "triangle":
        return (abs(dy) <= radius) & (2 * abs(dx) <= dy + radius)
    return ((abs(dx) <= radius / 3) & (abs(dy) <= radius)) | ((abs(dy) <= radius / 3) & (abs(dx) <= radius))


def write_video(path: Path, frames: np.ndarray, fps: int) -> None:
    """Encodes uint8 frames (T, H, W, 3) as h264 in mp4, at a quality that keeps small shapes' colours."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"preset": "ultrafast", "crf": "8"})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        stream.codec_context.thread_count = 1  # so that the same frames give the same bytes on any machine
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
