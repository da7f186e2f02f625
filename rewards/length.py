"""Rewards against completions that are too short, too long, or loops."""

import math

from video.formats import Sample


def length_window(completion: str, sample: Sample, group) -> float:
    """1.0 if 320 <= tokens <= 512, the accuracy is above .1, and so is that of another completion; else 0.0.

    Video-R1's length control. Its bonus of .2 is the weight here: `--reward length_window:0.2`.
    """
    right = sum(accuracy > 0.1 for accuracy in group.accuracy)
    in_window = 320 <= group.lengths[group.index] <= 512
    return float(in_window and right > 1 and group.accuracy[group.index] > 0.1)


def length_cosine(completion: str, sample: Sample, group) -> float:
    """Falls with the length from 1 to .5 if the completion is right; rises from -1 to -.5 if it is wrong.

    Half a cosine over 1000 tokens, then flat. Yeo et al. 2025 (arXiv 2502.03373), with the values of Open-R1's
    `cosine_scaled_reward`. Departures: length is in tokens, not characters; "right" is accuracy > .5, since accuracy
    may be a fraction here; and beyond 1000 tokens the cosine would rise again and reward longer right answers.
    """
    fall = 0.5 * (1 + math.cos(math.pi * min(1.0, group.lengths[group.index] / 1000)))  # 1 at length 0, 0 at 1000
    return 0.5 + 0.5 * fall if group.accuracy[group.index] > 0.5 else -0.5 - 0.5 * fall


def repetition(completion: str, sample: Sample, n: int = 3) -> float:
    """-(1 - distinct n-grams / n-grams) over lower-cased words: 0 without repeats, towards -1 for a loop.

    Yeo et al. 2025 (arXiv 2502.03373, appendix C.2) with maximal penalty 1. It is negative already: give it a positive
    weight. A completion of fewer than n words scores 0.
    """
    words = completion.lower().split()
    grams = list(zip(*(words[i:] for i in range(n))))
    return len(set(grams)) / len(grams) - 1.0 if grams else 0.0


def soft_overlong(completion: str, sample, group) -> float:
    """0 up to 4/5 of --max_new_tokens, then falling linearly to -1 at --max_new_tokens.

    DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13). Its cache is a fifth of the limit, as the paper's 4096
    tokens are of 20480. It is negative already: give it a positive weight.
    """
    if not group.max_new_tokens:
        raise ValueError("soft_overlong needs --max_new_tokens, the length at which completions are truncated")
    cache = group.max_new_tokens / 5
    return min(0.0, (group.max_new_tokens - cache - group.lengths[group.index]) / cache)
