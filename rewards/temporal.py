"""Temporal contrast: does the policy use the order of the frames?"""


def temporal_bonus(
    accuracy: list[float], shuffled_accuracy: list[float], threshold: float = 0.8, bonus: float = 0.3
) -> list[float]:
    """For each completion on ordered frames, what to add to its reward: `bonus` or 0.0.

    T-GRPO of Video-R1 (arXiv 2503.21776): if mean(accuracy) >= threshold * mean(shuffled_accuracy), each completion
    with accuracy > .1 gets the bonus. The threshold is .8 in its code, 1.0 in its paper.
    """
    if not accuracy or not shuffled_accuracy:
        raise ValueError("temporal_bonus needs at least one accuracy of each group")
    ordered, shuffled = sum(accuracy) / len(accuracy), sum(shuffled_accuracy) / len(shuffled_accuracy)
    return [bonus if ordered >= threshold * shuffled and a > 0.1 else 0.0 for a in accuracy]
