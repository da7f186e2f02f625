"""Worker processes that are killed at any moment, hang, or lose their trainer."""

import functools
import gc
import os
import random
import signal
import struct
import subprocess
import sys
import time
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
from video_helpers import assert_gone

import video.pool
from video.pool import WorkerDied, WorkerPool, WorkersDoNotStart


def work(what, when=0.0):
    time.sleep(max(0.0, when - time.monotonic()))
    if what == "die":
        os._exit(7)
    if what == "sleep":
        time.sleep(600)
    if what == "raise":
        raise KeyError("k")
    if what == "slow":
        time.sleep(0.3)
    return os.getpid()


def send_in_two(what):
    if what in ("half", "stop"):  # a message's length, a part of it, and the end: killed or stopped in mid-sending
        for pipe in (item for item in gc.get_objects() if isinstance(item, Connection)):
            os.write(pipe.fileno(), struct.pack("!i", 2**20) + bytes(1000))
        os.kill(os.getpid(), signal.SIGKILL if what == "half" else signal.SIGSTOP)
    return "whole"


class DoesNotStart:
    """Cannot be unpickled in a worker."""

    def __reduce__(self):
        return os._exit, (3,)


@pytest.fixture
def pool():
    pool = WorkerPool(work, 1, timeout=2.0)
    yield pool
    pool.close()


@pytest.mark.timeout(60)
def test_each_call_costs_only_itself(pool):
    calls = [pool.submit(what) for what in ("", "die", "", "raise", "sleep", "", "slow")]
    first, second, third, last = (calls[n].result() for n in (0, 2, 5, 6))
    with pytest.raises(WorkerDied, match="exit code 7"):
        calls[1].result()
    with pytest.raises(KeyError):
        calls[3].result()
    with pytest.raises(TimeoutError):
        calls[4].result()
    assert first != second != third == last
    pool.close()
    pool.close()
    assert_gone([first, second, third])


@pytest.mark.timeout(60)
def test_a_worker_killed_between_calls_loses_none(pool):
    for _ in range(3):
        pid = pool.submit("").result()
        os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
        assert pool.submit("").result() != pid


@pytest.mark.timeout(60)
def test_a_worker_that_is_stopped_while_idle_is_replaced(pool):
    pid = pool.submit("").result()
    os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    assert pool.submit("").result(timeout=50) != pid
    assert time.monotonic() - began < 15, "2 s, the limit of a call, and a start"
    assert_gone([pid])


@pytest.mark.timeout(60)
def test_a_worker_killed_while_it_sends_costs_that_call_alone():
    """In the middle of a message: recv raises a plain OSError then."""
    pool = WorkerPool(send_in_two, 1, timeout=30)
    for _ in range(3):
        with pytest.raises(WorkerDied, match="exit code -9"):
            pool.submit("half").result(timeout=30)
    assert pool.submit("").result(timeout=30) == "whole"
    pool.close()


@pytest.mark.timeout(60)
def test_a_worker_stopped_while_it_sends_is_killed_at_the_limit():
    pool = WorkerPool(send_in_two, 1, timeout=1.0)
    with pytest.raises(TimeoutError):
        pool.submit("stop").result(timeout=30)
    assert pool.submit("").result(timeout=30) == "whole"
    pool.close()


@pytest.mark.timeout(60)
def test_closing_ends_a_worker_stopped_while_it_sends():
    pool = WorkerPool(send_in_two, 1, timeout=600)
    assert pool.submit("").result(timeout=30) == "whole"
    call = pool.submit("stop")
    time.sleep(0.5)
    began = time.monotonic()
    pool.close()
    assert time.monotonic() - began < 5
    with pytest.raises(WorkersDoNotStart, match="the pool was closed"):
        call.result(timeout=0)


class SlowToArrive:
    """`work`, which takes a worker a second to unpickle."""

    def __call__(self, argument):
        return work(argument)

    def __getstate__(self):
        return {"seconds": 1.0}

    def __setstate__(self, state):
        time.sleep(state["seconds"])


@pytest.mark.timeout(60)
def test_a_start_that_takes_long_says_so_while_it_lasts(monkeypatch, capfd):
    monkeypatch.setattr(video.pool, "SLOW_SECONDS", 0.1)
    pool = WorkerPool(SlowToArrive(), 1, timeout=30)
    assert pool.submit("").result(timeout=50) != os.getpid()
    pool.close()
    assert "a worker process has been starting for 0.1 s: is disk or machine slow?" in capfd.readouterr().err


@pytest.mark.timeout(60)
def test_a_worker_killed_in_a_call_loses_that_one():
    pool = WorkerPool(work, 2, timeout=30)
    pids = {pool.submit("slow").result() for _ in range(2)} | {
        f.result() for f in [pool.submit("slow") for _ in range(2)]
    }
    hung = [pool.submit("sleep") for _ in range(2)]
    time.sleep(0.3)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    for call in hung:
        with pytest.raises(WorkerDied, match="exit code -9"):
            call.result(timeout=10)
    assert pool.submit("").result(timeout=20) not in pids
    pool.close()


@pytest.mark.timeout(60)
def test_workers_that_end_together_each_give_their_own_exit_code(monkeypatch):
    """`start` of one process asks after all others, so two threads can read one exit code: one gets nothing."""
    read, seconds = forkserver.read_signed, random.Random(0)
    monkeypatch.setattr(forkserver, "read_signed", lambda pipe: time.sleep(seconds.uniform(0, 0.2)) or read(pipe))
    pool = WorkerPool(work, 4, timeout=30)
    for _ in range(3):
        ready = time.monotonic() + 1.5
        for call in [pool.submit("die", ready) for _ in range(4)]:
            with pytest.raises(WorkerDied, match="exit code 7"):
                call.result(timeout=30)
    pool.close()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("failures", [2, 3])
def test_a_start_that_the_system_refuses_is_tried_again_and_then_an_error(failures, monkeypatch):
    """As when the server that forks was killed, or no file can be opened any more."""
    start, left = ForkServerProcess.start, [EOFError(), OSError(), EOFError(), OSError("Too many open files")]
    del left[: 3 - failures]  # one at once, the others when the call comes

    def starting(process):
        if left:
            raise left.pop(0)
        return start(process)

    monkeypatch.setattr(ForkServerProcess, "start", starting)
    pool = WorkerPool(work, 1, timeout=30)
    if failures < video.pool.STARTS:
        assert pool.submit("").result(timeout=50) != os.getpid()
    else:
        reason = "worker processes do not start: one could not be started: OSError: Too many open files"
        with pytest.raises(WorkersDoNotStart, match=reason):
            pool.submit("").result(timeout=50)
        assert pool.submit("").result(timeout=50) != os.getpid(), "the next call has its own attempts"
    pool.close()


@pytest.mark.timeout(60)
def test_ctrl_c_does_not_reach_workers_or_the_server_that_forks_them_while_they_start(tmp_path):
    """To the whole group, from before the server has imported what it preloads until a worker answers."""
    (tmp_path / "preloaded.py").write_text("import time; time.sleep(1)")
    (tmp_path / "script.py").write_text(
        "import os, signal, time, video.pool as p\n"
        "if __name__ == '__main__':\n"
        "    signal.signal(signal.SIGINT, lambda *_: None)\n"
        "    p.PRELOAD = ('preloaded',); pool = p.WorkerPool(time.sleep, 2, 20.0); calls = []\n"
        "    for _ in range(40):\n"
        "        os.killpg(0, signal.SIGINT); calls.append(pool.submit(0)); time.sleep(0.05)\n"
        "    print([call.result() for call in calls] == [None] * 40); pool.close()\n"
    )
    root = str(Path(__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py")], capture_output=True, text=True, start_new_session=True,
        env=os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{tmp_path}"}, timeout=50,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("True\n", "")


@pytest.mark.timeout(60)
def test_every_call_says_why_no_worker_starts(monkeypatch):
    def refuse(_):
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(ForkServerProcess, "start", refuse)
    pool = WorkerPool(work, 3, timeout=30)
    for call in [pool.submit("") for _ in range(3)]:
        with pytest.raises(WorkersDoNotStart, match="one could not be started: ConnectionRefusedError: .*refused"):
            call.result(timeout=50)
    pool.close()


@pytest.mark.timeout(60)
def test_closing_ends_workers_that_hang():
    pool = WorkerPool(work, 2, timeout=600)
    pid = pool.submit("").result()
    calls = [pool.submit("sleep") for _ in range(5)]
    time.sleep(0.2)
    began = time.monotonic()
    pool.close()
    assert time.monotonic() - began < 5
    assert_gone([pid])
    assert not any(call.done() and call.exception() is None for call in calls)


@pytest.mark.timeout(60)
def test_workers_that_do_not_start_are_an_error_and_no_endless_loop(capfd):
    pool = WorkerPool(functools.partial(work, DoesNotStart()), 1, timeout=5)
    with pytest.raises(WorkersDoNotStart, match="they end before they take a call; see their error above"):
        pool.submit().result(timeout=50)
    pool.close()


@pytest.mark.timeout(60)
def test_a_hung_worker_does_not_outlive_a_killed_trainer(tmp_path):
    code = (
        "import multiprocessing, time, video.pool as p\n"
        "if __name__ == '__main__':\n"
        "    p.ORPHAN_SECONDS, p.PRELOAD = 0.5, (); pool = p.WorkerPool(time.sleep, 1, 1.0)\n"
        "    pool.submit(0).result(); print(multiprocessing.active_children()[0].pid, flush=True)\n"
        "    pool.submit(600); time.sleep(60)\n"
    )
    (tmp_path / "script.py").write_text(code)
    root = str(Path(__file__).parent.parent)
    trainer = subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py")], stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": root}
    )
    pid = int(trainer.stdout.readline())
    time.sleep(0.3)
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()
    time.sleep(2)
    assert_gone([pid])
