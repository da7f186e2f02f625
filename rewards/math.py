"""Mathematics, checked by math-verify in a worker process.

In one, because math-verify guards its time with SIGALRM, which works in a main thread alone, and no signal ends a long
integer power such as 9^{9^{9^9}}: that takes a process that can be killed.
"""

import functools
import importlib.util
import logging
from collections.abc import Callable

from video.pool import WorkerDied, WorkerPool

_SECONDS = 5.0  # for one comparison


def math(prediction: str, sample) -> float:
    """1.0 where math-verify finds the prediction equal to the answer, else 0.0; also 0.0 where it takes above 5 s.

    Needs `pip install "math-verify[antlr4_13_2]"`. ImportError without the package: a comparison of strings in its
    place would silently call 1/2 and 0.5 different.
    """
    if importlib.util.find_spec("math_verify") is None:
        raise ImportError("rows of type 'math' are checked by math-verify: pip install \"math-verify[antlr4_13_2]\"")
    if not prediction:
        return 0.0
    try:
        return float(_checker().submit(sample.answer, prediction).result())
    except (TimeoutError, WorkerDied):
        return 0.0


@functools.cache
def _checker() -> WorkerPool:
    """The one worker. It imports math-verify when it unpickles these functions, so before any time runs."""
    from math_verify import parse, verify

    return WorkerPool(functools.partial(_equal, parse, verify), 1, _SECONDS)


def _equal(parse: Callable, verify: Callable, answer: str, prediction: str) -> bool:
    logging.disable()  # it warns that its own time limit is off, which is the point
    expressions = (parse(_dollars(text), parsing_timeout=None) for text in (answer, prediction))
    return verify(*expressions, timeout_seconds=None)


def _dollars(text: str) -> str:
    """`text` as math-verify expects LaTeX: in an environment, unless it has one."""
    return text if "$" in text or "\\boxed" in text or "\\(" in text or "\\[" in text else f"${text}$"
