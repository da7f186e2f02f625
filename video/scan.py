"""Reads every video and image of a data set once, and lists those that cannot be used, with reasons.

    python -m video.scan --data train.jsonl --video_root videos --output bad.jsonl
    python train.py --data train.jsonl --video_root videos --skip_list bad.jsonl

A file counts as bad if training would skip it: the same frames are decoded, in worker processes with a time limit.
"""

if __name__ == "__main__":
    from video.terminal import prepare_terminal

    prepare_terminal()  # before the slow imports

import os
import sys
from functools import partial
from pathlib import Path

from tqdm import tqdm

from video.dataset import read_mixture
from video.files import write_rows
from video.formats import DataError, Sample, printable
from video.frames import read_image, read_video
from video.loader import PromptLoader
from video.prompt import Skipped, with_clips
from video.settings import VideoSettings, add_video_flags
from video.terminal import OneLineParser, run_program

BATCH = 64  # files handed to the workers at a time
FACTOR = 28  # of Qwen2-VL; which files can be read does not depend on it


def read_files(settings: VideoSettings, sample: Sample, control: str | None = None) -> str:
    """An encoder, but for `settings`, that reads the files of a sample and returns nothing of them."""
    for path, clip in with_clips(sample):
        read_video(path, settings, FACTOR, clip)
    for path in sample.images:
        read_image(path, settings, FACTOR)
    return sample.key


def files_of(samples: list[Sample]) -> list[Sample]:
    """One sample for each file, and for each clip of it; its meta["rows"] are the keys of the rows that use it."""
    rows: dict[tuple, dict[str, None]] = {}
    for sample in samples:
        media = [("videos", path, (clip,)) for path, clip in with_clips(sample)]
        for field, path, clips in media + [("images", path, ()) for path in sample.images]:
            rows.setdefault((field, os.path.abspath(path), clips), {})[sample.key] = None
    return [
        Sample(path, "", "", clips=clips, meta={"rows": list(keys)}, **{field: (path,)})
        for (field, path, clips), keys in rows.items()
    ]


def scan(samples: list[Sample], settings: VideoSettings, workers: int, timeout: float) -> list[dict]:
    """{"path", "reason", "rows"} of each file that cannot be used. A progress bar counts files and bad ones."""
    files, bad = files_of(samples), {}
    batches = [files[start : start + BATCH] for start in range(0, len(files), BATCH)]
    loader = PromptLoader(partial(read_files, settings), workers, timeout, give_up_after=None)
    with loader, tqdm(total=len(files), unit="file", mininterval=1) as bar:
        for batch, outcomes in zip(batches, loader.batches(batches)):
            for file, outcome in zip(batch, outcomes):
                if isinstance(outcome, Skipped):
                    entry = bad.setdefault(file.key, {"path": file.key, "reason": outcome.reason, "rows": []})
                    entry["rows"] += file.meta["rows"]
            bar.set_postfix(bad=len(bad), refresh=False)
            bar.update(len(batch))
    return list(bad.values())


def main(arguments: list[str] | None = None) -> int:
    parser = OneLineParser(prog="video.scan", description=__doc__, allow_abbrev=False)
    parser.add_argument("--data", nargs="+", required=True, help="Data files, as train.py takes them.")
    parser.add_argument("--video_root", help="Folder that video paths are under (default: the data file's folder).")
    parser.add_argument("--output", default="bad.jsonl", help="The list to write, for --skip_list [bad.jsonl].")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="Processes that read files [all cores].")
    parser.add_argument("--decode_timeout", type=float, default=60.0, help="Seconds a file may take [60].")
    add_video_flags(parser)
    given = parser.parse_args(arguments)

    def work() -> None:
        if not Path(given.output).absolute().parent.is_dir():
            raise DataError(f"--output {given.output}: there is no such folder; make it first")
        settings = VideoSettings.of(given)
        samples = read_mixture(given.data, given.video_root)
        bad = scan(samples, settings, given.workers, given.decode_timeout)
        write_rows(given.output, bad)
        rows = {row for entry in bad for row in entry["rows"]}
        print(f"{len(bad)} bad files, in {len(rows)} rows: {printable(given.output)}")

    return run_program("video.scan", work, stopped="stopped; no list was written")


if __name__ == "__main__":
    sys.exit(main())
