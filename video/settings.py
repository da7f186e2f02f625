"""How videos become frames and questions become prompts: what train.py, eval.py and video.scan are told by flags.

Imports neither torch nor a decoder, so that a command line is parsed and checked at once.
"""

import argparse
from collections.abc import Iterable
from dataclasses import dataclass, fields
from difflib import get_close_matches

from video.formats import Sample

TEMPLATE = (
    "{problem}\n\nThink first, inside <think> </think>, "
    "then give the final answer ({answer_form}) inside <answer> </answer>."
)
# By problem type, what {answer_form} in a template becomes: in other words, what Video-R1 asks for (TYPE_TEMPLATE in
# github.com/tulerfeng/Video-R1 at 59d65c3, src/r1-v/src/open_r1/grpo.py) and, from "math" on, OneThinker (the same in
# github.com/tulerfeng/OneThinker at 768b20f, EasyR1/verl/utils/dataset.py). Times are asked for in Time-R1's form.
_NUMBER, _TEXT = "a number, such as 42 or 3.14", "a short text"
_BOX = "coordinates from 0 to 1000"
FORMS = {
    "multiple choice": "the option",
    "numerical": _NUMBER,
    "mra": _NUMBER,
    "regression": _NUMBER,
    "OCR": "the text as it is written",
    "free-form": _TEXT,
    "open-ended": _TEXT,
    "math": "a number or a formula",
    "temporal grounding": "the start and the end in seconds, such as 12.5 to 17.8",
    "spatial grounding": 'the box as JSON, such as {"boxes": [35, 227, 437, 932]}, with ' + _BOX,
    "spatial-temporal grounding": "the start and the end in seconds, and a box for each whole second between them, as "
    'JSON, such as {"time": [8.1, 10.4], "boxes": {"9": [317, 422, 582, 997], "10": [332, 175, 442, 369]}}, with '
    + _BOX,
    "tracking": "a box for each second, of at most 32, as JSON, such as "
    '{"boxes": {"1": [405, 230, 654, 463], "2": [435, 223, 678, 446]}}, with ' + _BOX,
}
OTHER_FORM = "the answer alone"  # of a problem type that is not in FORMS


def parse_forms(specs: Iterable[str]) -> dict[str, str]:
    """{problem type: form}: FORMS, with those of --answer_form, each TYPE=WORDS. Raises ValueError, naming the flag."""
    forms = dict(FORMS)
    for spec in specs:
        name, equals, words = spec.partition("=")
        if not (equals and name and words.strip()):
            raise ValueError(
                f'--answer_form {spec}: write TYPE=WORDS, such as "temporal grounding=two times in seconds"'
            )
        if name not in FORMS and (near := get_close_matches(name, FORMS, 1, 0.8)):
            raise ValueError(f"--answer_form {spec}: no such problem type; did you mean {near[0]}?")
        forms[name] = words
    return forms


def answer_form(sample: Sample, forms: dict[str, str] = FORMS) -> str:
    """Which form the answer must have: as the row's field `answer_form` says, else by its problem type."""
    return str(sample.meta.get("answer_form") or forms.get(sample.problem_type, OTHER_FORM))


@dataclass(frozen=True)
class VideoSettings:
    """How frames are picked and resized. Pixels are counted per frame, after resizing."""

    fps: float = 2.0  # frames taken per second of video, within min_frames and max_frames
    nframes: int | None = None  # take exactly this many frames instead (rounded to even), whatever the length
    min_frames: int = 4  # at least so many frames, if the video has them (rounded up to even)
    max_frames: int = 16  # at most so many frames (rounded down to even)
    min_pixels: int = 128 * 28 * 28  # smaller frames are enlarged to this
    max_pixels: int = 196 * 28 * 28  # larger frames are reduced to this
    total_pixels: int | None = None  # bound on frames x pixels / 2 of one video; None: 115,200 tokens' worth
    image_min_pixels: int = 4 * 28 * 28  # smaller images are enlarged to this
    image_max_pixels: int = 1280 * 28 * 28  # larger images are reduced to this

    def __post_init__(self):
        rules = (
            (self.fps > 0, "--fps must be above 0"),
            (self.nframes is None or self.nframes >= 2, "--nframes must be 2 or more"),
            (self.min_frames >= 1, "--min_frames must be 1 or more"),
            (self.max_frames >= max(2, self.min_frames), "--max_frames must be >= 2 and >= --min_frames"),
            (0 < self.min_pixels <= self.max_pixels, "--min_pixels must be above 0 and <= --max_pixels"),
            (self.total_pixels is None or self.total_pixels > 0, "--total_pixels must be above 0"),
            (0 < self.image_min_pixels <= self.image_max_pixels, "--image_min_pixels must be <= --image_max_pixels"),
        )
        for holds, message in rules:
            if not holds:
                raise ValueError(message)

    @classmethod
    def of(cls, source: object) -> "VideoSettings":
        """The settings in the attributes of `source` that bear their names, such as a parsed command line."""
        return cls(**{item.name: getattr(source, item.name) for item in fields(cls)})


def add_video_flags(parser: argparse.ArgumentParser) -> None:
    """Adds a flag for each field of VideoSettings to `parser`: "--fps 2.0"."""
    for item in fields(VideoSettings):
        number = int if "int" in str(item.type) else float
        text = f"As in train.py [{item.default}]."
        parser.add_argument(f"--{item.name}", type=number, default=item.default, help=text)
