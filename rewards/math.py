"""Mathematics, checked by math-verify in a process of its own.

In one, because math-verify guards its time with SIGALRM, which works in a main thread alone, and no signal ends a long
integer power such as 9^{9^{9^9}}: that takes a process that can be killed.
"""

import importlib.util
import json
import select
import subprocess
import sys
import threading
from pathlib import Path

_SECONDS = 5.0  # for one comparison
_START_SECONDS = 60.0  # for sympy to import, on a busy machine
_lock = threading.Lock()
_checker: subprocess.Popen | None = None


def math(prediction: str, sample) -> float:
    """1.0 where math-verify finds the prediction equal to the answer, else 0.0; also 0.0 where it takes above 5 s.

    Needs `pip install "math-verify[antlr4_13_2]"` and a POSIX system. ImportError without the package: a comparison of
    strings in its place would silently call 1/2 and 0.5 different.
    """
    if importlib.util.find_spec("math_verify") is None:
        raise ImportError("rows of type 'math' are checked by math-verify: pip install \"math-verify[antlr4_13_2]\"")
    return float(bool(prediction) and _ask([sample.answer, prediction]))


def _ask(pair: list[str]) -> bool:
    """The checker's verdict; it is started where there is none, and killed where it does not answer in time."""
    global _checker
    with _lock:
        if _checker is None or _checker.poll() is not None:
            _checker = subprocess.Popen([sys.executable, "-c", "from rewards.math import _serve; _serve()"], text=True,
                                        cwd=Path(__file__).parent.parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            if _read(_START_SECONDS) != "ready":
                raise RuntimeError("the process that runs math-verify did not start; its error is printed above")
        _checker.stdin.write(json.dumps(pair) + "\n")
        _checker.stdin.flush()
        return _read(_SECONDS) == "1"


def _read(seconds: float) -> str:
    """The checker's next line, or "" and no checker any more where none comes in time."""
    line = _checker.stdout.readline() if select.select([_checker.stdout], [], [], seconds)[0] else ""
    if not line:
        _checker.kill()
        _checker.wait()
    return line.strip()


def _serve() -> None:
    """Answers pairs from standard input, one a line, until it is closed, which the end of the parent does."""
    import logging

    from math_verify import parse, verify

    logging.disable()  # it warns that its own time limit is off, which is the point
    print("ready", flush=True)
    for line in sys.stdin:
        answer, prediction = (parse(_dollars(text), parsing_timeout=None) for text in json.loads(line))
        print(int(verify(answer, prediction, timeout_seconds=None)), flush=True)


def _dollars(text: str) -> str:
    """`text` as math-verify expects LaTeX: in an environment, unless it has one."""
    return text if "$" in text or "\\boxed" in text or "\\(" in text or "\\[" in text else f"${text}$"
