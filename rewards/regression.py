"""Regression: closeness to a number."""

from rewards.numeric import parse_number, true_number


def regression(prediction: str, sample) -> float:
    """1 - min(1, |prediction - answer| / |answer|), in [0, 1]; 0.0 where the prediction is no number.

    Video-R1's, with its 1e-9 above and below the line (so an answer of 0 wants exactly 0, scored 0 there because its
    quotient is then 1; here an exact hit is always 1).
    """
    answer, value = true_number(sample), parse_number(prediction)
    if value is None:
        return 0.0
    if value == answer:
        return 1.0
    return 1.0 - min(1.0, (abs(value - answer) + 1e-9) / (abs(answer) + 1e-9))
