"""Numbers: within a tolerance, and the mean relative accuracy of VSI-Bench."""

import math
import re

# Not inside a word or a longer number ("m2", "1.2.3", "3,5"); commas only between thousands; a/b is a fraction.
_NUMBER = re.compile(
    r"(?<![\w.,])([-+]?)((?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(e[-+]?\d+)?(?:/(\d+))?"
    r"(?![.,]?\d)",
    re.IGNORECASE,
)


def parse_number(text: str) -> float | None:
    """The one finite number in `text`, or None where there is none or where there are several different ones.

    Signs, thousands commas, decimals, exponents, a simple fraction, and units after it: "-1,234.5 m", "$3", "1/2",
    "50%" (a per cent is the number itself).
    """
    values = set()
    for sign, digits, exponent, divisor in _NUMBER.findall(text.replace("\u2212", "-")):
        value = float(sign + digits.replace(",", "") + exponent)
        if divisor:
            value = value / float(divisor) if float(divisor) else math.inf
        values.add(value)
    value = values.pop() if len(values) == 1 else math.inf
    return value if math.isfinite(value) else None


def true_number(sample) -> float:
    """The ground truth as a number; ValueError where it is none."""
    value = parse_number(sample.answer)
    if value is None:
        raise ValueError(f"the answer {sample.answer!r} is not one number")
    return value


def numeric(prediction: str, sample, tolerance: float = 0.005) -> float:
    """1.0 where |prediction - answer| <= tolerance, else 0.0.

    Video-R1 rounds both to two places, and demands that both or neither be written with a point: "3" against "3.0" was
    wrong. Here the distance counts, so 2.999 against 3.001 does not depend on the side of a rounding edge.
    """
    answer, value = true_number(sample), parse_number(prediction)
    return float(value is not None and abs(value - answer) <= tolerance + 1e-9)


def mean_relative_accuracy(prediction: str, sample) -> float:
    """The share, in [0, 1], of ten thresholds t = .5, .55, .. .95 with |prediction - answer| / |answer| <= 1 - t.

    VSI-Bench (Yang et al. 2024) as its code has it: `<=`, where the paper writes `<`, and numpy's thresholds to the
    last bit. Departure: an answer of 0, a division by zero there, scores 1 for exactly 0 and 0 otherwise.
    """
    answer, value = true_number(sample), parse_number(prediction)
    if value is None:
        return 0.0
    if answer == 0:
        return float(value == 0)
    step = (0.95 - 0.5) / 9
    thresholds = [0.5 + i * step for i in range(9)] + [0.95]
    return sum(abs(value - answer) / abs(answer) <= 1 - t for t in thresholds) / 10
