"""What the process of `rewards.math` runs."""

import logging

from math_verify import parse, verify

logging.disable()  # math-verify warns that its own time limit is off, which is the point


def equal(answer: str, prediction: str) -> bool:
    """Whether the two are the same expression, or have the same value."""
    expressions = (parse(_dollars(text), parsing_timeout=None) for text in (answer, prediction))
    return verify(*expressions, timeout_seconds=None)


def _dollars(text: str) -> str:
    """`text` as math-verify expects LaTeX: in an environment, unless it has one."""
    return text if "$" in text or "\\boxed" in text or "\\(" in text or "\\[" in text else f"${text}$"
