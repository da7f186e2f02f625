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
from grpo.config import Config

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

def latin(b):
    """A data file whose second row is in Latin-1."""
    path = b.rows(b.row(), b.row())
    path.write_bytes(path.read_bytes()[:-3] + b"\xe9\"}\n")
    return path


def reward(b, text):
    """The flags of a reward whose file holds `text`."""
    (b.folder / "mine.py").write_text(text)
    return ["--reward", "accuracy:1", "mine.py:f", "--reward_timeout", "1"]


MISTAKES = {
    "a data file that is not there": (
        "train", lambda b: ["--data", "gone.jsonl"], 2,
        ("--data gone.jsonl: no such file; a relative path starts at /",),
    ),
    "no data at all": (
        "train", lambda b: ["--data", *Config.data], 2, ("--data data/LLaVA-Video-", ": no such file; `hf download",),
    ),
    "a model folder that is not there": (
        "train", lambda b: ["--model", b.folder / "modle"], 2, ("modle: not on this machine; there is no such folder",),
    ),
    "held-out questions that are not there": (
        "train", lambda b: ["--eval_data", "gone.jsonl"], 2, ("--eval_data gone.jsonl: no such file",),
    ),
    "a number that is a word": ("train", lambda b: ["--steps", "ten"], 2, ("--steps: invalid int value: 'ten'",)),
    "a misspelt media field": (
        "train", lambda b: ["--data", b.rows(*[b.row(n, video=..., vidoe="a.mp4") for n in range(3)])], 2,
        ("--data", "rows.jsonl: no row has a video or image; its fields are", "vidoe", "video, videos, image or images",
         "--text_only"),
    ),
    "a misspelt media field of held-out questions": (
        "train", lambda b: ["--eval_data", b.rows(b.row(video=..., vidoe="a.mp4"))], 2,
        ("--eval_data", "no row has a video", "vidoe"),
    ),
    "a misspelt media field of the supervised pass": (
        "train", lambda b: ["--sft_steps", "1", "--sft_data", b.rows(b.row(video=..., completions=["x"]))], 2,
        ("--sft_data", "no row has a video"),
    ),
    "a misspelt media field in an evaluation": (
        "eval", lambda b: ["--data", b.rows(b.row(video=..., vidoe="a.mp4"))], 2, ("no row has a video", "vidoe"),
    ),
    "a misspelt media field in a scan": (
        "scan", lambda b: ["--data", b.rows(b.row(video=..., vidoe="a.mp4"))], 2, ("no row has a video", "vidoe"),
    ),
    "text alone that is meant": (
        "eval", lambda b: ["--text_only", "--data", b.rows(b.row(video=...))], 0,
        ("1 of 1 questions to answer have no video or image", "1 questions; 0 unreadable"),
    ),
    "a line that is no JSON": (
        "train", lambda b: ["--data", b.rows(b.row(), "{not json")], 2, ("rows.jsonl:2: is not JSON", "mend or delete"),
    ),
    "many bad rows": (
        "train", lambda b: ["--data", b.rows(*[b.row(solution="<answer>7</answer>")] * 12, b.row())], 2,
        ("12 of 13 rows cannot be used, the first 10: rows.jsonl:1: solution '7' has no option letter",
         "; rows.jsonl:10: "),
    ),
    "many answers that cannot be scored": (
        "eval", lambda b: ["--samples", "3", "--data", b.rows(*[b.row(problem_type="numerical", solution="x")] * 3)], 2,
        ("3 of 3 rows cannot be used: sample 'rows.jsonl:1'", "; sample 'rows.jsonl:3'"),
    ),
    "rows without completions": (
        "train", lambda b: ["--sft_steps", "1", "--sft_data", b.rows(b.row(), b.row(1))], 2,
        ("2 of 2 rows cannot be used: rows.jsonl:1: --sft_data rows need `completions`",),
    ),
    "half an emoji in a question": (
        "train", lambda b: ["--data", b.rows(b.row(), b.row(problem="What? \ud83d\nA. x"))], 2,
        (r"rows.jsonl:2: holds half a character ('\ud83d')", "mend or delete it"),
    ),
    "half an emoji in an option": (
        "eval", lambda b: ["--data", b.rows(b.row(options=["A. \ud83d", "B. y"]))], 2, ("holds half a character",),
    ),
    "half an emoji in a completion": (
        "train", lambda b: ["--sft_steps", "1", "--sft_data", b.rows(b.row(completions=["\ud83d"]))], 2,
        ("rows.jsonl:1: holds half a character",),
    ),
    "half an emoji in a field that nobody reads": (
        "eval", lambda b: ["--data", b.rows(b.row(note="\ud83d", kind="\ud83d"))], 0, (r"\ud83d  ", "1 questions"),
    ),
    "a row nested 1,000 deep": (
        "train", lambda b: ["--data", b.rows('{"problem": ' + "[" * 1000 + "]" * 1000 + "}")], 2,
        ("rows.jsonl:1: is nested", "deep; mend or delete it"),
    ),
    "a row nested 100 deep": (
        "eval", lambda b: ["--data", b.rows(b.row(note=json.loads("[" * 100 + "]" * 100)))], 2,
        ("rows.jsonl:1: is nested more than 50 deep",),
    ),
    "an integer of 5,000 digits": (
        "train", lambda b: ["--data", b.rows('{"problem": ' + "7" * 5000 + "}")], 2,
        ("rows.jsonl:1: holds an integer of thousands of digits",),
    ),
    "a value of 1 MB": (
        "train", lambda b: ["--data", b.rows(b.row(solution=f"<answer>{'7' * 2**20}</answer>"))], 2,
        ("rows.jsonl:1: solution '7777", "has no option letter; write e.g. <answer>B</answer>"),
    ),
    "kinds of every type": (
        "eval", lambda b: ["--samples", "6", "--data", b.rows(
            *[b.row(n, kind=kind) for n, kind in enumerate((["a", "b"], 3, None, {"x": 1}, "word", True))])], 0,
        ("['a', 'b']", "\n3 ", "\nmultiple choice", "{'x': 1}", "\nword", "\nTrue", "6 questions; 0 unreadable"),
    ),
    "kinds of every type, and rows without media, while training": (
        "train", lambda b: ["--data", b.rows(b.row(kind=[]), b.row(1, kind=3, video=...), b.row(2, video=[]))], 0,
        ("2 of 3 questions to train on have no video or image: they are asked as text alone",
         "step 1: held-out accuracy ", "of all 2 questions; 0 unreadable"),
    ),
    "a line that is not UTF-8": (
        "scan", lambda b: ["--data", latin(b)], 2, ("rows.jsonl:2: is not UTF-8 text", "save the file as UTF-8"),
    ),
    "file names that are not UTF-8, with an escape code and a line break": (
        "train", lambda b: ["--data", b.rows(b.row(video="caf\udce9 \x1b[31m\n.mp4"), b.row(), name="\udce9.jsonl")], 0,
        (r"skipped \udce9.jsonl:1: ", r"caf\udce9 \x1b[31m\n.mp4: no such file; --video_root says where to look"),
    ),
    "such a file name in an evaluation": (
        "eval", lambda b: ["--data", b.rows(b.row(video="caf\udce9.mp4"), b.row())], 0, ("1 unreadable",),
    ),
    "such a file name in a scan": (
        "scan", lambda b: ["--data", b.rows(b.row(video="caf\udce9.mp4"), b.row())], 0, ("1 bad files, in 1 rows",),
    ),
    "a line break in a flag": (
        "train", lambda b: ["--data", "a\nb\x1b[31m.jsonl"], 2, (r"--data a b\x1b[31m.jsonl: no such file",),
    ),
    "a weight that is too large": (
        "train", lambda b: ["--data", f"{b.data['train']}:1e9"], 2, (":1e+09: makes 2.4e+10 rows of 24; lower the",),
    ),
    "an endless cache": ("train", lambda b: ["--frame_cache_gb", "inf"], 2, ("--frame_cache_gb inf: must be finite",)),
    "a reward file that lacks a module": (
        "train", lambda b: reward(b, "import gone"), 2,
        ("--reward mine.py:f: mine.py cannot be imported: ModuleNotFoundError: No module named 'gone'",),
    ),
    "a reward file that ends the program": (
        "train", lambda b: reward(b, "import os; os._exit(4)"), 2,
        ("--reward mine.py:f: mine.py cannot be imported: its process ended with exit code 4",),
    ),
    "a reward that ends the program": (
        "train", lambda b: reward(b, "import os\ndef f(completion, sample): os._exit(3)"), 0,
        ("reward f failed in 2 of 2 groups, scored 0: its process ended with exit code 3",),
    ),
    "a reward that never lets go": (
        "train", lambda b: reward(b, "import re\ndef f(text, sample): return re.match('(a+)+$', 'a' * 40 + 'b')"), 0,
        ("reward f failed in 2 of 2 groups, scored 0: no result within 1 s",),
    ),
    "more frames than a video has": (
        "train", lambda b: ["--nframes", "64"], 2, ("every sample was skipped, for the reasons above",),
    ),
}  # fmt: skip
SLOW = {"a reward that never lets go", "a reward that ends the program"}


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
