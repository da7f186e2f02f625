"""A row of every known format, in one file, goes through train.py and eval.py."""

import json

import pytest
from test_video_formats import FORMATS
from video_helpers import make_video

import eval as eval_script
import train
from grpo.tiny import build_tiny_model


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
    assert train.main(["--model", model, "--data", str(data), "--output", str(output), "--steps", "5", "--group_size", "2",
                       "--prompts_per_step", "4", "--eval_samples", "0", "--kl_coef", "0", "--workers", "0", *small]) == 0
    metrics = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert sum(row.get("skipped", 0) for row in metrics) == 0
    capsys.readouterr()
    assert eval_script.main(["--ckpt", str(output / "checkpoint-5"), "--data", str(data), "--device", "cpu",
                            "--output", str(tmp_path / "answers")]) == 0
    (answers,) = (tmp_path / "answers").glob("predictions*.jsonl")
    records = [json.loads(line) for line in answers.read_text().splitlines()]
    assert len(records) == len(rows) and not any("skipped" in record for record in records)
