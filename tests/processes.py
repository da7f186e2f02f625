"""train.py in processes of its own: started, watched, read. A run that hangs fails its own test."""

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import assert_close_to_scale
from safetensors.torch import load_file
from torch.distributed.checkpoint import HuggingFaceStorageReader

import train
import video.files
from grpo.engine.checkpoint import checkpoints as checkpoints_of

ROOT = Path(__file__).parent.parent
WATCHDOG = 400  # seconds after which a hang fails its own test
TIMES = ("seconds", "seconds_waiting", "seconds_sampling", "tokens_per_second", "peak_memory_gib")
COMPARED = ("loss", "grad_norm", "kl", "entropy", "reward", "length", "sampler_logprob_diff")


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
        "--reward", f"{ROOT}/tests/toy_reward.py:vowels", "--kl_coef", "0.05", "--ppo_epochs", "1",
        "--learning_rate", "0.0008", "--lr_schedule", "linear", *more,
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


def launch(processes, folder, world, *more, tie=False, expect=0, script="train.py"):
    """Runs train.py on so many processes; returns (its step metrics, its output)."""
    output = finish(start(processes, folder, world, *more, tie=tie, script=script), expect)
    return [row for row in metrics_of(folder) if row["phase"] == "train"], output


def metrics_of(folder):
    """All whole lines of metrics.jsonl, timings left out."""
    path = Path(folder) / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


@contextmanager
def full_disk(name):
    """Every write to a file whose name holds `name` fails, as on a full disk; half of a text is written before."""

    class Full:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, attribute):
            return getattr(self.file, attribute)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, text):
            self.file.write(text[: len(text) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def open_full(path, *given, **named):
        file = open(path, *given, **named)
        return Full(file) if name in str(path) else file

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(video.files, "open", open_full, raising=False)
        yield


@contextmanager
def held(folder):
    """Another process holds a folder as a run does; it is killed at the end."""
    code = (
        "import fcntl, os, sys, time; file = open(sys.argv[1] + '/.lock', 'w'); fcntl.flock(file, fcntl.LOCK_EX)\n"
        "print(f'process {os.getpid()} on here', end='', file=file, flush=True); print('held', flush=True)\n"
        "time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, folder], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


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


def training_of(folder, step=3):
    """{"master.NAME", "exp_avg.NAME" or "exp_avg_sq.NAME": whole tensor} of a checkpoint, however it was sharded."""
    reader = HuggingFaceStorageReader(str(Path(folder) / f"checkpoint-{step}" / "training"))
    shapes = {name: stored.size for name, stored in reader.read_metadata().state_dict_metadata.items()}
    tensors = {name: torch.empty(shape) for name, shape in shapes.items()}
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def back_to(folder, step, copy):
    """A copy of a run folder as it was when checkpoint `step` was its newest."""
    shutil.copytree(folder, copy)
    for later in checkpoints_of(copy):
        if int(later.name.split("-")[1]) > step:
            shutil.rmtree(later)
    return copy


def assert_same_run(one, other, folder, other_folder, step=3):
    """Step metrics, both moments and the weights of two runs are equal but for rounding, on any CPU.

    Moments are sums of gradients and of their squares: they are compared to 1e-4 of a tensor's largest value (rounding
    makes 5e-6 between two instruction sets, 1.5e-6 between one process and two). Adam divides by sqrt(v): if a weight's
    gradient is rounding, so is its step, of up to the learning rate. So weights that v says are above rounding are
    compared, and one in twenty may be off by more than a fiftieth of a step.
    """
    for a, b in zip(one, other, strict=True):
        tolerance = 1e-4 if a["step"] else 1e-5  # later steps start from the weights that Adam made
        for name in COMPARED:
            assert a[name] == pytest.approx(b[name], abs=tolerance, rel=tolerance), (name, a["step"])
    ours, theirs = training_of(folder, step), training_of(other_folder, step)
    assert ours.keys() == theirs.keys() and ours
    for name in (name for name in ours if name.startswith("exp_avg")):
        assert_close_to_scale(ours[name], theirs[name], 1e-4, name)
    masters = [name.removeprefix("master.") for name in ours if name.startswith("master.")]
    deviations = {name: theirs[f"exp_avg_sq.{name}"].sqrt() for name in masters}
    floor = 1e-4 * max(deviation.max() for deviation in deviations.values())
    small = max(row["learning_rate"] for row in other) / 50
    compared = 0
    for name in masters:
        above = deviations[name] > floor
        for weight in {f"master.{name}", f"reference.{name}"} & ours.keys():  # a reference that moves is saved, too
            off = (ours[weight] - theirs[weight]).abs()[above] > small
            assert off.sum() <= 0.05 * len(off), f"{weight}: {off.sum()} of {len(off)} weights differ"
        compared += int(above.sum())
    assert compared > 0.5 * sum(theirs[f"master.{name}"].numel() for name in masters)
