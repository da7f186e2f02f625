"""Qwen2-VL, arXiv 2409.12191: 2B, 7B, 72B."""

from grpo.families.base import Family


class Qwen2VL(Family):
    """The family that `Family` describes: all that is here are names and sizes."""

    classes = "Qwen2VL"
    tiny_vision = {"depth": 1, "embed_dim": 32, "mlp_ratio": 2, "patch_size": 14}

    def tower_sizes(self, vision):
        return vision.embed_dim, vision.embed_dim * vision.mlp_ratio

    def tiny_sizes(self, hidden):
        return {**self.tiny_vision, "hidden_size": hidden}


FAMILY = Qwen2VL()
