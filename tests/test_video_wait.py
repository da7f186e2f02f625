"""How long a trainer waits for its data: 720p h264 decoded ahead while a step computes.

python tests/test_video_wait.py     measures the share of waiting in steps of 2 s
"""

import sys
import time
from pathlib import Path

import numpy as np
import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from video_helpers import encode

from demo.tiny import build_tiny_model
from video.formats import Sample
from video.frames import VideoSettings
from video.loader import PromptLoader
from video.prompt import Prompt, PromptEncoder


def make_720p(path: Path, seconds: int, seed: int) -> str:
    """h264 of 30 frames a second with motion in it, so that a frame costs what real ones cost."""
    rng = np.random.default_rng(seed)
    scene = rng.integers(0, 255, (90, 200, 3), dtype=np.uint8).repeat(8, axis=0).repeat(8, axis=1)
    return encode(path, (scene[:, 4 * n % 320 : 4 * n % 320 + 1280] for n in range(30 * seconds)), rate=30)


def measure(folder: Path, videos: int, seconds: int, steps: int, compute: float, prompts: int = 1):
    """(seconds waited for each step's batch, seconds of all steps); a step computes for `compute` seconds."""
    paths = [make_720p(folder / f"{n}.mp4", seconds, n) for n in range(videos)]
    encoder = PromptEncoder(str(build_tiny_model(folder / "tiny")), VideoSettings())
    samples = [Sample(f"d:{n}", "What?", "A", videos=(paths[n % videos],)) for n in range(steps * prompts)]
    waits, began = [], time.perf_counter()
    with PromptLoader(encoder, workers=2) as loader:
        batches = loader.batches(samples[n : n + prompts] for n in range(0, len(samples), prompts))
        asked = time.perf_counter()
        for batch in batches:
            waits.append(time.perf_counter() - asked)
            assert all(isinstance(item, Prompt) for item in batch), batch
            time.sleep(compute)
            asked = time.perf_counter()
    return waits, time.perf_counter() - began


@pytest.mark.slow
def test_a_trainer_waits_below_two_percent_after_the_first_step(tmp_path):
    waits, _ = measure(tmp_path, videos=2, seconds=10, steps=6, compute=2.0)
    assert sum(waits[1:]) < 0.02 * (sum(waits[1:]) + 5 * 2.0), waits


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        waits, total = measure(Path(folder), videos=4, seconds=20, steps=15, compute=2.0)
        share = sum(waits[1:]) / (sum(waits[1:]) + 2.0 * len(waits[1:]))
        print(
            f"waited {waits[0]:.2f} s for the first step, then {sum(waits[1:]):.3f} s "
            f"in {len(waits) - 1} steps of 2 s: "
            f"{share:.2%}; longest {max(waits[1:]):.3f} s"
        )
