"""Advantages: how much better than the other completions of its prompt each completion did."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

EPSILON = 1e-4  # added to a standard deviation, as in TRL and Open-R1-Video


def centred(rewards: Tensor) -> Tensor:
    return rewards - rewards.mean()


# --advantage: (rewards (G,), standard deviation over the batch) -> (G,). All deviations are the sample's, divided by
# the count - 1; DeepSeekMath (arXiv 2402.03300, section 4.1.2) does not say which.
ADVANTAGES = {
    "group": lambda rewards, batch_std: centred(rewards) / (rewards.std() + EPSILON),  # GRPO
    "none": lambda rewards, batch_std: centred(rewards),  # Dr. GRPO
    "rloo": lambda rewards, batch_std: centred(rewards) * (len(rewards) / (len(rewards) - 1)),
    "batch": lambda rewards, batch_std: centred(rewards) / (batch_std + EPSILON),  # Lite PPO
    "reinforce_baseline": lambda rewards, batch_std: centred(rewards) / (batch_std + EPSILON),  # REINFORCE++
}

# Whose deviation over the batch an advantage needs: (rewards of a group) -> values
BATCH_VALUES = {"batch": lambda rewards: rewards, "reinforce_baseline": centred}


def group_advantages(rewards: Sequence[float], name: str = "group", batch_std: float | None = None) -> Tensor:
    """rewards (G,) -> (G,) advantages by the row `name` of ADVANTAGES; all 0 if all rewards are equal.

    batch_std: see `batch_moments`; only the names in BATCH_VALUES need it.
    """
    rewards = torch.as_tensor(rewards, dtype=torch.float32)
    if bool((rewards == rewards[0]).all()):
        return torch.zeros_like(rewards)  # rounding in the mean must not become an advantage
    return ADVANTAGES[name](rewards, batch_std)


def batch_moments(groups: Iterable[Sequence[float]], name: str) -> dict:
    """{"count", "sum", "squares"} of the values of this rank's groups of rewards. Summed over all ranks, they give
    every rank the same deviation (`batch_std`), however the groups are spread."""
    rows = [BATCH_VALUES[name](torch.as_tensor(rewards, dtype=torch.float64)) for rewards in groups]
    values = torch.cat([*rows, torch.zeros(0, dtype=torch.float64)])  # a rank may have no group
    return {"count": len(values), "sum": float(values.sum()), "squares": float(values.square().sum())}


def batch_std(moments: dict) -> float:
    """The sample standard deviation of the values that `batch_moments` summed."""
    variance = (moments["squares"] - moments["sum"] ** 2 / max(moments["count"], 1)) / max(moments["count"] - 1, 1)
    return max(variance, 0.0) ** 0.5


def has_signal(accuracies: Sequence[float]) -> bool:
    """False if every completion of the group is equally accurate. The dynamic filter looks at the raw accuracy: format
    or length can still tell shaped rewards apart (DAPO, arXiv 2503.14476, section 3.2)."""
    return len(set(accuracies)) > 1
