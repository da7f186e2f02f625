"""Calls in worker processes that may hang, crash or be killed: each has a time limit, and costs only itself.

Every worker has a pipe and a thread of its own and shares no lock with the others, so that one killed at any moment, by
the system for its memory or by a decoder's crash, can neither stop nor break the rest.
"""

import multiprocessing
import multiprocessing.resource_tracker
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from multiprocessing.connection import Connection, wait

# imported once, by the server that workers are forked from: a replaced worker then starts in a fraction of a second
PRELOAD = (
    "torch",
    "torchvision.transforms.functional",
    "video.prompt",
    "transformers.models.qwen2_vl.processing_qwen2_vl",
    "transformers.models.qwen2_vl.video_processing_qwen2_vl",
    "transformers.models.qwen2_vl.image_processing_qwen2_vl",
    "transformers.models.qwen2_5_vl.processing_qwen2_5_vl",
    "transformers.models.qwen2.tokenization_qwen2",
)
SLOW_SECONDS = 60.0  # after each of which a start that still lasts says so
START_SECONDS = 600.0  # imports on a busy machine; then the worker counts as one that does not start
STARTS = 3  # attempts, one after the other, before a call fails because no worker starts
STARTS_AND_ENDS = threading.Lock()  # a start asks after all others, and an exit code can be read once
ORPHAN_SECONDS = 30.0  # after its limit a worker that hangs ends itself, should nobody be left to end it


class WorkerDied(RuntimeError):
    """The process that ran a call ended. The text gives its exit code; -9 is SIGKILL, -11 a crash."""


class WorkersDoNotStart(RuntimeError):
    """Processes end before they could take a call; their own error is printed above."""


class WorkerPool:
    """Runs `function(*args)` in `count` processes; `function` and its arguments are pickled into them.

    `submit` gives a Future that raises TimeoutError after `timeout` seconds of running, WorkerDied where the process
    ended, or what the call raised. Workers start at once. close() ends them all, whatever they do.
    """

    def __init__(self, function: Callable, count: int, timeout: float):
        self.function, self.timeout = function, timeout
        self._context, self._tasks = _context(), queue.SimpleQueue()
        self._said = set()  # reasons, each printed once
        self._closed, self._close = multiprocessing.Pipe(duplex=False)  # ready for reading once closed
        self.workers: set[_Worker] = set()  # all that run
        self._threads = [threading.Thread(target=self._serve, daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def submit(self, *args) -> Future:
        future = Future()
        self._tasks.put((future, args))
        return future

    def close(self) -> None:
        if not self._close.closed:
            self._close.close()
            for worker in list(self.workers):
                worker.kill()  # a thread may be receiving from one that has been stopped
            for _ in self._threads:
                self._tasks.put(None)
            for thread in self._threads:
                thread.join()

    def _serve(self) -> None:
        """One thread: starts a worker, hands it calls one by one, replaces it when it dies or overruns."""
        _block_interrupts()
        worker = None
        while not self._close.closed:
            worker = worker or self._start()
            if (task := self._tasks.get()) is None:
                break
            future, args = task
            if not future.set_running_or_notify_cancel():
                continue
            try:
                for _ in range(STARTS):
                    worker = worker or self._start()
                    if worker and worker.begin(args):
                        break
                    if worker:
                        worker.end()
                    worker = None
                else:
                    raise WorkersDoNotStart("worker processes end before they take a call; see their error above")
                failed, value = worker.finish()
                if failed:
                    raise value
                future.set_result(value)
            except Exception as error:
                if worker and isinstance(error, (TimeoutError, WorkerDied, WorkersDoNotStart)):
                    worker.end()
                    worker = None
                future.set_exception(error)
        if worker:
            worker.end()

    def _start(self) -> "_Worker | None":
        """A new worker; None, with the reason printed, where the system cannot start one just now."""
        try:
            return _Worker(self)
        except Exception as error:  # or this thread would end, and its calls would wait for ever
            text = f"a worker process could not be started: {type(error).__name__}: {error}"
            with STARTS_AND_ENDS:
                if text not in self._said:
                    print(text, file=sys.stderr)
                self._said.add(text)
            return None


class _Worker:
    """A process and this end of its pipe. It says "ready", then for each call "begun" and the outcome."""

    def __init__(self, pool: WorkerPool):
        self.pool, self.ready = pool, False
        self.pipe, other = multiprocessing.Pipe()
        args = (other, pool.function, pool.timeout + ORPHAN_SECONDS)
        self.process = pool._context.Process(target=_work, args=args, daemon=True)
        with STARTS_AND_ENDS:
            self.process.start()
        pool.workers.add(self)
        other.close()  # so that its end reads as the end of the pipe

    def begin(self, args: tuple) -> bool:
        """Whether the worker took the call; where not, it had died before, and the call is not to blame."""
        try:
            if not self.ready:
                self._await_start()
                self.ready = True
            self.pipe.send(args)
            self._receive(self.pool.timeout)  # or it has been stopped, say by SIGSTOP
        except (OSError, EOFError):  # TimeoutError is an OSError
            return False
        return True

    def _await_start(self) -> None:
        for minutes in range(1, int(START_SECONDS / SLOW_SECONDS)):
            try:
                return self._receive(SLOW_SECONDS)
            except TimeoutError:
                text = f"a worker process has been starting for {minutes * SLOW_SECONDS:g} s: is disk or machine slow?"
                print(text, file=sys.stderr, flush=True)
        return self._receive(SLOW_SECONDS)

    def finish(self) -> tuple[bool, object]:
        """(whether the call raised, what it raised or returned)."""
        try:
            return self._receive(self.pool.timeout)
        except EOFError as error:
            raise WorkerDied(f"exit code {self._exit_code()}") from error

    def kill(self) -> None:
        with STARTS_AND_ENDS:
            self.process.kill()

    def end(self) -> None:
        self.kill()
        self._exit_code()
        self.pool.workers.discard(self)
        self.pipe.close()

    def _exit_code(self) -> int:
        """Of the process, once it has ended."""
        wait([self.process.sentinel])
        with STARTS_AND_ENDS:
            self.process.join()
            return self.process.exitcode

    def _receive(self, seconds: float):
        """Its next message. TimeoutError; EOFError where it has ended; WorkersDoNotStart where the pool was closed.

        Once a message has begun, its rest has as long again: a worker that is stopped while it sends is killed then.
        """
        ready = wait([self.pipe, self.pool._closed], seconds)
        if self.pool._closed in ready:
            raise WorkersDoNotStart("the pool was closed")
        if not ready:
            raise TimeoutError
        deadline, timer = time.monotonic() + seconds, threading.Timer(seconds, self.kill)
        timer.start()
        try:
            return self.pipe.recv()
        except (OSError, EOFError) as error:  # killed in the middle of a message: OSError itself
            if self.pool._close.closed:
                raise WorkersDoNotStart("the pool was closed") from error
            if time.monotonic() >= deadline:
                raise TimeoutError from error
            raise EOFError(str(error)) from error  # TimeoutError is an OSError too
        finally:
            timer.cancel()


def _work(pipe: Connection, function: Callable, longest: float) -> None:
    """The worker process: answers calls until its pipe closes; ends itself where one takes above `longest` seconds."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the trainer ends its workers
    if torch := sys.modules.get("torch"):  # imported, where `function` needs it, when that was unpickled
        torch.set_num_threads(1)  # processes, not threads, work in parallel
    alarm = getattr(signal, "setitimer", lambda *_: None)  # its default action ends a process even inside C code
    try:
        pipe.send("ready")
        while True:
            args = pipe.recv()
            alarm(getattr(signal, "ITIMER_REAL", 0), longest)
            pipe.send("begun")
            try:
                outcome = False, function(*args)
            except Exception as error:
                outcome = True, error
            pipe.send(outcome)
            alarm(getattr(signal, "ITIMER_REAL", 0), 0)
    except (EOFError, ConnectionError):
        return


def _block_interrupts() -> None:
    """From here on processes that this thread starts, and the server that forks for it, never notice Ctrl-C: it reaches
    the whole group, and would break their imports. To be called in a thread of its own; Windows has no such mask."""
    if hasattr(signal, "pthread_sigmask"):
        multiprocessing.resource_tracker.ensure_running()  # first: where it has to start, it unblocks the signal again
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


def _context():
    """A way to start processes that inherits no thread, lock or CUDA state from the trainer."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))
    return context
