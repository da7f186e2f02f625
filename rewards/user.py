"""The user's own rewards: each file is imported and called in a process that can be killed.

A thread cannot be killed: `re.match(r"(a+)+$", "a" * 40 + "b")` holds the interpreter for hours, and neither a time
limit nor a signal handler of its process runs meanwhile.
"""

import asyncio
import contextlib
import copy
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
from multiprocessing.connection import Connection
from pathlib import Path

from video.formats import printable  # and so the class of the samples, before a user's folder is first on sys.path

IMPORT_SECONDS = 120.0  # for the user's file and all that it imports
ORPHAN_SECONDS = 5.0  # after its limit a process that holds the interpreter ends itself, if the trainer was killed
_START = "import sys; sys.path = sys.argv[3:]; from rewards.user import _serve; _serve(int(sys.argv[1]), sys.argv[2])"


class RewardFile:
    """One of the user's files in a process of its own: what it does there costs scores, never the run.

    The process has the file's folder first on its sys.path, and keeps what the file holds (a client, a model) from
    call to call. If it is late or ends, the calls that have no result yet fail, and the next call starts another
    process, which imports the file again.
    """

    def __init__(self, path: str):
        self.path = path
        self._process, self._functions = None, {}
        self._lock = threading.RLock()  # of the pipe

    def functions(self) -> dict[str, int | None]:
        """The file's functions: name -> how many arguments it needs, None if nobody can tell.

        ImportError, with one line that says why, if the file cannot be imported.
        """
        with self._lock:
            if self._process and self._process.poll() is None:
                return self._functions
            try:
                self._start()
            except OSError as error:
                raise ImportError(f"no process can be started: {error}") from error
            answers, reason = self._receive(1, IMPORT_SECONDS)
            reason, self._functions = answers[0] if answers else (reason, {})
            if reason:
                self._end()
                raise ImportError(reason)
            return self._functions

    def call(self, name: str, calls: list[tuple], seconds: float) -> tuple[list[float], dict[int, str]]:
        """The value of each call, 0.0 if it failed, and the message of each failure by index.

        The calls run at once: plain functions in a thread each, `async def` ones in one event loop, which is the same
        in every call. Each gets a copy of its arguments. Those without a result after `seconds` fail.
        """
        with self._lock:
            try:
                self.functions()
                results, reason = self._receive(len(calls), seconds, (name, calls, seconds))
            except ImportError as error:
                results, reason = [], str(error)
        values = {i: value for i, value, error in results if not error}
        errors = dict.fromkeys(range(len(calls)), reason) | {i: error for i, _, error in results}
        part = [values.get(i, 0.0) for i in range(len(calls))]
        return part, {i: error for i, error in errors.items() if i not in values}

    def _start(self) -> None:
        self._end()
        self._pipe, other = multiprocessing.Pipe()
        with other:
            command = [sys.executable, "-u", "-c", _START, str(other.fileno()), self.path, *sys.path]
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                pass_fds=[other.fileno()],
                start_new_session=True,  # Ctrl-C does not reach it: the trainer first ends its step
            )

    def _kill(self) -> None:
        """Kills the process with what it has forked, and ends the pipe, which a child outside its session may hold."""
        if self._process.returncode is None:  # until then no other process can have its number
            os.killpg(self._process.pid, signal.SIGKILL)
        with socket.socket(fileno=os.dup(self._pipe.fileno())) as end, contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)

    def _end(self) -> int:
        """Its exit code."""
        if self._process is None:
            return 0
        self._kill()
        code, self._process = self._process.wait(), None
        self._pipe.close()
        return code

    def _receive(self, count: int, seconds: float, *messages) -> tuple[list, str]:
        """`count` answers to the messages; or fewer, and why: the process was late or has ended, and is ended then."""
        answers, deadline = [], time.monotonic() + seconds
        timer = threading.Timer(seconds, self._kill)  # a time limit on receiving alone could hang in sending
        timer.start()
        try:
            try:
                for message in messages:
                    self._pipe.send(message)
                while len(answers) < count:
                    answers.append(self._pipe.recv())
                self._pipe.send(("", [], 0.0))
            except (EOFError, OSError):
                pass
            finally:
                timer.cancel()
                timer.join()
        except BaseException:  # as Ctrl-C: answers that nobody has read must not be taken for those of a later call
            self._end()
            raise
        late = time.monotonic() > deadline
        if late or len(answers) < count:
            code = self._end()
            return answers, f"no result within {seconds:g} s" if late else f"its process ended with exit code {code}"
        return answers, ""


def _serve(descriptor: int, path: str) -> None:
    """The process: imports the file, then makes the calls that it is sent, until the trainer is gone."""
    pipe, sending, loop = Connection(descriptor), threading.Lock(), asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()

    def work(i: int, function, call: tuple) -> None:
        value, message = 0.0, ""
        try:
            value = function(*copy.deepcopy(call))
            if inspect.iscoroutine(value):
                value, error = asyncio.run_coroutine_threadsafe(_outcome(value), loop).result()
                if error:
                    raise error
            value = value.item() if hasattr(value, "item") else value  # NumPy's bool, a tensor of one number
            if not isinstance(value, numbers.Real) or not math.isfinite(value):
                raise TypeError(f"returned {value!r}, not a finite number")
            value = float(value)
        # The one place that swallows errors: another's code must not end a run of days. Counted, and shown by the loop.
        except BaseException as error:
            value, message = 0.0, _one_line(error)
        with sending:
            pipe.send((i, value, message))

    try:
        _end_after(IMPORT_SECONDS)
        try:
            module = _load(path)
            names = {name: arguments_needed(value) for name, value in vars(module).items() if callable(value)}
        except BaseException as error:
            pipe.send((_one_line(error), {}))
            return
        pipe.send(("", names))
        while True:
            name, calls, seconds = pipe.recv()
            _end_after(seconds)
            for i, call in enumerate(calls):
                threading.Thread(target=work, args=(i, getattr(module, name), call), daemon=True).start()
    except (EOFError, OSError):
        os.killpg(0, signal.SIGKILL)  # whatever its threads do, and with all that it has forked


async def _outcome(coroutine) -> tuple:
    """(what it returns, None) or (None, what it raises): SystemExit would end the event loop of all calls."""
    try:
        return await coroutine, None
    except BaseException as error:
        return None, error


def _end_after(seconds: float) -> None:
    """Sets when the system ends this process, even inside C code; 0 never. The trainer, if it lives, is sooner."""
    signal.setitimer(signal.ITIMER_REAL, seconds and seconds + ORPHAN_SECONDS)


def _load(path: str):
    """The file as a module; its folder is put first on sys.path, so that it can import its neighbours."""
    sys.argv = [path]
    sys.path.insert(0, str(Path(path).parent))
    spec = importlib.util.spec_from_file_location("reward_file_" + Path(path).stem, path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # for dataclasses
    spec.loader.exec_module(module)
    return module


def arguments_needed(function) -> int | None:
    """How many positional arguments the function needs; None if it does not tell, as some written in C."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    return sum(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)


def _one_line(error: BaseException) -> str:
    try:
        text = str(error)
    except Exception as second:
        text = f"its message raises {type(second).__name__}"
    return printable(" ".join(f"{type(error).__name__}: {text}".split()), 300)
