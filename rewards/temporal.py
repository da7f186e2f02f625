"""Temporal contrast: is the order of the frames used?"""


def temporal_bonus(
    accuracy: list[float], shuffled_accuracy: list[float], threshold: float = 0.8, bonus: float = 0.3
) -> list[float]:
    """For each completion on ordered frames, `bonus` or 0.0, to be added to its reward.

    T-GRPO of Video-R1 (arXiv 2503.21776): where mean(accuracy) >= threshold * mean(shuffled_accuracy), each completion
    with accuracy > .1 gets the bonus. Its code has the threshold .8, its paper 1.0.
    """
    if not accuracy or not shuffled_accuracy:
        raise ValueError("temporal_bonus needs at least one accuracy of each group")
    ordered, shuffled = sum(accuracy) / len(accuracy), sum(shuffled_accuracy) / len(shuffled_accuracy)
    return [bonus if ordered >= threshold * shuffled and a > 0.1 else 0.0 for a in accuracy]
