"""A scan of a whole set names each bad file once, and the list it writes is what --skip_list reads."""

import argparse
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from video_helpers import make_broken, make_video

from video.dataset import leave_out, read_mixture, read_skip_list
from video.formats import Clip
from video.pool import WorkersDoNotStart
from video.scan import files_of, main
from video.settings import VideoSettings, add_video_flags
from video.terminal import run_program


@pytest.fixture
def data(tmp_path):
    """A set of good and broken files; the first of each is used by two rows."""
    broken = make_broken(tmp_path)
    del broken["folder"]
    Image.new("RGB", (40, 40)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes((tmp_path / "good.png").read_bytes()[:40])
    good = [make_video(tmp_path / f"good{n}.mp4") for n in range(3)]
    videos = [*good, good[0], *broken.values(), next(iter(broken.values()))]
    rows = [{"problem": "q", "solution": "A", "video": path} for path in videos]
    rows += [{"problem": "q", "solution": "A", "image": f"{name}.png"} for name in ("good", "bad")]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "d.jsonl", sorted([*broken.values(), str(tmp_path / "bad.png")])


def test_bad_files_are_listed_once_with_reason_and_rows(data, tmp_path, capsys):
    path, bad = data
    assert main(["--data", str(path), "--output", str(tmp_path / "bad.jsonl"), "--workers", "1", "--nframes", "4"]) == 0
    entries = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert sorted(entry["path"] for entry in entries) == bad
    assert all(entry["reason"] and "\n" not in entry["reason"] for entry in entries)
    assert next(entry for entry in entries if entry["path"].endswith("truncated.mp4"))["rows"] == [
        "d.jsonl:5",
        "d.jsonl:10",
    ]
    out, err = capsys.readouterr()
    assert out.startswith(f"{len(bad)} bad files, in {len(bad) + 1} rows: ")
    assert f"{len(bad) + 4}/{len(bad) + 4} [" in err and f"bad={len(bad)}]" in err
    kept, left_out = leave_out(read_mixture(str(path)), read_skip_list(tmp_path / "bad.jsonl"))
    assert len(kept) == 5 and len(left_out) == len(bad) + 1


def test_a_file_name_that_is_not_utf8_is_listed_and_left_out(tmp_path, capsys):
    name = os.fsdecode(b"caf\xe9\x1b[31m.mp4")
    rows = [{"problem": "q", "solution": "A", "video": video} for video in (name, make_video(tmp_path / "good.mp4"))]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / name).write_bytes(b"no video")
    flags = ("--output", str(tmp_path / name), "--workers", "0", "--nframes", "4")
    assert main(["--data", str(tmp_path / "d.jsonl"), *flags]) == 0
    assert r"caf\udce9\x1b[31m.mp4" in capsys.readouterr().out
    kept, left_out = leave_out(read_mixture(str(tmp_path / "d.jsonl")), read_skip_list(tmp_path / name))
    assert [sample.key for sample in kept] == ["d.jsonl:2"] and left_out[0].videos == (str(tmp_path / name),)


def test_clips_of_a_file_are_read_apart(data):
    path, _ = data
    row = {"problem": "q", "solution": "A", "video": "good0.mp4"}
    path.write_text("\n".join(json.dumps(row | {"video_end": end}) for end in (None, 2, 2, 3)))
    files = files_of(read_mixture(str(path)))
    assert [(file.clips[0], file.meta["rows"]) for file in files] == [
        (Clip(), ["d.jsonl:1"]), (Clip(None, 2), ["d.jsonl:2", "d.jsonl:3"]), (Clip(None, 3), ["d.jsonl:4"]),
    ]  # fmt: skip


def test_mistakes_in_the_call_are_one_line(tmp_path, capsys):
    assert main(["--data", str(tmp_path / "none.jsonl")]) == 2
    assert main(["--data", str(tmp_path / "none.jsonl"), "--fps", "0"]) == 2
    assert main(["--data", str(tmp_path / "none.jsonl"), "--output", str(tmp_path / "no" / "bad.jsonl")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and "no such file" in lines[0] and "--fps must be above 0" in lines[1]
    assert "--output" in lines[2] and "no such folder" in lines[2], "known before anything is read"


def test_it_starts_as_a_module():
    run = subprocess.run(
        [sys.executable, "-m", "video.scan", "--help"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent.parent,
    )
    assert run.returncode == 0 and "--max_frames" in run.stdout


@pytest.mark.parametrize(
    "error, code, line",
    [
        (ValueError("--fps\n0"), 2, r"p: error: --fps\n0"),
        (OSError(28, "No space left on device", "f"), 2, "p: error: [Errno 28] No space left on device: 'f'"),
        (WorkersDoNotStart("no memory"), 2, "p: error: no memory"),
        (KeyboardInterrupt(), 130, "p: stopped; no list"),
    ],
)
def test_a_program_ends_with_one_line_and_a_code(error, code, line, capsys, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def work():
        raise error

    assert run_program("p", work, stopped="stopped; no list") == code
    assert capsys.readouterr().err == line + "\n"
    assert run_program("p", lambda: None) == 0
    with pytest.raises(KeyError):  # a bug, with its traceback
        run_program("p", lambda: {}["gone"])


def test_settings_and_rows_are_read_without_torch():
    heavy = ("torch", "av", "numpy", "PIL", "transformers")
    code = f"import sys, video.settings, video.dataset; sys.exit(str([m for m in {heavy} if m in sys.modules]))"
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, check=False, capture_output=True, text=True)
    assert done.stderr == "[]\n"


def test_settings_are_taken_from_a_command_line():
    parser = argparse.ArgumentParser()
    add_video_flags(parser)
    assert VideoSettings.of(parser.parse_args([])) == VideoSettings()
    given = parser.parse_args(["--fps", "1.5", "--nframes", "8", "--total_pixels", "90000"])
    assert VideoSettings.of(given) == VideoSettings(fps=1.5, nframes=8, total_pixels=90000)
