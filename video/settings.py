"""How videos become frames and questions become prompts: what train.py, eval.py and video.scan are told by flags.

Imports neither torch nor a decoder, so that a command line is parsed and checked at once.
"""

import argparse
from dataclasses import dataclass, fields

TEMPLATE = (
    "{problem}\n\nThink first, inside <think> </think>, "
    "then give the final answer (the option) inside <answer> </answer>."
)


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
        parser.add_argument(
            f"--{item.name}", type=number, default=item.default, help=f"As in train.py [{item.default}]."
        )
