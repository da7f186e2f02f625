"""The one file that touches transformers' model classes: what they are, how they are loaded and entered."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLForConditionalGeneration

from grpo import attention

FAMILIES = {
    "qwen2_vl": Qwen2VLForConditionalGeneration,
    "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration,
}


class ModelError(ValueError):
    """A model that cannot be trained here; one line with the mend."""


@dataclass(frozen=True)
class ModelSpec:
    """What the loop must know of a model. `never_sampled`: vision ids, masked alike in sampler and scorer, since a
    sampled placeholder would leave the next forward with more placeholders than features."""

    image_token_id: int
    video_token_id: int
    merge_size: int
    patch_values: int
    tokens_per_second: float | None
    eos_ids: tuple
    never_sampled: tuple

    @classmethod
    def of(cls, config, eos_ids, vision_pad_id):
        vision = config.vision_config
        vision_ids = {config.image_token_id, config.video_token_id, vision_pad_id}
        vision_ids |= {config.vision_start_token_id, config.vision_end_token_id}
        return cls(
            image_token_id=config.image_token_id,
            video_token_id=config.video_token_id,
            merge_size=vision.spatial_merge_size,
            patch_values=vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
            tokens_per_second=getattr(vision, "tokens_per_second", None),
            eos_ids=tuple(sorted(set(eos_ids))),
            never_sampled=tuple(sorted(vision_ids - {None})),
        )


def load_model(path, dtype=torch.float32):
    """Returns the unmodified transformers model of a folder or hub name, entered through this project's attention.

    Raises ModelError for a family whose positions are not known here, or where dropout would make the scorer disagree
    with the sampler.
    """
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"--model {path}: no model there ({str(error).splitlines()[0]}); give a folder with config.json and "
            "safetensors, a hub name that this machine can download, or try `python train.py --preset demo`"
        ) from error
    if config.model_type not in FAMILIES:
        raise ModelError(f"--model {path}: family {config.model_type!r}; supported are {', '.join(FAMILIES)}")
    if config.text_config.attention_dropout:
        raise ModelError(f"--model {path}: attention_dropout must be 0 in its config.json")
    if "sliding_attention" in config.text_config.layer_types:
        raise ModelError(f"--model {path}: sliding-window attention is not supported; set use_sliding_window to false")
    return use_own_attention(FAMILIES[config.model_type].from_pretrained(path, dtype=dtype))


def use_own_attention(model):
    """Returns the model, entered through `grpo.attention` from now on. The names are set after construction: at
    construction transformers would try to fetch a kernel for a name with "flash" in it."""
    attention.register()
    vision_tower(model).config._attn_implementation = attention.VISION_ATTENTION
    decoder(model).config._attn_implementation = attention.TEXT_ATTENTION
    return model


def model_spec(model, tokenizer):
    """The spec of a loaded model. EOS ids are the tokenizer's and the generation_config's; nothing else of
    generation_config is ever used (its top_k 1 and temperature .01 would silence all exploration)."""
    listed = model.generation_config.eos_token_id
    listed = [] if listed is None else [listed] if isinstance(listed, int) else list(listed)
    eos_ids = [i for i in [tokenizer.eos_token_id, *listed] if i is not None]
    if not eos_ids:
        raise ModelError("the model has no end-of-sequence id: set eos_token in its tokenizer_config.json")
    return ModelSpec.of(model.config, eos_ids, tokenizer.convert_tokens_to_ids("<|vision_pad|>"))


def vision_tower(model):
    return model.model.visual


def decoder(model):
    return model.model.language_model


def vision_features(model, pixels, grids):
    """(patches, 1176) and (n, 3) grids of images and videos, which the tower treats alike -> (merged tokens, hidden)."""
    return torch.cat(model.get_image_features(pixels, grids, return_dict=True).pooler_output)


def checkpoint_activations(model, vision=True):
    """Recomputes every decoder layer (and vision block) in backward instead of keeping its activations.

    Wraps `forward`, below the module's hooks, so that a sharded layer's weights are gathered once for recomputation
    and gradient together.
    """
    blocks = [*decoder(model).layers, *(vision_tower(model).blocks if vision else ())]
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


def save_model(model, processor, folder, weights=None):
    """Writes one Hugging Face folder (safetensors, config, processor) that `from_pretrained` loads anywhere.

    weights: {name: tensor} in place of the model's own, for a model that is sharded.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, state_dict=weights)
    processor.save_pretrained(folder)
