"""What differs from family to family. A method here does what most families need; a family overrides the others.

A family keeps no state: each hook is a function of its arguments. It is pickled into the processes that decode videos.
"""

from collections.abc import Callable, Iterator

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, ProcessorMixin
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from video.prompt import VideoText

Rule = tuple[str, str, Callable[[object], bool]]  # fields of config.json, what each must be, whether a value is

SIZES = (
    "text_config.hidden_size text_config.intermediate_size text_config.vocab_size text_config.num_attention_heads "
    "text_config.num_key_value_heads text_config.rms_norm_eps vision_config.num_heads vision_config.in_channels "
    "vision_config.patch_size vision_config.spatial_merge_size vision_config.temporal_patch_size"
)
TOKENS = "image_token_id video_token_id vision_start_token_id vision_end_token_id"


def is_positive(value: object) -> bool:
    return type(value) in (int, float) and value > 0


class Family(VideoText):
    """A family. The model has `model.visual` (the tower: `blocks`, `patch_embed.proj`), `model.language_model` (the
    decoder: `layers`, `embed_tokens`) and `lm_head`, as transformers' Qwen2-VL has them."""

    # What the decoder takes as attention_mask and then builds no mask: `grpo.attention` needs none.
    no_mask: dict | None = {"full_attention": None}
    mrope_section = [16, 24, 24]  # of transformers' class if config.json has none
    step_tokens = 0  # tokens of a prompt beside the placeholders, for each time step of a video; for --plan
    classes = ""  # what the names of transformers' classes begin with: "Qwen2VL" of Qwen2VLProcessor
    # A model that one CPU core trains, for demo and tests: fields of config.json that differ from `demo.tiny`'s.
    tiny_text: dict = {"use_sliding_window": False}
    tiny_vision: dict = {}
    tiny_corpus = ""  # what its prompts hold beside questions, for the tokenizer to learn

    @property
    def model_class(self) -> type[nn.Module]:
        """transformers' class. A property, so that the processes that decode videos need not import it."""
        return getattr(transformers, f"{self.classes}ForConditionalGeneration")

    # The tower, the decoder and what goes from one to the other

    def vision_features(self, model: nn.Module, pixels: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
        """pixels (patches, values of a patch), grids (n, 3) of images and videos, which the tower does not tell apart
        -> (merged tokens, `feature_width`)."""
        return torch.cat(model.get_image_features(pixels, grids, return_dict=True).pooler_output)

    def feature_width(self, config: PreTrainedConfig) -> int:
        """Numbers that the tower makes of a merged token."""
        return config.text_config.hidden_size

    def decoder_inputs(
        self, embeds: torch.Tensor, placeholders: torch.Tensor, features: torch.Tensor
    ) -> tuple[torch.Tensor, dict]:
        """embeds (1, L, hidden), placeholders (merged tokens,) their places in the row, features of `vision_features`
        -> (embeds with the features in place, what else the decoder's forward is handed)."""
        return embeds.index_copy(1, placeholders, features[None].to(embeds.dtype)), {}

    def time_positions(self, steps: int, seconds: float, vision: PreTrainedConfig) -> torch.Tensor:
        """(steps,) int64 positions on the time axis of one run of placeholders, from zero. seconds: between two time
        steps, 0 for an image; vision: the model's vision_config."""
        return torch.arange(steps)

    # Counts for --plan

    def head_size(self, text: PreTrainedConfig) -> int:
        """Numbers of one head of the decoder's attention."""
        return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads

    def tower_sizes(self, vision: PreTrainedConfig) -> tuple[int, int]:
        """(width of a block of the tower, width inside its MLP)."""
        return vision.hidden_size, vision.intermediate_size

    def layer_rest(self, text: PreTrainedConfig) -> int:
        """Numbers of a token that backward needs of a decoder layer beside its input and what its products and
        attention make: two norms in fp32, attention's output in order, the activation and its product with `up`."""
        return 6 * text.hidden_size + text.num_attention_heads * self.head_size(text) + 2 * text.intermediate_size

    def tower_rest(self, vision: PreTrainedConfig) -> int:
        """The same of a block of the tower: two LayerNorms, rotated queries and keys, the activation's parts."""
        wide, tall = self.tower_sizes(vision)
        return 3 * wide + 2 * tall

    # What config.json must say

    def rules(self, config: PreTrainedConfig) -> Iterator[Rule]:
        """Yields the rules for a config. A rule may rely on those before it."""
        yield SIZES, "a number above 0", is_positive
        # More layers are a slip, and would be built for hours.
        yield "text_config.num_hidden_layers vision_config.depth", "from 1 to 1000", lambda n: 1 <= n <= 1000
        text, vision = config.text_config, config.vision_config
        heads, width = text.num_attention_heads, self.tower_sizes(vision)[0]
        yield from self.head_rules(text)
        yield "text_config.num_key_value_heads", "a divisor of num_attention_heads", lambda n: heads % n == 0
        yield "vision_config.num_heads", f"a divisor of {width} / 4", lambda n: width % (4 * n) == 0
        acts = "text_config.hidden_act vision_config.hidden_act"
        yield acts, "an activation that transformers has", lambda name: name in ACT2FN
        yield from self.rope_rules(text)
        yield TOKENS, f"from 0 to {text.vocab_size - 1}", lambda token: 0 <= token < text.vocab_size
        layers = getattr(text, "layer_types", None) or ()
        # What follows could be built, but not trained: with dropout, say, the scorer would disagree with the sampler.
        yield "text_config.attention_dropout", "0", lambda share: share == 0
        yield "text_config.use_sliding_window", "false", lambda _: "sliding_attention" not in layers
        quantised = "quantization_config text_config.quantization_config"
        yield quantised, "absent (take the model in bf16, not a quantised one)", lambda value: value is None

    def head_rules(self, text: PreTrainedConfig) -> Iterator[Rule]:
        """The rules for the size of a head."""
        size = text.hidden_size
        yield "text_config.num_attention_heads", "a divisor of hidden_size / 2", lambda n: size % (2 * n) == 0

    def rope_rules(self, text: PreTrainedConfig) -> Iterator[Rule]:
        """The rules for rotary positions."""
        rope, types, half = "text_config.rope_parameters", ("default", *ROPE_INIT_FUNCTIONS), self.head_size(text) // 2

        def has_sections(value):
            sections = value.get("mrope_section", self.mrope_section)
            whole = isinstance(sections, list) and all(type(n) is int and n >= 0 for n in sections)
            return whole and len(sections) == 3 and sum(sections) == half

        yield rope, "of a type that transformers has", lambda value: value.get("rope_type") in types
        yield rope, "of a rope_theta above 0", lambda value: is_positive(value.get("rope_theta"))
        yield rope, f"of three mrope_section that add up to {half}", has_sections

    # A tiny model

    def tiny_sizes(self, hidden: int) -> dict:
        """`tiny_vision`, with the fields that depend on hidden, the decoder's hidden_size."""
        return {**self.tiny_vision, "out_hidden_size": hidden}

    def tiny_processor(self, tokenizer: PreTrainedTokenizerBase, chat_template: str) -> ProcessorMixin:
        """The processor of the tiny model, which cuts patches as the real one does."""
        cut = transformers.Qwen2VLImageProcessor(), tokenizer, transformers.Qwen2VLVideoProcessor()
        return getattr(transformers, f"{self.classes}Processor")(*cut, chat_template)
