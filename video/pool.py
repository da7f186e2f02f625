"""Calls in worker processes that may hang, crash or be killed: each has a time limit, and costs only itself.

A worker is a thread and a process with a pipe between them, and shares no lock with the others. So a process that is
killed at any moment, by the system for its memory or by a decoder's crash, can neither stop nor break the rest.
"""

import multiprocessing
import multiprocessing.resource_tracker
import queue
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from multiprocessing.connection import Connection, wait

# Imported once, by the server that processes are forked from: a replaced process then starts in a fraction of a second.
# The modules of a processor are those that this process has loaded.
PRELOAD = ("torch", "torchvision.transforms.functional", "video.prompt")
OF_PROCESSORS = re.compile(r"transformers\.models\.\w+\.((image_|video_)?processing|tokenization)_\w+")
SLOW_SECONDS = 60.0  # a start that lasts says so each time that these have passed
START_SECONDS = 600.0  # imports on a busy machine; then the process counts as one that does not start
STARTS = 3  # attempts, one after the other, before a call fails because no process starts
STARTS_AND_ENDS = threading.Lock()  # starting a process asks after all others, and an exit code can be read only once
ORPHAN_SECONDS = 30.0  # after its limit a process that hangs ends itself, if the trainer is no longer there to end it


class WorkerDied(RuntimeError):
    """The process that ran a call ended. The text gives its exit code; -9 is SIGKILL, -11 a crash."""


class WorkersDoNotStart(RuntimeError):
    """No process takes a call: the text says why, or the processes have printed their own error."""


class WorkerPool:
    """Runs `function(*args)` in `count` processes; `function` and its arguments are pickled into them.

    `submit` gives a Future that raises TimeoutError after `timeout` seconds of running, WorkerDied if the process
    ended, or what the call raised. Processes start at once. close() ends them all, whatever they do.
    """

    def __init__(self, function: Callable, count: int, timeout: float):
        self.function, self.timeout, self.closed = function, timeout, False
        self.tasks = queue.SimpleQueue()  # (Future, arguments) of each call, None for the end
        # a forked server inherits no thread, lock or CUDA state of the trainer, as a fork of the trainer would
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload([*PRELOAD, *filter(OF_PROCESSORS.fullmatch, sys.modules)])
        self._workers = [_Worker(self) for _ in range(count)]

    def submit(self, *args) -> Future:
        future = Future()
        self.tasks.put((future, args))
        return future

    def close(self) -> None:
        self.closed = True
        for _ in self._workers:
            self.tasks.put(None)
        while running := [worker for worker in self._workers if worker.thread.is_alive()]:
            for worker in running:  # each time: a process may just have been started
                worker.kill()
                worker.thread.join(0.05)


class _Worker:
    """A thread that hands calls, one by one, to a process of its own, which it replaces when that dies or overruns.

    The process says "ready" once, then for each call "begun" and the outcome.
    """

    def __init__(self, pool: WorkerPool):
        self.pool, self.process, self.pipe = pool, None, None
        self.reason = ""  # why no process could be started
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        # From here on the processes that this thread starts, and the server that forks for it, never notice Ctrl-C: it
        # reaches the whole group, and would break their imports. The tracker comes first: its start unblocks SIGINT.
        multiprocessing.resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        while not self.pool.closed:
            self._start_process()
            if (task := self.pool.tasks.get()) is None:
                break
            future, args = task
            if not future.set_running_or_notify_cancel():
                continue
            try:
                failed, value = self._call(args)
            except Exception as error:  # or this thread would end, and its calls would wait for ever
                if isinstance(error, (TimeoutError, WorkerDied)):
                    self._end_process()
                failed, value = True, WorkersDoNotStart("the pool was closed") if self.pool.closed else error
            if failed:
                future.set_exception(value)
            else:
                future.set_result(value)
        self._end_process()

    def kill(self) -> None:
        """Kills the process; a thread that waits for it notices."""
        with STARTS_AND_ENDS:
            if process := self.process:
                process.kill()

    def _start_process(self) -> None:
        """Starts a process, unless there is one, and waits until it is ready. There is no process afterwards if the
        system cannot start one just now (then `reason` says why), or if it has ended (it prints its own error)."""
        if self.process:
            return
        try:
            self.pipe, other = multiprocessing.Pipe()
            args = (other, self.pool.function, self.pool.timeout + ORPHAN_SECONDS)
            process = self.pool.context.Process(target=_work, args=args, daemon=True)
            with STARTS_AND_ENDS:
                process.start()
            self.process = process
            other.close()  # so that the end of the process is the end of the pipe
            for count in range(1, int(START_SECONDS / SLOW_SECONDS)):
                if self.pipe.poll(SLOW_SECONDS):
                    break
                text = f"a worker process has been starting for {count * SLOW_SECONDS:g} s: is disk or machine slow?"
                print(text, file=sys.stderr, flush=True)
            self._receive(SLOW_SECONDS)
        except Exception as error:
            self.reason = f"one could not be started: {type(error).__name__}: {error}" if self.process is None else ""
            self._end_process()

    def _call(self, args: tuple) -> tuple[bool, object]:
        """(whether the call raised, what it raised or returned)."""
        for _ in range(STARTS):
            self._start_process()
            # If the process does not take the call, it had died or was stopped, and the call is not to blame.
            with suppress(OSError, WorkerDied):  # TimeoutError is an OSError
                if self.process:
                    self.pipe.send(args)
                    self._receive(self.pool.timeout)
                    break
            self._end_process()
        else:
            reason = self.reason or "they end before they take a call; see their error above"
            raise WorkersDoNotStart(f"worker processes do not start: {reason}")
        return self._receive(self.pool.timeout)

    def _receive(self, seconds: float):
        """The next message of the process. Raises TimeoutError, or WorkerDied if the process has ended.

        Once a message has begun, its rest has as long again: a process that is stopped while it sends is killed then.
        """
        if self.pipe.poll(seconds):
            deadline, timer = time.monotonic() + seconds, threading.Timer(seconds, self.kill)
            timer.start()
            try:
                return self.pipe.recv()
            except (OSError, EOFError) as error:  # OSError: killed in the middle of a message
                if time.monotonic() < deadline:
                    raise WorkerDied(f"exit code {self._exit_code()}") from error
            finally:
                timer.cancel()
        raise TimeoutError

    def _exit_code(self) -> int:
        """The exit code of the process, once it has ended."""
        wait([self.process.sentinel])
        with STARTS_AND_ENDS:
            self.process.join()
            return self.process.exitcode

    def _end_process(self) -> None:
        if self.process:
            self.kill()
            self._exit_code()
            self.pipe.close()
            self.process = None


def _work(pipe: Connection, function: Callable, longest: float) -> None:
    """The process: answers calls until its pipe closes; ends itself if a call takes more than `longest` seconds."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the trainer ends its workers
    if torch := sys.modules.get("torch"):  # imported, if `function` needs it, when that was unpickled
        torch.set_num_threads(1)  # processes, not threads, work in parallel
    try:
        pipe.send("ready")
        while True:
            args = pipe.recv()
            signal.setitimer(signal.ITIMER_REAL, longest)  # its default action ends a process even inside C code
            pipe.send("begun")
            try:
                outcome = False, function(*args)
            except Exception as error:
                outcome = True, error
            pipe.send(outcome)
            signal.setitimer(signal.ITIMER_REAL, 0)
    except (EOFError, ConnectionError):
        return
