"""Several real processes over gloo against one: same batch, same loss, gradient and weights; nothing hangs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from grpo.tiny import build_tiny_model
from video.synthetic import DemoSpec, make_demo_set

ROOT = Path(__file__).parent.parent
WATCHDOG = 150  # seconds after which a hang fails its own test


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(demo set, {tied: checkpoint}) shared by the tests below."""
    root = tmp_path_factory.mktemp("distributed")
    models = {tie: build_tiny_model(root / f"tie{tie}", tie=tie, seed=3) for tie in (False, True)}
    return make_demo_set(root / "data", DemoSpec(train=24, val=8, warmup=8)), models


def launch(processes, folder, world, *more, tie=False, expect=0):
    """Runs train.py on so many processes and returns its step metrics; kills it and fails when it hangs."""
    data, models = world
    command = [
        *([sys.executable] if processes == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone",
                                                  "--nproc_per_node", str(processes)]),
        str(ROOT / "train.py"), "--preset", "demo", "--no-demo", "--model", str(models[tie]), "--output", str(folder),
        "--data", str(data["train"]), "--eval_data", str(data["val"]), "--sft_steps", "0", "--steps", "3",
        "--prompts_per_step", "6", "--prompts_per_forward", "2", "--prompts_per_rollout", "2", "--group_size", "3",
        "--max_new_tokens", "6", "--eval_samples", "5", "--no-controls", "--workers", "0", "--eval_every", "0",
        "--reward", f"{ROOT}/tests/toy_reward.py:vowels", "--kl_coef", "0.05", *more,
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment) as process:
        try:
            output, _ = process.communicate(timeout=WATCHDOG)
        except subprocess.TimeoutExpired:
            process.kill()
            pytest.fail(f"{processes} processes hang: {process.communicate()[0][-2000:]}")
    assert process.returncode == expect, output[-3000:]
    rows = [json.loads(line) for line in open(Path(folder) / "metrics.jsonl")]
    return [row for row in rows if row["phase"] == "train"], output


def weights_of(folder):
    return load_file(Path(folder) / "checkpoint-3" / "model.safetensors")


def assert_same_run(one, other, folder, other_folder):
    for a, b in zip(one, other, strict=True):
        for name in ("loss", "grad_norm", "kl", "entropy", "reward", "length", "sampler_gap"):
            assert a[name] == pytest.approx(b[name], abs=1e-5, rel=1e-5), (name, a["step"])
    ours, theirs = weights_of(folder), weights_of(other_folder)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize("tie", [False, True])
def test_two_and_four_processes_equal_one(world, tmp_path, tie):
    """Traps 17 to 19 and 21: 6 prompts over 4 processes are uneven, so some run a placeholder."""
    alone, _ = launch(1, tmp_path / "1", world, tie=tie)
    assert all(row["grad_norm"] > 0.01 for row in alone)
    for count in (2, 4):
        together, _ = launch(count, tmp_path / str(count), world, tie=tie)
        assert_same_run(together, alone, tmp_path / str(count), tmp_path / "1")


def test_a_sample_skipped_in_one_process_does_not_hang(world, tmp_path):
    data, _ = world
    rows = [json.loads(line) for line in open(data["train"])]
    for row in rows:
        row["video"] = str(data["train"].parent / row["video"])
    for row in rows[::5]:
        row["video"] = str(tmp_path / "missing.mp4")
    for row in rows[1::5]:
        del row["video"]  # text alone: the sharded tower must run all the same
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = ("--data", str(tmp_path / "data.jsonl"))
    alone, _ = launch(1, tmp_path / "1", world, *more)
    together, _ = launch(2, tmp_path / "2", world, *more)
    assert sum(row["skipped"] for row in alone) > 0
    assert_same_run(together, alone, tmp_path / "2", tmp_path / "1")
    assert [row["skipped"] for row in together] == [row["skipped"] for row in alone]
