"""Whether a completion has the form that the prompt asks for."""

import re

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_FORM = re.compile(r"<think>(.*)</think>\s*<answer>(.*)</answer>", re.DOTALL)


def format(completion: str, sample) -> float:
    """1.0 where the whole completion is `<think>..</think>`, whitespace, `<answer>..</answer>`, else 0.0.

    As Open-R1-Video and Video-R1, but matched to the end (their `match` lets trailing text through), with each tag
    exactly once, and with neither part blank: an empty thought would be the cheapest way to the reward.
    """
    if any(completion.count(tag) != 1 for tag in TAGS):  # also what keeps the pattern linear: one place to split at
        return 0.0
    form = _FORM.fullmatch(completion)
    return float(bool(form and form[1].strip() and form[2].strip()))
