"""Qwen2-VL, arXiv 2409.12191: 2B, 7B, 72B."""

import transformers

from grpo.families.base import Family


class Qwen2VL(Family):
    """The family that `Family` describes: all that is here are names and sizes."""

    tiny_vision = {
        "depth": 1, "num_heads": 4, "embed_dim": 32, "mlp_ratio": 2, "patch_size": 14, "temporal_patch_size": 2,
        "spatial_merge_size": 2, "initializer_range": 0.15,
    }  # fmt: skip

    @property
    def model_class(self):
        return transformers.Qwen2VLForConditionalGeneration

    def tower_sizes(self, vision):
        return vision.embed_dim, vision.embed_dim * vision.mlp_ratio

    def tiny_sizes(self, hidden):
        return {**self.tiny_vision, "hidden_size": hidden}

    def tiny_processor(self, tokenizer, chat_template):
        cut = transformers.Qwen2VLImageProcessor(), tokenizer, transformers.Qwen2VLVideoProcessor()
        return transformers.Qwen2VLProcessor(*cut, chat_template)


FAMILY = Qwen2VL()
