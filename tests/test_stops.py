"""Runs that end early: signals, a process that dies, updates that are not finite, too little memory; one line each."""

import inspect
import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from processes import ROOT, command, finish, metrics_of, start, wait_for

import train
from grpo import update
from grpo.engine import distributed
from grpo.engine.checkpoint import checkpoints
from grpo.errors import RunError
from grpo.run.stops import count_bad, exit_code, listening, lost_process, memory_message
from video.loader import PromptLoader
from video.pool import WorkersDoNotStart

ENDLESS = ("--steps", "400", "--save_every", "1000")


def trained(folder):
    return [row for row in metrics_of(folder) if row["phase"] == "train"]


def children(process):
    listed = subprocess.run(["pgrep", "-P", str(process.pid), "-f", "train.py"], capture_output=True, text=True)
    return [int(line) for line in listed.stdout.split()]


@pytest.mark.parametrize("number", [signal.SIGTERM, *(pytest.param(number, marks=pytest.mark.slow)
                                                      for number in (signal.SIGINT, signal.SIGHUP))])  # fmt: skip
def test_a_signal_saves_and_ends_with_its_own_exit_code(world, tmp_path, number):
    """Not 0: `train.py && eval.py` would take the run for finished."""
    process = start(1, tmp_path, world, *ENDLESS)
    wait_for(lambda: len(trained(tmp_path)) >= 2, process)
    process.send_signal(number)
    output = finish(process, expect={signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129}[number])
    done = len(trained(tmp_path))
    assert [c.name for c in checkpoints(tmp_path)] == [f"checkpoint-{done}"]
    assert "Traceback" not in output and f"stopped before step {done}; the same command goes on" in output


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both_at_the_same_step(world, tmp_path):
    process = start(2, tmp_path, world, *ENDLESS)
    wait_for(lambda: len(trained(tmp_path)) >= 2, process)
    os.kill(children(process)[1], signal.SIGTERM)
    output = finish(process, expect=1)  # torchrun's own exit code, after a report of both
    done = len(trained(tmp_path))
    assert [c.name for c in checkpoints(tmp_path)] == [f"checkpoint-{done}"]
    assert "exitcode  : 143" in output and 'train.py", line' not in output, "a traceback of torchrun's is not ours"


@pytest.mark.slow
def test_a_process_that_dies_ends_the_other_within_ten_seconds(world, tmp_path):
    process = start(2, tmp_path, world, *ENDLESS)
    wait_for(lambda: len(trained(tmp_path)) >= 2, process)
    os.kill(children(process)[1], signal.SIGKILL)
    began = time.monotonic()
    output = finish(process, expect=1)
    assert time.monotonic() - began < 20  # 10 on an idle machine; torchrun itself kills after 30
    assert "train.py: error: another process is gone, see its message" in output
    assert "Signal 9 (SIGKILL)" in output, "torchrun says who died, and of what"


def test_a_run_under_nohup_takes_no_notice_of_a_terminal_that_closes():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with listening() as signalled:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signalled() == 0
            os.kill(os.getpid(), signal.SIGTERM)
            assert signalled() == signal.SIGTERM
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("rank, lines", [("0", 1), ("1", 0)])
def test_the_first_signal_is_answered_at_once_by_the_main_process(rank, lines, monkeypatch, capfd):
    monkeypatch.setenv("RANK", rank)
    with listening():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        error = capfd.readouterr().err
    assert error.count("stopping: saves after this step or evaluation; a second Ctrl-C ends at once") == lines


@pytest.mark.parametrize("done", [0, 1])
def test_a_signal_that_ends_the_workers_too_saves_and_is_no_error(world, tmp_path, monkeypatch, capfd, done):
    batches = PromptLoader.batches

    def interrupted(loader, shares, control=None):
        yield from itertools.islice(batches(loader, shares, control), done)
        os.kill(os.getpid(), signal.SIGINT)
        raise WorkersDoNotStart("see their error above")

    monkeypatch.setattr(PromptLoader, "batches", interrupted)
    assert train.main(command(1, tmp_path, world, "--eval_samples", str(5 * (1 - done)))[2:]) == 130
    assert [c.name for c in checkpoints(tmp_path)] == ["checkpoint-1"] * done
    last = capfd.readouterr().err.splitlines()[-1]
    assert "; the same command goes on from" in last and "error" not in last


@pytest.mark.slow
@pytest.mark.parametrize("death", ["os.kill(os.getpid(), signal.SIGKILL)", "raise RuntimeError('odd')"])
def test_a_process_that_waits_for_a_dead_one_for_ever_is_ended(tmp_path, death):
    """As in a collective of NCCL: the main thread does not come back, and torchrun's SIGTERM only asks it to save."""
    script = tmp_path / "waits.py"
    script.write_text(
        "import os, signal, sys, time\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from grpo.engine import distributed\n"
        "from grpo.run.stops import listening\n"
        "distributed.start('cpu')\n"
        "if distributed.rank() == 1:\n"
        "    open(__file__ + '.died', 'w').close()\n"
        f"    {death}\n"
        "with listening():\n"
        "    print('waits', flush=True)\n"
        "    time.sleep(600)\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "3", str(script)]
    done = subprocess.run(torchrun, capture_output=True, text=True, timeout=90)
    took = time.time() - Path(f"{script}.died").stat().st_mtime
    assert done.stdout.count("waits") == 2 and took < 20, "10 on an idle machine; torchrun itself kills after 30"
    assert done.stderr.count("waits.py: error: another process is gone, see its message or torchrun's") == 2
    assert ("Signal 9 (SIGKILL)" in done.stderr) == ("SIGKILL" in death)


@pytest.fixture
def watched(monkeypatch):
    """(a function that watches such processes until this one would be ended, torchrun's store)."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setattr(distributed, "GRACE", 0.1)
    monkeypatch.setattr(distributed, "finished", threading.Event())
    ends = []
    monkeypatch.setattr(os, "_exit", ends.append)
    return lambda *pids: distributed.watch_ranks(pids) or ends, store


def test_a_dead_process_of_this_node_ends_this_one_and_is_told_to_other_nodes(watched, capfd):
    watch, store = watched
    child = subprocess.Popen(["sleep", "60"])
    timer = threading.Timer(0.5, lambda: child.kill() or child.wait())
    timer.start()
    assert watch(os.getpid(), child.pid) == [3] and not timer.is_alive()
    assert "error: another process is gone, see its message or torchrun's" in capfd.readouterr().err
    assert watch(os.getpid()) == [3, 3], "on another node"


def test_a_process_that_leaves_when_all_are_done_ends_nobody(watched, capfd):
    watch, _ = watched
    child = subprocess.Popen(["true"])
    child.wait()
    distributed.finished.set()
    assert watch(child.pid) == [] and not capfd.readouterr().err


def test_updates_that_keep_failing_stop_the_run(world, tmp_path, monkeypatch, capsys):
    """A gradient that is not finite leaves weights alone, is counted, and ends the run once it has come N times."""
    monkeypatch.setattr(update, "clip_grad_norm", lambda policy, limit: float("nan"))
    flags = command(1, tmp_path, world, "--steps", "9", "--max_bad_updates", "3")[2:]
    assert train.main(flags) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("train.py: error:") and "--learning_rate" in error and "--max_bad_updates" in error
    assert [row["updates_skipped"] for row in trained(tmp_path)] == [1, 1, 1]


def test_only_failures_in_a_row_count():
    config, count = SimpleNamespace(max_bad_updates=2), 0
    for skipped in (1, 0, 1, 0, 1):
        count = count_bad(count, {"updates_skipped": skipped}, config, 0)
    with pytest.raises(RunError, match="2 steps in a row"):
        count_bad(count, {"updates_skipped": 1}, config, 5)


def test_out_of_memory_names_samples_tokens_and_flags(world, tmp_path, monkeypatch, capsys):
    def full(*given, **named):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nsecond line")

    monkeypatch.setattr(train, "update", full)
    assert train.main(command(1, tmp_path, world)[2:]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    for words in ("out of memory on ", ".jsonl:", " tokens)", "--max_frames", "--prompts_per_forward", "Tried to"):
        assert words in error
    assert "second line" not in error and "--freeze_vision" in error


@pytest.mark.parametrize(
    "allocate", [lambda: torch.empty(10**16), lambda: torch.empty(2**62, 2**20), lambda: [0] * 10**17]
)
def test_a_cpu_out_of_memory_gets_the_answer_of_a_gpu(world, tmp_path, monkeypatch, capsys, allocate):
    """There torch raises a plain RuntimeError, and Python a MemoryError without words."""
    monkeypatch.setattr(train, "update", lambda *given, **named: allocate())
    assert train.main(command(1, tmp_path, world)[2:]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "error: out of memory on " in error and " tokens)" in error and "--group_size" in error


@pytest.mark.parametrize("module", ["grpo.engine.checkpoint", "video.pool"])
def test_a_limit_on_threads_is_one_line(world, tmp_path, monkeypatch, capsys, module):
    """Of the thread that writes checkpoints, and of those that serve decoding workers."""
    begin = threading.Thread.start

    def start(thread):
        if inspect.currentframe().f_back.f_globals["__name__"] == module:
            raise RuntimeError("can't start new thread")
        begin(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    assert train.main(command(1, tmp_path, world, "--workers", str(int(module == "video.pool")))[2:]) == 2
    assert "the system starts no more threads: lower --workers" in capsys.readouterr().err.splitlines()[-1]


def test_out_of_memory_before_the_first_step_is_one_line_too(world, tmp_path, monkeypatch, capsys):
    def full(*given, **named):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(train, "build_policy", full)
    assert train.main(command(1, tmp_path, world)[2:]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "error: out of memory on weights or an evaluation: lower " in error
    assert "for weights take more processes, or set --lora_rank" in error


def test_out_of_memory_in_an_evaluation_names_its_flag():
    config = SimpleNamespace(eval_batch=4, activation_checkpointing="selective", freeze_vision=True)

    message = memory_message([], config, torch.OutOfMemoryError("CUDA out of memory."))
    assert re.search("an evaluation: lower .*--eval_batch.*or set --activation_checkpointing full", message)


def test_out_of_memory_names_the_longest_three_prompts():
    config = SimpleNamespace(
        prompts_per_forward=1, prompts_per_rollout=1, activation_checkpointing="full", freeze_vision=True
    )
    prompts = [SimpleNamespace(sample=SimpleNamespace(key=f"f:{n}"), input_ids=[0] * n) for n in (3, 9, 5, 7, 1)]
    message = memory_message(prompts, config, MemoryError())
    assert message.startswith("out of memory on f:9 (9 tokens), f:7 (7 tokens), f:5 (5 tokens) and 2 more: lower ")


def test_workers_that_do_not_start_are_one_line(capsys):
    assert exit_code("train.py", WorkersDoNotStart("see their\nerror above")) == 2
    assert capsys.readouterr().err == "train.py: error: see their error above\n"


def test_a_lost_process_is_told_from_other_errors():
    assert lost_process(RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:1"))
    assert lost_process(torch.distributed.DistBackendError("NCCL error"))
    assert not lost_process(RuntimeError("shape mismatch"))
