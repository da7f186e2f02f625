"""Whole runs over what users' data may be: every known format, images in a parquet file, files that hang a worker."""

import io
import json
import os
import signal
import time
from pathlib import Path

import pytest
from PIL import Image
from processes import ROOT, assert_same_run, finish, metrics_of, start, wait_for
from test_video_formats import FORMATS
from video_helpers import make_video

import eval as eval_script
import train
from demo.tiny import build_tiny_model
from grpo.run.data import draw_samples
from video.dataset import read_samples


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_format_trains_and_evaluates(tmp_path, capsys):
    rows = [row for row, _, _ in FORMATS.values()] + [{"problem": "Text only?", "solution": "A"}]
    data, output = tmp_path / "all.jsonl", tmp_path / "run"
    data.write_text("\n".join(map(json.dumps, rows)))
    for name, (_, video, _) in FORMATS.items():
        if name == "mvbench":  # its folder goes by the name of its own file
            video = "ZS9XR.mp4"
        (tmp_path / video).parent.mkdir(parents=True, exist_ok=True)
        make_video(tmp_path / video, frames=24, fps=6)
    model = str(build_tiny_model(tmp_path / "model"))
    small = ["--max_new_tokens", "4", "--min_pixels", "784", "--max_pixels", "784", "--nframes", "4", "--device", "cpu"]
    assert (
        train.main(
            [
                "--model",
                model,
                "--data",
                str(data),
                "--output",
                str(output),
                "--steps",
                "5",
                "--group_size",
                "2",
                "--prompts_per_step",
                "4",
                "--eval_samples",
                "0",
                "--kl_coef",
                "0",
                "--workers",
                "0",
                *small,
            ]
        )
        == 0
    )
    metrics = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert sum(row.get("skipped", 0) for row in metrics) == 0
    capsys.readouterr()
    assert (
        eval_script.main(
            [
                "--ckpt",
                str(output / "checkpoint-5"),
                "--data",
                str(data),
                "--device",
                "cpu",
                "--output",
                str(tmp_path / "answers"),
            ]
        )
        == 0
    )
    (answers,) = (tmp_path / "answers").glob("predictions*.jsonl")
    records = [json.loads(line) for line in answers.read_text().splitlines()]
    assert len(records) == len(rows) and not any("skipped" in record for record in records)


def test_images_in_a_parquet_file_train_and_evaluate(tmp_path, checkpoints):
    """In worker processes, held-out rows and all."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = []
    for number in range(6):
        content = io.BytesIO()
        Image.new("RGB", (56, 56), (40 * number, 0, 0)).save(content, "PNG")
        rows.append({"images": [{"bytes": content.getvalue(), "path": None}], "problem": "<image>Red?", "answer": "A"})
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    small = ["--max_new_tokens", "4", "--device", "cpu", "--workers", "1"]
    assert (
        train.main(
            [
                "--model",
                str(checkpoints["qwen2_vl"]),
                "--data",
                str(tmp_path / "d.parquet"),
                "--steps",
                "2",
                "--output",
                str(tmp_path / "run"),
                "--group_size",
                "2",
                "--prompts_per_step",
                "2",
                "--eval_samples",
                "2",
                "--kl_coef",
                "0",
                *small,
            ]
        )
        == 0
    )
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["skipped"] for row in metrics if row["phase"] == "train"] == [0, 0]
    assert (
        eval_script.main(
            [
                "--ckpt",
                str(tmp_path / "run" / "checkpoint-2"),
                "--data",
                str(tmp_path / "d.parquet"),
                "--output",
                str(tmp_path / "answers"),
                *small,
            ]
        )
        == 0
    )
    (answers,) = (tmp_path / "answers").glob("predictions*.jsonl")
    records = [json.loads(line) for line in answers.read_text().splitlines()]
    assert len(records) == 6 and not any("skipped" in record for record in records)


def left_over(marker):
    """The processes whose environment holds `marker`, apart from this one and those that have ended."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            ended = (folder / "stat").read_text().rsplit(")", 1)[1].split()[0] in "ZX"
            if marker.encode() in (folder / "environ").read_bytes() and not ended:
                found.append(int(folder.name))
        except (OSError, IndexError):  # gone meanwhile, or another user's
            continue
    return [pid for pid in found if pid != os.getpid()]


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are found in /proc")
def test_a_worker_killed_and_one_that_hangs_cost_their_samples_alone(world, tmp_path, monkeypatch):
    """Under torchrun, on one process and on two, whose step a smaller share of one must neither stop nor change."""
    samples = read_samples(world[0]["train"])
    hung, killed = (draw_samples(samples, 6 * step, 6, seed=42)[slot] for step, slot in ((0, 1), (1, 2)))
    monkeypatch.setenv("HANG", f"{hung.key} {killed.key}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    steps = {}
    for count in (1, 2):
        folder = tmp_path / f"run{count}"
        folder.mkdir()
        monkeypatch.setenv("PIDS", str(folder))
        run = start(count, folder, world, "--workers", "1", "--decode_timeout", "8", script="tests/hanging_train.py")
        wait_for((folder / killed.key).exists, run)
        assert int((folder / killed.key).read_text()) in left_over(str(folder))
        os.kill(int((folder / killed.key).read_text()), signal.SIGKILL)
        skipped = [line for line in finish(run).splitlines() if "skipped " in line and ".mp4" in line]
        reasons = "took more than 8 s (--decode_timeout)", "its worker died (exit code -9)"
        for sample, reason in zip((hung, killed), reasons):
            assert sum(line.endswith(f"skipped {sample.key}: {sample.videos[0]}: {reason}") for line in skipped) == 1
        assert len(skipped) == 2
        steps[count] = [row for row in metrics_of(folder) if row["phase"] == "train"]
        assert [row["skipped"] for row in steps[count]] == [1, 1, 0]
        deadline = time.monotonic() + 10
        while left_over(str(folder)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert left_over(str(folder)) == []
    assert_same_run(steps[2], steps[1], tmp_path / "run2", tmp_path / "run1")
