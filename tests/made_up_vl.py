"""A family that nobody publishes, for `tests/test_families.py`: Qwen3-VL under another name.

All that the project must be told of it is this file, in `grpo/families/`.
"""

import transformers

from grpo.families.qwen3_vl import Qwen3VL


class MadeUpConfig(transformers.Qwen3VLConfig):
    model_type = "made_up_vl"


class MadeUpForConditionalGeneration(transformers.Qwen3VLForConditionalGeneration):
    config_class = MadeUpConfig


class MadeUpVL(Qwen3VL):
    @property
    def model_class(self):
        return MadeUpForConditionalGeneration


FAMILY = MadeUpVL()
