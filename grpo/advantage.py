"""Advantages of a group: how much better than the other completions of its prompt each completion did."""

import torch

EPSILON = 1e-4  # added to the standard deviation of a group, as in TRL and Open-R1-Video


def group_advantages(rewards, scale="group"):
    """rewards (G,) -> (G,) advantages; all 0 if all rewards are equal.

    "group": (r - mean) / (std + 1e-4) with the sample's std (divided by G - 1), as in TRL and Open-R1-Video
    (DeepSeekMath, arXiv 2402.03300, section 4.1.2, does not say which).
    "none": r - mean, without the bias towards questions of small spread (Dr. GRPO, arXiv 2503.20783).
    """
    rewards = torch.as_tensor(rewards, dtype=torch.float32)
    centred = rewards - rewards.mean()
    if bool((rewards == rewards[0]).all()):
        return torch.zeros_like(rewards)  # rounding in the mean must not become an advantage
    return centred / (rewards.std() + EPSILON) if scale == "group" else centred


def has_signal(accuracies):
    """False if every completion of the group is equally accurate. The dynamic filter looks at the raw accuracy: format
    or length can still tell shaped rewards apart (DAPO, arXiv 2503.14476, section 3.2)."""
    return len(set(accuracies)) > 1
