"""train.py in processes of its own: started, watched, read. A run that hangs fails its own test."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train

ROOT = Path(__file__).parent.parent
WATCHDOG = 150  # seconds after which a hang fails its own test
TIMES = ("seconds", "seconds_waiting", "seconds_sampling")
COMPARED = ("loss", "grad_norm", "kl", "entropy", "reward", "length", "sampler_gap")


def command(processes, folder, world, *more, tie=False, nodes=(), script="train.py"):
    """The command of a tiny run; nodes: (their number, this one's, port) of several torchrun agents."""
    data, models = world
    agents = ["--standalone"]
    if nodes:
        agents = ["--nnodes", str(nodes[0]), "--node_rank", str(nodes[1]), "--master_addr", "127.0.0.1",
                  "--master_port", str(nodes[2])]  # fmt: skip
    torchrun = ["-m", "torch.distributed.run", *agents, "--nproc_per_node", str(processes)]
    return [
        sys.executable, *(torchrun if processes > 1 or nodes else []), str(ROOT / script), "--preset", "demo",
        "--no-demo", "--model", str(models[tie]), "--output", str(folder),
        "--data", str(data["train"]), "--eval_data", str(data["val"]), "--sft_steps", "0", "--steps", "3",
        "--prompts_per_step", "6", "--prompts_per_forward", "2", "--prompts_per_rollout", "2", "--group_size", "3",
        "--max_new_tokens", "6", "--eval_samples", "5", "--no-controls", "--workers", "0", "--eval_every", "0",
        "--reward", f"{ROOT}/tests/toy_reward.py:vowels", "--kl_coef", "0.05", *more,
    ]  # fmt: skip


def start(*given, **options):
    """The process (group) of `command`, its output in one pipe."""
    return start_command(command(*given, **options))


def start_command(words):
    """The process (group) of any command, its output in one pipe."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )


def finish(process, expect=0):
    """The output of a process that ended by itself with code `expect` (None: any); kills it and fails when it hangs."""
    try:
        output, _ = process.communicate(timeout=WATCHDOG)
    except subprocess.TimeoutExpired:
        kill(process)
        pytest.fail(f"hangs: {process.communicate()[0][-2000:]}")
    assert expect is None or process.returncode == expect, output[-3000:]
    return output


def kill(process, number=signal.SIGKILL):
    os.killpg(process.pid, number)


def run_here(folder, world, *more, tie=False):
    """As `launch` of one process, without starting one; returns its step metrics."""
    assert train.main(command(1, folder, world, *more, tie=tie)[2:]) == 0
    return [row for row in metrics_of(folder) if row["phase"] == "train"]


def launch(processes, folder, world, *more, tie=False, expect=0):
    """Runs train.py on so many processes; returns (its step metrics, its output)."""
    output = finish(start(processes, folder, world, *more, tie=tie), expect)
    return [row for row in metrics_of(folder) if row["phase"] == "train"], output


def metrics_of(folder):
    """All whole lines of metrics.jsonl, timings left out."""
    path = Path(folder) / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def wait_for(condition, process):
    """Waits until condition() holds; fails when the process ends or hangs before that."""
    deadline = time.monotonic() + WATCHDOG
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            kill(process) if process.poll() is None else None
            pytest.fail(f"ended or hangs: {process.communicate()[0][-2000:]}")
        time.sleep(0.02)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def weights_of(folder, step=3):
    return load_file(Path(folder) / f"checkpoint-{step}" / "model.safetensors")


def assert_same_run(one, other, folder, other_folder, step=3):
    """Step metrics and last weights are equal to 1e-5."""
    for a, b in zip(one, other, strict=True):
        for name in COMPARED:
            assert a[name] == pytest.approx(b[name], abs=1e-5, rel=1e-5), (name, a["step"])
    ours, theirs = weights_of(folder, step), weights_of(other_folder, step)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=0)
