"""The user's rewards: each file is imported and called in a process that can be killed.

A thread cannot be killed: `re.match(r"(a+)+$", "a" * 40 + "b")` holds the interpreter for hours, and neither a time
limit nor a signal handler of its process runs meanwhile.
"""

import asyncio
import contextlib
import copy
import functools
import importlib.util
import inspect
import math
import multiprocessing
import numbers
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from video.formats import printable  # also loads the class of the samples, before a user's folder is first on sys.path

IMPORT_SECONDS = 120.0  # for the user's file and all that it imports
ORPHAN_SECONDS = 5.0  # if the trainer was killed, a process that holds the interpreter ends so long after its limit
_START = "import sys; fd, path, *sys.path = sys.argv[1:]; from rewards.user import _serve; _serve(int(fd), path)"


class RewardFile:
    """A user's file in a process of its own: what the file does costs scores, never the run.

    The process has the file's folder first on its sys.path, and keeps what the file holds (a client, a model) from
    call to call. If the process is late or ends, the calls without a result fail, and the next call starts another
    process, which imports the file again.
    """

    def __init__(self, path: str):
        self.path = path
        self._process, self._pipe, self._functions = None, None, {}
        self._lock = threading.RLock()  # of the pipe

    def functions(self) -> dict[str, int]:
        """The file's functions: name -> how many arguments it needs, 0 if that is unknown.

        Raises ImportError, with one line that says why, if the file cannot be imported, and OSError if no process can
        be started.
        """
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()
                ((self._functions, message),) = self._receive(1, IMPORT_SECONDS)
                if message:
                    self._end()
                    raise ImportError(f"{self.path} cannot be imported: {message}")
            return self._functions

    def call(self, name: str, calls: list[tuple], seconds: float) -> list[tuple[float, str]]:
        """For each tuple of arguments of the function `name`: (its value, ""), or (0.0, one line why the call failed).

        The calls run at once: plain functions in a thread each, `async def` functions in one event loop, which is the
        same in every call. Each call gets a copy of its arguments. Calls without a result after `seconds` fail.
        """
        with self._lock:
            try:
                self.functions()
            except (ImportError, OSError) as error:
                return [(0.0, str(error))] * len(calls)
            return self._receive(len(calls), seconds, (name, calls, seconds))

    def _start(self) -> None:
        self._pipe, other = multiprocessing.Pipe()
        with other:
            fd = other.fileno()
            command = [sys.executable, "-u", "-c", _START, str(fd), self.path, *sys.path]
            # A new session: Ctrl-C does not reach the process, because the trainer first ends its step.
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[fd], start_new_session=True)

    def _kill(self) -> None:
        """Kills the process and its forks. Also ends the pipe, which a fork in another session may hold open."""
        if self._process.returncode is None:  # until then no other process can have its number
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self._pipe.fileno())) as end:
            end.shutdown(socket.SHUT_RDWR)

    def _end(self) -> int:
        """Kills the process, if it still runs, and returns its exit code."""
        self._kill()
        self._pipe.close()
        return self._process.wait()

    def _receive(self, count: int, seconds: float, *messages: tuple) -> list[tuple]:
        """Sends the messages, returns `count` outcomes as `call` does. Ends the process if one is missing or late."""
        outcomes, exit_code, deadline = {}, 0, time.monotonic() + seconds
        timer = threading.Timer(seconds, self._kill)  # a time limit on receiving alone could hang in sending
        timer.start()
        try:
            with contextlib.suppress(EOFError, OSError):
                for message in messages:
                    self._pipe.send(message)
                while len(outcomes) < count:
                    i, outcome = self._pipe.recv()
                    outcomes[i] = outcome
                self._pipe.send(("", [], 0.0))  # the time limit of these calls is over
        finally:  # also after Ctrl-C: the next call must not take these outcomes for its own
            timer.cancel()
            timer.join()
            late = time.monotonic() > deadline
            if late or len(outcomes) < count:
                exit_code = self._end()
        reason = f"no result within {seconds:g} s" if late else f"its process ended with exit code {exit_code}"
        return [outcomes.get(i, (0.0, reason)) for i in range(count)]


reward_file = functools.cache(RewardFile)  # one process for a file, however many rewards it holds


def _serve(descriptor: int, path: str) -> None:
    """The process: imports the file, then makes the calls that it is sent, until the trainer is gone."""
    pipe, sending, loop = Connection(descriptor), threading.Lock(), asyncio.new_event_loop()
    threading.Thread(target=_run_forever, args=(loop,), daemon=True).start()
    sys.argv = [path]
    sys.path.insert(0, str(Path(path).parent))
    spec = importlib.util.spec_from_file_location("reward_file_" + Path(path).stem, path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look there

    def load() -> dict[str, int]:
        spec.loader.exec_module(module)
        return {name: _attempt(arguments_needed, value)[0] for name, value in vars(module).items() if callable(value)}

    def work(i: int, function: Callable, *args) -> None:
        outcome = _attempt(function, *args)
        with sending:
            pipe.send((i, outcome))

    try:
        # If the trainer is killed, the system ends this process after the limit, even inside C code.
        signal.setitimer(signal.ITIMER_REAL, IMPORT_SECONDS + ORPHAN_SECONDS)
        work(0, load)
        while True:
            name, calls, seconds = pipe.recv()
            signal.setitimer(signal.ITIMER_REAL, seconds and seconds + ORPHAN_SECONDS)  # 0: never
            for i, call in enumerate(calls):
                args = (i, _reward_value, getattr(module, name), call, loop)
                threading.Thread(target=work, args=args, daemon=True).start()
    except (EOFError, OSError):
        os.killpg(0, signal.SIGKILL)  # whatever its threads do, and with all that it has forked


def _run_forever(loop: asyncio.AbstractEventLoop) -> None:
    while True:  # SystemExit in one coroutine fails its call and stops the loop: the other calls need it
        with contextlib.suppress(BaseException):
            loop.run_forever()


def _attempt(function: Callable, *args) -> tuple:
    """(what the function returns, ""), or (0.0, one line that says what it raises).

    The one place that swallows errors, because a user's code must not end a run of days. The training log shows them.
    """
    try:
        return function(*args), ""
    except BaseException as error:
        return 0.0, _one_line(error)


def _reward_value(function: Callable, call: tuple, loop: asyncio.AbstractEventLoop) -> float:
    value = function(*copy.deepcopy(call))
    if inspect.iscoroutine(value):
        value = asyncio.run_coroutine_threadsafe(value, loop).result()
    value = value.item() if hasattr(value, "item") else value  # NumPy's bool, a tensor of one number
    if not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise TypeError(f"returned {value!r}, not a finite number")
    return float(value)


def arguments_needed(function: Callable) -> int:
    """How many positional arguments the function needs. Raises ValueError for some functions written in C."""
    parameters = inspect.signature(function).parameters.values()
    return sum(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)


def _one_line(error: BaseException) -> str:
    try:
        text = f"{type(error).__name__}: {error}"
    except Exception as second:
        text = f"{type(error).__name__}: its message raises {type(second).__name__}"
    return printable(" ".join(text.split()), 300)
