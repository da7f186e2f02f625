"""The file that `rewards.symbolic` runs in a process of its own."""

import logging

from math_verify import parse, verify

logging.disable()  # math-verify warns that its time limit is off; the process has a limit instead
LATEX_MARKS = ("$", "\\boxed", "\\(", "\\[")  # math-verify reads LaTeX only inside one of these


def equal(answer: str, prediction: str) -> bool:
    """Whether both texts are the same expression, or have the same value."""
    texts = [text if any(mark in text for mark in LATEX_MARKS) else f"${text}$" for text in (answer, prediction)]
    return verify(*(parse(text, parsing_timeout=None) for text in texts), timeout_seconds=None)
