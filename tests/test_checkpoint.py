"""Checkpoints of real processes: any number of them resumes, no moment of death matters, a full disk loses nothing."""

import json
import os
import random
import re
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import FAMILIES, load_model
from processes import assert_same_run, back_to, command, kill, launch, metrics_of, run_here, start, wait_for, weights_of
from safetensors.torch import load_file
from transformers import AutoProcessor

import train
from grpo.config import load_config, parse_config
from grpo.engine import checkpoint
from grpo.engine.build import build_policy
from grpo.engine.checkpoint import CheckpointError, Saver, load_state, load_training
from grpo.engine.checkpoint import checkpoints as checkpoints_of
from grpo.engine.optimizer import make_optimizer
from grpo.run.run import Run

LONG = ("--steps", "4", "--save_every", "2", "--keep_checkpoints", "9")


@pytest.mark.slow
@pytest.mark.parametrize("tie", [False, True])
def test_saved_by_two_resumed_by_two_four_and_one(world, tmp_path, tie):
    """What is left of the data comes once, in order, and the metrics are those of one process that never stopped."""
    alone = run_here(tmp_path / "1", world, *LONG, tie=tie)
    whole, _ = launch(2, tmp_path / "2", world, *LONG, tie=tie)
    for count in (2, 4, 1):
        folder = back_to(tmp_path / "2", 2, tmp_path / f"2 to {count}")
        resumed, _ = launch(count, folder, world, *LONG, tie=tie)
        assert_same_run(resumed, alone, folder, tmp_path / "1", step=4)
        if count == 2:
            assert resumed == whole
            ours, theirs = weights_of(folder, 4), weights_of(tmp_path / "2", 4)
            assert all((ours[name] == theirs[name]).all() for name in theirs), "bit for bit"


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_any_moment_and_resumed(world, tmp_path, processes):
    """SIGKILL at five random moments, saving included."""
    more = ("--steps", "12", "--save_every", "1", "--eval_every", "3")
    whole = metrics_of_run(processes, tmp_path / "whole", world, *more)
    folder, moments = tmp_path / "killed", random.Random(processes)
    for step in (1, 3, 4, 7, 10):
        process = start(processes, folder, world, *more)
        wait_for(lambda: len([r for r in metrics_of(folder) if r["phase"] == "train"]) >= step, process)
        time.sleep(moments.uniform(0, 0.4))
        kill(process)
        process.communicate()
    assert metrics_of_run(processes, folder, world, *more) == whole
    assert [c.name for c in checkpoints_of(folder)][-1] == "checkpoint-12"
    ours, theirs = weights_of(folder, 12), weights_of(tmp_path / "whole", 12)
    assert all((ours[name] == theirs[name]).all() for name in theirs)


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "qwen2_vl"])
def test_killed_and_resumed_in_the_other_families(worlds, family, tmp_path):
    """SIGKILL after the third step of six; `from_pretrained` loads the last checkpoint."""
    more, folder = ("--steps", "6", "--save_every", "1"), tmp_path / "killed"
    whole = metrics_of_run(1, tmp_path / "whole", worlds[family], *more)
    process = start(1, folder, worlds[family], *more)
    wait_for(lambda: len([r for r in metrics_of(folder) if r["phase"] == "train"]) >= 3, process)
    kill(process)
    process.communicate()
    assert metrics_of_run(1, folder, worlds[family], *more) == whole
    ours, theirs = weights_of(folder, 6), weights_of(tmp_path / "whole", 6)
    assert all((ours[name] == theirs[name]).all() for name in theirs)
    model = load_model(folder / "checkpoint-6")
    naive = type(model).from_pretrained(folder / "checkpoint-6")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), naive.parameters(), strict=True))


def metrics_of_run(processes, folder, world, *more):
    launch(processes, folder, world, *more)
    return metrics_of(folder)


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts a file system of so many bytes and returns its folder."""
    folder = tmp_path / "small"
    folder.mkdir()

    def mount(size):
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"mounting a small file system is refused here: {done.stderr.strip()}")
        return folder

    yield mount
    subprocess.run(["umount", folder], capture_output=True)


@pytest.mark.parametrize("error", [MemoryError, RuntimeError, TypeError])
def test_any_error_in_the_thread_is_raised(saved, monkeypatch, error):
    save, *_, saver = saved

    def fail(*_):
        raise error("odd")

    monkeypatch.setattr(checkpoint, "save_model", fail)
    folder = save(1)
    with pytest.raises(CheckpointError, match="checkpoint-1 could not be saved.*odd"):
        saver.wait()
    assert not list(folder.parent.glob("checkpoint-1*"))


def test_a_run_that_fails_keeps_the_checkpoint_that_is_being_written(world, tmp_path, monkeypatch):
    """The evaluation after the last step fails while the last checkpoint is slow to write."""
    write, evaluate = checkpoint.save_model, Run.evaluate
    monkeypatch.setattr(checkpoint, "save_model", lambda *given: time.sleep(2) or write(*given))

    def fail_at_the_end(self, policy, control=None):
        if self.saver.step == 3:
            raise FloatingPointError("not finite")
        return evaluate(self, policy, control)

    monkeypatch.setattr(Run, "evaluate", fail_at_the_end)
    assert train.main(command(1, tmp_path, world)[2:]) == 2
    assert [c.name for c in checkpoints_of(tmp_path)] == ["checkpoint-3"]


def test_what_a_killed_run_left_unfinished_is_removed(world, tmp_path):
    flags = command(1, tmp_path, world)[2:]
    assert train.main(flags) == 0
    for name in ("checkpoint-2.partial", "warmup.partial", "merged.partial"):
        (tmp_path / name).mkdir()
    (tmp_path / "mine.partial").mkdir()
    assert train.main(flags) == 0
    assert [path.name for path in tmp_path.glob("*.partial")] == ["mine.partial"]


def test_a_damaged_checkpoint_is_named_and_so_is_the_next_older_whole_one(world, tmp_path, capsys):
    flags = command(1, tmp_path, world, "--save_every", "1", "--keep_checkpoints", "9")[2:]
    assert train.main(flags) == 0

    def said_of(newest):
        assert train.main(flags) == 2
        start = f"train.py: error: {tmp_path / newest}: "
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(start)
        return error.removeprefix(start)

    ways = f"copy it again, or remove it to go on from {tmp_path}/checkpoint-1, which is whole"
    for name in ("model.safetensors", "training/shard-00001-model-00001-of-00001.safetensors"):
        contents = {step: (tmp_path / f"checkpoint-{step}" / name).read_bytes() for step in (2, 3)}
        for step, content in contents.items():
            (tmp_path / f"checkpoint-{step}" / name).write_bytes(content[:1000])
        assert said_of("checkpoint-3") == f"{name} has 1000 of {len(contents[3])} bytes; {ways}"
        (tmp_path / "checkpoint-3" / name).unlink()
        assert said_of("checkpoint-3") == f"{name} is missing; {ways}"
        for step, content in contents.items():
            (tmp_path / f"checkpoint-{step}" / name).write_bytes(content[:8] + b"\0" * 64 + content[72:])
        assert re.fullmatch(rf"{name} is damaged \(.+\); {ways}", said_of("checkpoint-3"))
        for step, content in contents.items():
            (tmp_path / f"checkpoint-{step}" / name).write_bytes(content)
    for step, state in ((1, ""), (2, "\0" * 40), (3, '{"files": {}}')):
        (tmp_path / f"checkpoint-{step}" / "training" / "state.json").write_text(state)
    ways = "copy it again, or --resume no starts anew"
    assert said_of("checkpoint-3") == f"training/state.json is damaged; {ways}"


def test_a_checkpoint_is_readable_by_whom_the_umask_lets_and_on_the_disk_before_it_has_its_name(saved, monkeypatch):
    save, *_, saver = saved
    synced, sync, rename = [], os.fsync, Path.rename  # inodes, for a file keeps its inode when its folder is renamed
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.fstat(number).st_ino) or sync(number))
    monkeypatch.setattr(Path, "rename", lambda *given: synced.append("renamed") or rename(*given))
    before = os.umask(0o027)
    try:
        folder = save(1)
        saver.wait()
    finally:
        os.umask(before)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {"0o640"}
    last = synced.index("renamed")
    assert {path.stat().st_ino for path in [folder, *folder.rglob("*")]} <= set(synced[:last])
    assert synced[last + 1] == folder.parent.stat().st_ino


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_full_disk_ends_the_run_and_spares_the_last_checkpoint(world, tmp_path, small_disk, processes):
    more = ("--save_every", "1", "--keep_checkpoints", "9")
    run_here(tmp_path / "1", world, *more, "--steps", "1")
    size = sum(path.stat().st_size for path in (tmp_path / "1" / "checkpoint-1").rglob("*") if path.is_file())
    folder = small_disk(int(1.6 * size) + 2**17) / "run"
    _, output = launch(processes, folder, world, *more, expect=None)
    error = [line for line in output.splitlines() if line.startswith("train.py: error: ") and "not be saved" in line]
    assert error and "o space left" in error[0] and "checkpoint-2" in error[0], output[-2000:]
    assert processes > 1 or "Traceback" not in output
    assert [c.name for c in checkpoints_of(folder)] == ["checkpoint-1"]
    assert load_model(folder / "checkpoint-1") and load_config(folder / "checkpoint-1" / "run.json")
    moved = Path(shutil.copytree(folder, tmp_path / "moved"))
    resumed = run_here(moved, world, *more)
    assert [row["step"] for row in resumed] == [0, 1, 2]


def test_the_best_checkpoint_is_kept_beside_the_last(world, tmp_path):
    """Held-out accuracy is a list of ours here; what counts is which folders stay."""
    accuracies = iter([0.1, 0.5, 0.3, 0.2, 0.0])
    flags = command(1, tmp_path, world, "--steps", "5", "--save_every", "5", "--eval_every", "1",
                    "--keep_checkpoints", "1")[2:]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        summary = {"overall": 0.5, "trained_interval": [0.0, 1.0], "categories": {}, "unparsed": 0.0, "opposite": None,
                   "count": 5, "skipped": 0}  # fmt: skip
        patch.setattr("grpo.run.run.summarise", lambda *_: {**summary, "trained": next(accuracies, 0.0)})
        assert train.main(flags) == 0
    assert [c.name for c in checkpoints_of(tmp_path)] == ["checkpoint-1", "checkpoint-5"]
    state = json.loads((tmp_path / "checkpoint-5" / "training" / "state.json").read_text())
    assert state["best"] == {"step": 1, "accuracy": 0.5}


@pytest.fixture
def saved(checkpoints, tmp_path):
    """(a function that saves a step, policy, optimizer, Saver), on one process."""
    folder, device = checkpoints["qwen2_vl"], torch.device("cpu")
    config = parse_config(["--preset", "demo", "--model", str(folder), "--output", str(tmp_path)])
    processor = AutoProcessor.from_pretrained(folder)
    policy = build_policy(folder, config, processor, device)
    optimizer, saver = make_optimizer(policy, config), Saver(device, processor, config)
    return (lambda step: saver.save(step, policy, optimizer, {"a": 1}), policy, optimizer, saver)


def test_training_goes_on_while_a_checkpoint_is_written(saved, monkeypatch):
    """What is written is what there was when saving began, and nothing shows under its name before it is whole."""
    save, policy, optimizer, saver = saved
    go, write = threading.Event(), dcp.save  # the first that the thread calls
    monkeypatch.setattr(dcp, "save", lambda *given, **named: go.wait(60) and write(*given, **named))
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    folder = save(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(1.0)
            optimizer.state[parameter]["exp_avg"].add_(1.0)
    assert not folder.exists()
    go.set()
    saver.wait()
    stored = load_file(folder / "model.safetensors")
    assert len(stored) == len(before)
    load_training(folder, policy, optimizer)
    for name, parameter in policy.named_parameters():
        assert torch.equal(parameter, before[name]) and not optimizer.state[parameter]["exp_avg"].any()
    again = load_model(folder)
    assert all(torch.equal(p, before[f"model.{name}"]) for name, p in again.named_parameters())


def test_the_state_in_a_checkpoint_is_that_of_its_step(saved, monkeypatch):
    """Training counts on in the same dictionary while the thread writes."""
    _, policy, optimizer, saver = saved
    go, write, state = threading.Event(), dcp.save, {"used": {"--data": 4}}
    monkeypatch.setattr(dcp, "save", lambda *given, **named: go.wait(60) and write(*given, **named))
    folder = saver.save(1, policy, optimizer, state)
    state["used"]["--data"] = 8
    go.set()
    saver.wait()
    assert load_state(folder)["used"] == {"--data": 4}


def test_a_checkpoint_that_failed_is_raised_by_the_next_call(saved, monkeypatch):
    save, *_, saver = saved

    def fail(folder, *_):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_model", fail)
        folder = save(1)
        saver.thread.join()
        assert saver.error and not folder.exists() and not list(folder.parent.glob("*.partial"))
        with pytest.raises(CheckpointError, match="checkpoint-1 could not be saved.*No space left"):
            save(2)
    save(3)
    saver.wait()
    assert [c.name for c in checkpoints_of(folder.parent)] == ["checkpoint-3"]
