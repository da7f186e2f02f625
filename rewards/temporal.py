"""Temporal contrast: does the policy use the order of the frames?"""


def temporal_bonus(
    accuracy: list[float], shuffled: list[float], threshold: float = 0.8, bonus: float = 0.3
) -> list[float]:
    """For each completion on ordered frames, by its accuracy, what to add to its reward: `bonus` or 0.0.

    `shuffled` has the accuracies of completions on shuffled frames. T-GRPO of Video-R1 (arXiv 2503.21776): if
    mean(accuracy) >= threshold * mean(shuffled), each completion with accuracy > .1 gets the bonus. The threshold is .8
    in its code, 1.0 in its paper.
    """
    if not accuracy or not shuffled:
        raise ValueError("temporal_bonus needs at least one accuracy of each group")
    uses_order = sum(accuracy) / len(accuracy) >= threshold * (sum(shuffled) / len(shuffled))
    return [bonus if uses_order and a > 0.1 else 0.0 for a in accuracy]
