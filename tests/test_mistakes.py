"""What a user gets for a mistake or for one bad row: the command, and the line that comes. Never a traceback.

A row of MISTAKES is `name: (program, flags, code, words)`:

- program: "train", "eval", "scan" or "convert"; `main` of that script runs in this process.
- flags: a function of a `Bench` (below) that makes the input in a fresh folder and returns the flags, each a text or a
  path. They follow TINY[program], so they override it: a tiny checkpoint, a handful of the demo's videos, one step.
- code: the exit code. 2: stderr ends with the one line `PROGRAM: error: ...`. 0: the program goes on, and says so.
- words: texts that the line (code 2) or the whole output (code 0) holds: the flag, the file or the row, and the fix.

A row takes well under a second if the mistake is found before any weight loads. Mark others slow: SLOW holds names.
"""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

import eval as eval_script
import train
import video.convert
import video.scan

PROGRAMS = {"train": train.main, "eval": eval_script.main, "scan": video.scan.main, "convert": video.convert.main}


class Bench(NamedTuple):
    """Where a mistake is made: a fresh `folder`, the demo set's files by name, a tiny checkpoint (do not change it)."""

    folder: Path
    data: dict[str, Path]
    model: Path

    def row(self, number=0, **changes):
        """A row of the demo's training set, its video's path absolute; a field changed to ... is left out."""
        row = json.loads(self.data["train"].read_text().splitlines()[number])
        row = {**row, "video": str(self.data["train"].parent / row["video"]), **changes}
        return {name: value for name, value in row.items() if value is not ...}

    def rows(self, *rows, name="rows.jsonl"):
        """The path of a data file; a row is a dict, or the text of a line."""
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (self.folder / name).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return self.folder / name

    def checkpoint(self, **changes):
        """A copy of the tiny checkpoint whose config.json has these fields changed."""
        copy = Path(shutil.copytree(self.model, self.folder / "model"))
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps({**config, **changes}))
        return copy


ONE_FRAME = ("--nframes", "2", "--min_pixels", "784", "--max_pixels", "784")
TINY = {
    "train": lambda b: [
        "--preset", "demo", "--no-demo", "--model", b.model, "--output", b.folder / "run", "--data", b.data["train"],
        "--eval_data", b.data["val"], "--eval_samples", "2", "--eval_every", "0", "--no-controls", "--sft_data",
        b.data["warmup"], "--sft_steps", "0", "--steps", "1", "--prompts_per_step", "2", "--group_size", "2",
        "--max_new_tokens", "4", "--workers", "0", "--frame_cache", b.folder / "frames", *ONE_FRAME,
    ],
    "eval": lambda b: [
        "--ckpt", b.model, "--data", b.data["val"], "--samples", "2", "--output", b.folder / "eval",
        "--max_new_tokens", "4", "--workers", "0", "--device", "cpu", "--prompt_template", "{problem}", *ONE_FRAME,
    ],
    "scan": lambda b: ["--data", b.data["val"], "--output", b.folder / "bad.jsonl", "--workers", "0", *ONE_FRAME],
    "convert": lambda b: [],
}  # fmt: skip

MISTAKES = {
    "a data file that is not there": (
        "train", lambda b: ["--data", b.folder / "gone.jsonl"], 2, ("--data", "gone.jsonl: no such file"),
    ),
    "a number that is a word": ("train", lambda b: ["--steps", "ten"], 2, ("--steps: invalid int value: 'ten'",)),
    "a line that is no JSON": (
        "train", lambda b: ["--data", b.rows(b.row(), "{not json")], 2, ("rows.jsonl:2: is not JSON", "mend or delete"),
    ),
}  # fmt: skip
SLOW = set()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in MISTAKES]
)
def test_a_mistake_is_answered_in_words(name, world, checkpoints, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    program, flags, code, words = MISTAKES[name]
    bench = Bench(tmp_path, world[0], checkpoints["qwen2_vl"])
    try:
        ended = PROGRAMS[program]([str(flag) for flag in (*TINY[program](bench), *flags(bench))])
    except SystemExit as end:  # argparse
        ended = end.code
    output, error = capfd.readouterr()
    assert ended == code, error
    assert "Traceback" not in output + error
    told = output + error
    if code == 2:
        told = error.splitlines()[-1]
        assert "error: " in told and len(told) < 2000
    assert [text for text in words if text not in told] == [], told
