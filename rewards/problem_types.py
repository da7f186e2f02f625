"""How right a prediction is, in [0, 1]: one function for each problem type, listed in ACCURACY at the end.

To score a new problem type, write `f(prediction, sample) -> float` and add it there. `prediction` is the content of the
answer tag, `sample.answer` is the ground truth. A ground truth that the function cannot use raises ValueError.
"""

import math
import re
from collections import Counter
from collections.abc import Callable

from rapidfuzz.distance import LCSseq, Levenshtein

from rewards.answer import choice_letter
from rewards.grounding import OVERLAPS, grounding
from rewards.symbolic import symbolic
from video.formats import Sample

# A number that is not part of a word or of a longer number ("m2", "1.2.3", "3,5"). Commas stand only between thousands.
_NUMBER = re.compile(
    r"(?<![\w.,])([-+]?)((?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(e[-+]?\d+)?(?:/(\d+))?(?![.,]?\d)", re.IGNORECASE
)
_MRA_THRESHOLDS = [0.5 + i * ((0.95 - 0.5) / 9) for i in range(9)] + [0.95]  # numpy's linspace, to the last bit


def choice(prediction: str, sample: Sample) -> float:
    """1.0 if the prediction chooses the letter of the ground truth, else 0.0.

    The ground truth is a letter, such as "B", "(b)" or "B. blue", or the text of an option. The reference
    implementations compare the first letter (Open-R1-Video: "Apple" and "A or B" are right if the answer is A) or the
    exact string (Video-R1: "A." is wrong).
    """
    answer = choice_letter(sample.answer, sample.options)
    if answer is None:
        raise ValueError(f"the answer {sample.answer!r} names none, or several, of the options {list(sample.options)}")
    return float(choice_letter(prediction, sample.options) == answer)


def parse_number(text: str) -> float | None:
    """The one finite number in `text`; None if there is no number, or if there are several different ones.

    Reads signs, thousands commas, decimals, exponents, simple fractions, and numbers with a unit:
    "-1,234.5 m" -> -1234.5, "$3" -> 3, "1/2" -> 0.5, "50%" -> 50.
    """
    values = set()
    for sign, digits, exponent, divisor in _NUMBER.findall(text.replace("\u2212", "-")):
        number, divisor = float(sign + digits.replace(",", "") + exponent), float(divisor or 1)
        values.add(number / divisor if divisor else math.inf)
    value = values.pop() if len(values) == 1 else math.inf
    return value if math.isfinite(value) else None


def _numbers(prediction: str, sample: Sample) -> tuple[float, float]:
    """(the number predicted, the true number). A prediction that is no number is inf: as far off as can be."""
    answer, value = parse_number(sample.answer), parse_number(prediction)
    if answer is None:
        raise ValueError(f"the answer {sample.answer!r} is not one number")
    return math.inf if value is None else value, answer


def numeric(prediction: str, sample: Sample, tolerance: float = 0.005) -> float:
    """1.0 if |prediction - answer| <= tolerance, else 0.0.

    Video-R1 rounds both numbers to two decimals, and scores "3" against "3.0" as wrong. Here the distance counts: the
    score of 2.999 against 3.001 does not depend on the side of a rounding edge.
    """
    value, answer = _numbers(prediction, sample)
    return float(abs(value - answer) <= tolerance + 1e-9)


def mean_relative_accuracy(prediction: str, sample: Sample) -> float:
    """The share of ten thresholds t = .5, .55, .. .95 for which |prediction - answer| / |answer| <= 1 - t.

    VSI-Bench (Yang et al. 2024), as its code has it: with `<=`; the paper writes `<`. Departure: if the answer is 0,
    which the formula divides by, exactly 0 scores 1 and all else 0.
    """
    value, answer = _numbers(prediction, sample)
    if answer == 0:
        return float(value == 0)
    return sum(abs(value - answer) / abs(answer) <= 1 - t for t in _MRA_THRESHOLDS) / 10


def regression(prediction: str, sample: Sample) -> float:
    """1 - min(1, |prediction - answer| / |answer|).

    Video-R1's, which adds 1e-9 to numerator and denominator. Departure: an exact prediction always scores 1; there it
    scores 0 if the answer is 0, because the quotient is then 1.
    """
    value, answer = _numbers(prediction, sample)
    if value == answer:
        return 1.0
    return 1.0 - min(1.0, (abs(value - answer) + 1e-9) / (abs(answer) + 1e-9))


def ocr(prediction: str, sample: Sample) -> float:
    """1 - word error rate, at least 0. As Video-R1: words are split at whitespace; case and punctuation count."""
    want = sample.answer.split()
    if not want:
        raise ValueError(f"the answer {sample.answer!r} holds no word to compare with")
    return max(0.0, 1.0 - Levenshtein.distance(want, prediction.split()) / len(want))


def rouge(prediction: str, sample: Sample) -> float:
    """The mean of the F-measures of ROUGE-1, ROUGE-2 and ROUGE-L (Lin 2004) of the prediction against the answer.

    Video-R1's reward for free-form answers. Departures from the `rouge-score` package that it uses: a word is a run of
    letters and digits of any script (there of a-z and 0-9 alone, so Chinese scores 0); there is no Porter stemming; and
    if both texts are a single word, ROUGE-2 does not exist and is left out, so that an exact answer scores 1, not 2/3.
    """
    want, got = (re.findall(r"\w+", text.casefold()) for text in (sample.answer, prediction))
    if not want:
        raise ValueError(f"the answer {sample.answer!r} holds no word to compare with")
    overlaps = [(LCSseq.similarity(want, got), len(want) + len(got))]  # (words or pairs in common, sum of both counts)
    for n in (1, 2):
        want_n, got_n = (Counter(zip(*(words[i:] for i in range(n)))) for words in (want, got))
        overlaps.append(((want_n & got_n).total(), want_n.total() + got_n.total()))
    scores = [2 * common / total for common, total in overlaps if total]  # F = 2pr / (p + r)
    return sum(scores) / len(scores)


ACCURACY: dict[str, Callable] = {
    "multiple choice": choice,
    "numerical": numeric,
    "mra": mean_relative_accuracy,
    "OCR": ocr,
    "free-form": rouge,
    "open-ended": rouge,  # OneThinker's name for it
    "regression": regression,
    "math": symbolic,
    **dict.fromkeys(OVERLAPS, grounding),
}
