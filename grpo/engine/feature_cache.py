"""What a frozen vision tower makes of a video, kept on disk: a second epoch, or another run, runs no vision pass."""

import hashlib

import torch

from grpo.engine.model import vision_tower
from grpo.policy import Policy
from video.cache import DiskCache


class FeatureCache(DiskCache):
    """Called in place of the tower of a frozen, unsharded policy: takes its features from `folder`, or makes and keeps
    them.

    An entry belongs to the content of the patches of one video or image, and to the tower: its configuration, weights
    and precision. Of ranks that share a prompt each keeps what it encodes. A tower passes over several media at once
    without the cache and one by one with it: features are equal to the bit if that is one video, else to rounding.
    """

    flag, suffix, version = "--feature_cache", ".features", 1
    policy: Policy  # whose tower it stands for
    _tower = ""  # its identity

    def __call__(self, pixels: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
        """As `grpo.families.base.Family.vision_features`."""
        media = zip(pixels.split(grids.prod(-1).tolist()), grids.split(1))
        return torch.cat([self._features(*one) for one in media])

    def _features(self, pixels, grid):
        self._tower = self._tower or tower_identity(self.policy)
        entry = self.place(f"{self.version} {self._tower} {grid.tolist()} {digest([pixels])}")
        if found := self.get(entry):
            return found["features"].to(pixels.device)
        features = self.policy.spec.family.vision_features(self.policy.model, pixels, grid)
        self.put(entry, {"features": features.detach()})
        return features


def tower_identity(policy: Policy) -> str:
    """A text that is another for another tower."""
    weights = vision_tower(policy.model).state_dict()
    return f"{policy.spec.vision!r} {[(n, t.dtype, t.shape) for n, t in weights.items()]} {digest(weights.values())}"


def digest(tensors) -> str:
    """Of the tensors' bytes."""
    total = hashlib.sha256()
    for tensor in tensors:
        aside = tensor.detach().to("cpu", copy=True)  # numpy would pin the storage, which FSDP gives back
        total.update(aside.contiguous().flatten().view(torch.uint8).numpy())
    return total.hexdigest()


def keep_features(policy: Policy, folder: str, gigabytes: float) -> None:
    """Has a policy whose tower is frozen take its features from `folder` while it samples and evaluates. Raises
    DataError if the folder cannot be written to."""
    unsharded = policy.plain or policy  # a sharded tower runs on all ranks or on none
    unsharded.cached_tower = FeatureCache(folder, gigabytes)
    unsharded.cached_tower.policy = unsharded
