"""Mathematics, checked by math-verify in a process of its own.

math-verify guards its time with SIGALRM, which works in a main thread alone, and no signal ends a long integer power
such as 9^{9^{9^9}}: that takes a process that can be killed.
"""

import functools
import importlib.util
from pathlib import Path

from rewards.user import RewardFile

_SECONDS = 5.0  # for one comparison


def math(prediction: str, sample) -> float:
    """1.0 if math-verify finds the prediction equal to the answer, else 0.0; also 0.0 if it fails or takes above 5 s.

    Needs `pip install "math-verify[antlr4_13_2]"`. ImportError without the package: a comparison of strings in its
    place would silently call 1/2 and 0.5 different.
    """
    if importlib.util.find_spec("math_verify") is None:
        raise ImportError("rows of type 'math' are checked by math-verify: pip install \"math-verify[antlr4_13_2]\"")
    if not prediction:
        return 0.0
    checker = _checker()
    checker.functions()
    return checker.call("equal", [(sample.answer, prediction)], _SECONDS)[0][0]


@functools.cache
def _checker() -> RewardFile:
    """The one process. It imports math-verify before any time runs."""
    return RewardFile(str(Path(__file__).with_name("math_equal.py")))
