"""Mathematics, checked by math-verify in a process that can be killed.

math-verify limits its time by SIGALRM. That works only in a main thread, and no signal ends a long integer power such
as 9^{9^{9^9}}.
"""

import importlib.util
from pathlib import Path

from rewards.user import reward_file
from video.formats import Sample


def symbolic(prediction: str, sample: Sample) -> float:
    """1.0 if math-verify finds the prediction equal to the answer; 0.0 if not, if it fails, or if it takes over 5 s.

    ImportError without the package: comparing strings instead would silently call 1/2 and 0.5 different.
    """
    if importlib.util.find_spec("math_verify") is None:
        raise ImportError("rows of type 'math' are checked by math-verify: pip install \"math-verify[antlr4_13_2]\"")
    if not prediction:
        return 0.0
    checker = reward_file(str(Path(__file__).with_name("symbolic_equal.py")))
    checker.functions()  # imports math-verify before the time limit starts; raises ImportError if that fails
    return checker.call([("equal", (sample.answer, prediction))], seconds=5.0)[0][0][0]
