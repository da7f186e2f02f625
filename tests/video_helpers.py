"""What the video tests share: small real videos, and encoders that misbehave inside a worker process."""

import os
import time
from pathlib import Path

import numpy as np
import torch

from video.dataset import Sample
from video.frames import VideoSettings
from video.prompt import Prompt
from video.synthetic import write_video

SMALL = VideoSettings(nframes=8, min_pixels=28 * 28, max_pixels=4 * 28 * 28)


def blocks(frames: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Frames (T, H, W, 3) of coloured blocks, all different, so that a wrong frame number shows in the pixels."""
    coarse = np.random.default_rng(seed).integers(0, 255, (frames, -(-height // 8), -(-width // 8), 3), dtype=np.uint8)
    return coarse.repeat(8, axis=1).repeat(8, axis=2)[:, :height, :width]


def make_video(path: Path, frames: int = 8, height: int = 28, width: int = 28, fps: int = 2, seed: int = 0) -> str:
    write_video(path, blocks(frames, height, width, seed), fps)
    return str(path)


def make_broken(folder: Path) -> dict[str, str]:
    """Files that cannot be read, by name: what happens to downloads."""
    whole = Path(make_video(folder / "whole.mp4", frames=40, height=64, width=96, fps=10)).read_bytes()
    contents = {
        "truncated": whole[: len(whole) // 2],
        "text": b"not a video\n" * 50,
        "zero_bytes": b"",
        "zeroed_span": whole[:2000] + bytes(len(whole) - 5000) + whole[-3000:],
    }
    paths = {}
    for name, content in contents.items():
        paths[name] = str(folder / f"{name}.mp4")
        Path(paths[name]).write_bytes(content)
    return paths | {"missing": str(folder / "missing.mp4"), "folder": str(folder)}


class Misbehaving:
    """An encoder that obeys the sample's text: dies, sleeps, raises, or answers at once."""

    def __call__(self, sample: Sample, control: str | None) -> Prompt:
        if sample.problem == "die":
            os._exit(17)
        if sample.problem == "sleep":
            time.sleep(600)
        if sample.problem == "raise":
            raise RuntimeError("broken\nfor good")
        if sample.problem == "slow":
            time.sleep(0.2)
        return Prompt(sample, torch.tensor([torch.get_num_threads(), os.getpid()]), None, None, None, None, [])
