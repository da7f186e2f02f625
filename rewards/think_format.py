"""Whether a completion has the form that the prompt asks for: `<think>..</think><answer>..</answer>`."""

import re

from video.formats import Sample

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
# Demands something after each opening tag: in "<think> </think>" \S takes the "<", and no other "</think>" follows.
_FORM = re.compile(r"<think>\s*\S.*</think>\s*<answer>\s*\S.*</answer>", re.DOTALL)


def think_format(completion: str, sample: Sample) -> float:
    """1.0 if the whole completion is `<think>..</think>`, whitespace, `<answer>..</answer>`, else 0.0.

    As Open-R1-Video and Video-R1, with three departures. Text after the last tag scores 0 (their `match` lets it
    through). Each tag occurs exactly once. Neither part is blank: an empty thought is the cheapest way to the reward.
    """
    return float(tag_count(completion, sample) == 1.0 and _FORM.fullmatch(completion) is not None)


def tag_count(completion: str, sample: Sample) -> float:
    """The share of the four tags that occur exactly once: partial credit on the way to the form.

    Open-R1's, without the newline beside each tag that it demands: the prompt here does not ask for newlines.
    """
    return sum(completion.count(tag) == 1 for tag in TAGS) / len(TAGS)
