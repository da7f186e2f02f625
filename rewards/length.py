"""Rewards of length. They read the raw accuracy, the lengths in tokens and their limit from the group."""

import math


def length_window(completion: str, sample, group) -> float:
    """1.0 where 320 <= tokens <= 512, the accuracy is above .1, and at least two of the group's are; else 0.0.

    Video-R1's length control; its bonus of .2 is the weight: `--reward length_window:0.2`.
    """
    right = sum(accuracy > 0.1 for accuracy in group.accuracy)
    long_enough = 320 <= group.lengths[group.index] <= 512
    return float(long_enough and right > 1 and group.accuracy[group.index] > 0.1)


def length_cosine(completion: str, sample, group) -> float:
    """Right: 1 falling to .5 with length. Wrong: -1 rising to -.5. A half cosine, flat after 1000 tokens.

    Yeo et al. 2025 (arXiv 2502.03373), values of Open-R1's `cosine_scaled_reward`. Departures: tokens, not characters;
    "right" is accuracy > .5, since accuracy here may be a fraction; and beyond 1000 it stays, where the cosine would
    turn back and reward a longer right answer again.
    """
    fall = 0.5 * (1 + math.cos(math.pi * min(1.0, group.lengths[group.index] / 1000)))  # 1 at length 0, 0 at 1000
    return 0.5 + 0.5 * fall if group.accuracy[group.index] > 0.5 else -0.5 - 0.5 * fall


def soft_overlong(completion: str, sample, group) -> float:
    """0 up to 4/5 of --max_new_tokens, then falling linearly to -1 at --max_new_tokens.

    DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13). Its cache is a fifth of the limit, as the paper's 4096
    tokens are of 20480. It is negative already: give it a positive weight.
    """
    if not group.max_new_tokens:
        raise ValueError("soft_overlong needs --max_new_tokens, the length at which completions are cut")
    cache = group.max_new_tokens / 5
    return min(0.0, (group.max_new_tokens - cache - group.lengths[group.index]) / cache)
