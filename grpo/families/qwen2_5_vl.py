"""Qwen2.5-VL, arXiv 2502.13923: 3B, 7B, 32B, 72B. Positions on the time axis follow the clock."""

import torch

from grpo.families.base import Family


class Qwen25VL(Family):
    classes = "Qwen2_5_VL"
    tiny_vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "patch_size": 14, "fullatt_block_indexes": [1],
        "window_size": 56, "tokens_per_second": 2,
    }  # fmt: skip

    def time_positions(self, steps, seconds, vision):
        """`int(step * seconds * tokens_per_second)`. transformers 4.57.1 cuts seconds to an integer before it
        multiplies (0.5 becomes 0); transformers 5 and this function do not."""
        return (torch.arange(steps) * seconds * vision.tokens_per_second).long()

    def tower_rest(self, vision):
        wide, tall = self.tower_sizes(vision)
        return 8 * wide + 2 * tall  # its norms are RMSNorms in fp32


FAMILY = Qwen25VL()
