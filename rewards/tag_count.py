"""Partial credit on the way to the format."""

from rewards.format import TAGS


def tag_count(completion: str, sample) -> float:
    """A quarter for each of `<think>`, `</think>`, `<answer>`, `</answer>` that occurs exactly once: 0 to 1.

    Open-R1's, which also wants a newline beside each tag; the prompt here asks for none.
    """
    return sum(completion.count(tag) == 1 for tag in TAGS) / len(TAGS)
