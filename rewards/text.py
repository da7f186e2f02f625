"""Free text: ROUGE; and the two sequence measures that it and OCR are made of."""

import re
from collections import Counter


def rouge(prediction: str, sample) -> float:
    """The mean of ROUGE-1, ROUGE-2 and ROUGE-L F-measures of the prediction against the answer, in [0, 1].

    Video-R1's free-form reward, written out (Lin 2004). Departures from its `rouge-score` package: words are runs of
    letters and digits of any script, where it keeps a-z and 0-9 alone and so scores Chinese 0; no Porter stemming; and
    where both texts are one word ROUGE-2, which does not exist, is left out, so that an exact answer scores 1, not 2/3.
    """
    want, got = (re.findall(r"\w+", text.casefold()) for text in (sample.answer, prediction))
    if not want:
        raise ValueError(f"the answer {sample.answer!r} holds no word to compare with")
    if not got:
        return 0.0
    scores = [_f_measure(lcs_length(want, got), len(got), len(want))]
    for n in (1, 2):
        want_n, got_n = (Counter(zip(*(words[i:] for i in range(n)))) for words in (want, got))
        if want_n or got_n:
            scores.append(_f_measure((want_n & got_n).total(), got_n.total(), want_n.total()))
    return sum(scores) / len(scores)


def _f_measure(hits: int, predicted: int, wanted: int) -> float:
    return 2 * hits / (predicted + wanted)  # 2pr / (p + r) with p = hits / predicted, r = hits / wanted


def _positions(words: list[str]) -> dict[str, int]:
    """For each word, an integer whose bit i is set where words[i] is it."""
    bits: dict[str, int] = {}
    for i, word in enumerate(words):
        bits[word] = bits.get(word, 0) | 1 << i
    return bits


def lcs_length(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence, one row of the table as the bits of an integer (Hyyro 2004).

    A table of lists takes minutes where both texts are long; this takes milliseconds.
    """
    at, row, full = _positions(a), (1 << len(a)) - 1, (1 << len(a)) - 1
    for word in b:
        hit = row & at.get(word, 0)
        row = ((row + hit) | (row - hit)) & full
    return len(a) - row.bit_count()


def edit_distance(a: list[str], b: list[str]) -> int:
    """Levenshtein distance, one column of the table as the bits of two integers (Myers 1999, Hyyro 2001)."""
    if not a or not b:
        return len(a) + len(b)
    at, full, last = _positions(a), (1 << len(a)) - 1, 1 << (len(a) - 1)
    up, down, distance = full, 0, len(a)  # bit i: the column rises, falls, between rows i and i + 1
    for word in b:
        equal = at.get(word, 0)
        vertical = equal | down
        horizontal = (((equal & up) + up) ^ up) | equal
        rise, fall = (down | ~(horizontal | up)) & full, up & horizontal
        distance += bool(rise & last) - bool(fall & last)
        rise, fall = (rise << 1) | 1, fall << 1
        up, down = (fall | ~(vertical | rise)) & full, rise & vertical & full
    return distance
