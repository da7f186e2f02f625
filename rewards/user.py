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
import multiprocessing
import numbers
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

from video.formats import printable  # also loads the class of the samples, before a user's folder is first on sys.path

IMPORT_SECONDS = 120.0  # for the user's file and all that it imports
THREADS = 256  # of a file's plain functions; calls of `async def` functions hold none
ORPHAN_SECONDS = 5.0  # if the trainer was killed, a process that holds the interpreter ends so long after its limit
MOST = 1e30  # of a reward: sums and squares of larger numbers are infinite, which would cost the step
BATCH = ["completions", "samples"]  # the parameters of a function that scores a whole step at once

# Of one completion: (value, numbers that the function logs, ""), or (0.0, {}, one line why the call failed).
Outcome = tuple[float, dict[str, float], str]

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

    def functions(self) -> dict[str, str | None]:
        """The file's functions: name -> its form (see `form_of`), None if that is unknown.

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

    def call(self, calls: list[tuple[str, tuple]], seconds: float) -> list[list[Outcome]]:
        """Makes calls, (name of a function, its arguments): the outcomes of each, one for each completion it scores.

        The calls run at once: plain functions in threads, `async def` functions in one event loop, which lives as long
        as the process. Each call gets a copy of its arguments. Calls without a result after `seconds` fail.
        """
        with self._lock:
            try:
                self.functions()
                results = self._receive(len(calls), seconds, (calls, seconds))
            except (ImportError, OSError) as error:
                results = [(None, str(error))] * len(calls)
        counts = [len(texts) if isinstance(texts, list) else 1 for _, (texts, *_) in calls]
        return [outcomes or [(0.0, {}, reason)] * n for (outcomes, reason), n in zip(results, counts)]

    def _start(self) -> None:
        self._pipe, other = multiprocessing.Pipe()
        with other:
            fd = other.fileno()
            command = [sys.executable, "-u", "-c", _START, str(fd), self.path, *sys.path]
            # A new session: Ctrl-C does not reach the process, because the trainer first ends its step.
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[fd], start_new_session=True)

    def kill(self) -> None:
        """Kills the process and its forks. Also ends the pipe, which a fork in another session may hold open."""
        if self._process.returncode is None:  # until then no other process can have its number
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self._pipe.fileno())) as end:
            end.shutdown(socket.SHUT_RDWR)

    def _end(self) -> int:
        """Kills the process, if it still runs, and returns its exit code."""
        self.kill()
        self._pipe.close()
        return self._process.wait()

    def _receive(self, count: int, seconds: float, *messages: tuple) -> list[tuple]:
        """Sends the messages, returns `count` results: (what the process sent, ""), or (None, one line why it sent
        nothing). Ends the process if a result is missing or late."""
        results, exit_code, deadline = {}, 0, time.monotonic() + seconds
        timer = threading.Timer(seconds, self.kill)  # a time limit on receiving alone could hang in sending
        timer.start()
        try:
            with contextlib.suppress(EOFError, OSError):
                for message in messages:
                    self._pipe.send(message)
                while len(results) < count:
                    i, result = self._pipe.recv()
                    results[i] = result
                self._pipe.send(([], 0.0))  # the time limit of these calls is over
        finally:  # also after Ctrl-C: the next call must not take these results for its own
            timer.cancel()
            timer.join()
            late = time.monotonic() > deadline
            if late or len(results) < count:
                exit_code = self._end()
        reason = f"no result within {seconds:.3g} s" if late else f"its process ended with exit code {exit_code}"
        return [results.get(i, (None, reason)) for i in range(count)]


reward_file = functools.cache(RewardFile)  # one process for a file, however many rewards it holds


def call_files(calls: list[tuple[RewardFile, str, tuple]], seconds: float) -> list[list[Outcome]]:
    """`RewardFile.call` of several files at once, within one time limit: the outcomes of each call."""
    files = list(dict.fromkeys(file for file, *_ in calls))
    ask = lambda file: iter(file.call([call for own, *call in calls if own is file], seconds))
    with ThreadPoolExecutor(max(1, len(files))) as pool:
        try:
            results = dict(zip(files, pool.map(ask, files)))
        except BaseException:  # Ctrl-C does not wait for the time limit
            for file in files:
                file.kill()
            raise
    return [next(results[file]) for file, *_ in calls]


def _serve(descriptor: int, path: str) -> None:
    """The process: imports the file, then makes the calls that it is sent, until the trainer is gone."""
    pipe, sending, loop = Connection(descriptor), threading.Lock(), asyncio.new_event_loop()
    threading.Thread(target=_run_forever, args=(loop,), daemon=True).start()
    sys.argv = [path]
    sys.path.insert(0, str(Path(path).parent))
    spec = importlib.util.spec_from_file_location("reward_file_" + Path(path).stem, path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look there

    def load() -> dict[str, str | None]:
        spec.loader.exec_module(module)
        return {name: _attempt(form_of, value)[0] for name, value in vars(module).items() if callable(value)}

    def send(i: int, result: tuple) -> None:
        with sending:
            pipe.send((i, result))

    def work(i: int, name: str, arguments: tuple) -> None:
        function = getattr(module, name)
        value, failure = _attempt(lambda: function(*copy.deepcopy(arguments)))
        if inspect.iscoroutine(value):  # its function is `async def`
            asyncio.run_coroutine_threadsafe(finish(i, arguments, value), loop)
        else:
            send(i, (_outcomes(arguments, value, failure), ""))

    async def finish(i: int, arguments: tuple, coroutine: Coroutine) -> None:
        send(i, (_outcomes(arguments, *await _attempt_async(coroutine)), ""))

    try:
        # If the trainer is killed, the system ends this process after the limit, even inside C code.
        signal.setitimer(signal.ITIMER_REAL, IMPORT_SECONDS + ORPHAN_SECONDS)
        send(0, _attempt(load))
        pool = ThreadPoolExecutor(THREADS)
        while True:
            calls, seconds = pipe.recv()
            signal.setitimer(signal.ITIMER_REAL, seconds and seconds + ORPHAN_SECONDS)  # 0: never
            for i, call in enumerate(calls):
                pool.submit(work, i, *call)
    except (EOFError, OSError):
        os.killpg(0, signal.SIGKILL)  # whatever its threads do, and with all that it has forked


def _run_forever(loop: asyncio.AbstractEventLoop) -> None:
    while True:  # a task that a user's coroutine has started may raise SystemExit: the other calls need the loop
        with contextlib.suppress(BaseException):
            loop.run_forever()


def _attempt(function: Callable, *args) -> tuple:
    """(what the function returns, ""), or (None, one line that says what it raises).

    Here and in `_attempt_async` errors are swallowed, because a user's code must not end a run of days. The training
    log shows them.
    """
    try:
        return function(*args), ""
    except BaseException as error:
        return None, _one_line(error)


async def _attempt_async(coroutine: Coroutine) -> tuple:
    try:
        return await coroutine, ""
    except BaseException as error:
        return None, _one_line(error)


def _outcomes(arguments: tuple, value: object, failure: str) -> list[Outcome]:
    """The outcomes of a call that returned `value`, or failed: one for each completion."""
    texts = arguments[0]
    if isinstance(texts, str):
        return [_outcome(value, failure)]
    values, failure = (None, failure) if failure else _attempt(list, value)
    if not failure and len(values) != len(texts):
        failure = f"returned {len(values)} values for {len(texts)} completions"
    return [_outcome(value, failure) for value in (texts if failure else values)]


def _outcome(value: object, failure: str) -> Outcome:
    """What a function returned for one completion, a number or (number, {name: number to log}), as an outcome."""
    value, log = value if isinstance(value, tuple) and len(value) == 2 else (value, {})
    found, failure = (None, failure) if failure else _attempt(lambda: (_number(value), _logged(log)))
    return (0.0, {}, failure) if failure else (*found, "")


def _number(value: object) -> float:
    value = value.item() if hasattr(value, "item") else value  # NumPy's bool, a tensor of one number
    if not isinstance(value, numbers.Real) or not abs(value) <= MOST:
        raise TypeError(f"returned {value!r}, not a finite number up to {MOST:g}")
    return float(value)


def _logged(log: object) -> dict[str, float]:
    if not isinstance(log, dict):
        raise TypeError(f"returned {log!r} to log, not a dict of numbers")
    return {printable(name, 60): _number(value) for name, value in log.items()}


def form_of(function: Callable) -> str | None:
    """How a reward is called: "each" (completion, sample), "group" (completion, sample, group), once for a completion;
    "batch" (completions, samples), once for a step; None if it takes other arguments.

    Raises ValueError for some functions written in C.
    """
    parameters = inspect.signature(function).parameters.values()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed = [p.name for p in positional if p.default is p.empty]
    if needed[:2] == BATCH:
        return "batch" if len(needed) == 2 else None
    return {2: "each", 3: "group"}.get(len(needed))


def _one_line(error: BaseException) -> str:
    try:
        text = f"{type(error).__name__}: {error}"
    except Exception as second:
        text = f"{type(error).__name__}: its message raises {type(second).__name__}"
    return printable(" ".join(text.split()), 300)
