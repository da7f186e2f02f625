"""The one file that touches transformers' model classes: what they are, how they are loaded and entered."""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoProcessor,
    GenerationConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import rename_source_key

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


def read_config(path):
    """The transformers config of a folder or hub name; only its config.json is needed.

    Raises ModelError for a family whose positions are not known here, or where dropout would make the scorer disagree
    with the sampler.
    """
    if (Path(path) / "adapter_config.json").exists():
        raise ModelError(f"--model {path}: holds adapters; take the run's `merged` folder (train with --lora_merge)")
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
    return config


def read_processor(path):
    """The processor of a folder or hub name. Raises ModelError."""
    read_config(path)
    try:
        return AutoProcessor.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"--model {path}: its processor cannot be read ({str(error).splitlines()[0]}); copy tokenizer and "
            "preprocessor files from the original model"
        ) from error


def empty_model(path, dtype=torch.float32):
    """The unmodified transformers model of a folder or hub name, entered through this project's attention, on the meta
    device: it takes no memory until `materialise`. Raises as `read_config`."""
    config = read_config(path)
    with torch.device("meta"):
        model = FAMILIES[config.model_type]._from_config(config, dtype=dtype)
    try:
        model.generation_config = GenerationConfig.from_pretrained(path)
    except OSError:
        pass  # a checkpoint without one: the config's EOS ids, which the model has taken already
    return use_own_attention(model).eval()


def materialise(model, device):
    """Gives what is on the meta device memory on `device`, in place: parameters uninitialised, tied ones still tied,
    and buffers (rotary frequencies, in no file) computed as transformers does, on the CPU."""
    made = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                if id(parameter) not in made:
                    new = torch.nn.Parameter(torch.empty_like(parameter, device=device), parameter.requires_grad)
                    made[id(parameter)] = (new, parameter)  # the old one is kept, so that its id stays taken
                module._parameters[name] = made[id(parameter)][0]
        if any(buffer.is_meta for buffer in module._buffers.values()):
            module._buffers |= {name: torch.empty_like(b, device="cpu") for name, b in module._buffers.items()}
            model._init_weights(module)
            module.to(device)


@torch.no_grad()
def load_weights(model, path):
    """Fills a materialised model from safetensors files; of a sharded parameter each process reads its own rows alone.

    Names are mapped as transformers maps them (files on the hub have `visual.` and `model.layers.`). Raises ModelError
    where a weight is missing or of another shape.
    """
    renamings = get_model_conversion_mapping(model)
    targets = {name.replace(".base_layer", ""): p for name, p in model.named_parameters(remove_duplicate=False)}
    filled = set()
    for file in weight_files(path):
        with _opened(file) as stored:
            for key in stored.keys():
                name, _ = rename_source_key(key, renamings, [], model.base_model_prefix, targets)
                if name in targets:
                    source = stored.get_slice(key)
                    if source.get_shape() != list(targets[name].shape):
                        shape = list(targets[name].shape)
                        raise ModelError(f"{file}: {key} is of shape {source.get_shape()}, config.json says {shape}")
                    fill(targets[name], source)
                    filled.add(id(targets[name]))
    missing = [name for name, p in targets.items() if id(p) not in filled and ".lora_" not in name]
    if missing:
        raise ModelError(f"--model {path}: its safetensors lack {len(missing)} weights, {missing[0]} among them")


def _opened(file):
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file}: is no whole safetensors file ({error}); download it again") from error


def fill(parameter, source):
    """Copies a source of the parameter's whole shape (a tensor, or a safetensors slice) into it, or into the rows that
    this process holds: only those are read. They cross to the device as stored and are cast there."""
    if not isinstance(parameter, DTensor):
        parameter.copy_(source[:].to(parameter.device))
        return
    local = parameter.to_local()
    _, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    if local.numel():
        local.copy_(source[offset[0] : offset[0] + local.shape[0]].to(local.device))


def weight_files(path):
    """The safetensors files of a folder or hub name, downloaded where need be. Raises ModelError where none are."""
    folder = Path(path)
    try:
        if not folder.is_dir():
            folder = Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors"]))
    except (OSError, ValueError) as error:
        raise ModelError(f"--model {path}: cannot be downloaded ({str(error).splitlines()[0]})") from error
    index = folder / "model.safetensors.index.json"
    names = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    for name in sorted(names):
        if not (folder / name).exists():
            raise ModelError(f"--model {path}: {name} is missing (weights are read from safetensors only)")
    return [folder / name for name in sorted(names)]


def load_model(path, dtype=torch.float32):
    """Returns the model of a folder or hub name on the CPU, whole. Raises as `read_config` and `load_weights`."""
    model = empty_model(path, dtype)
    materialise(model, "cpu")
    load_weights(model, path)
    return model


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
    """(patches, 1176) and (n, 3) grids of images and videos, alike to the tower -> (merged tokens, hidden)."""
    return torch.cat(model.get_image_features(pixels, grids, return_dict=True).pooler_output)


def checkpoint_activations(model, vision=True):
    """Recomputes every decoder layer (and vision block) in backward instead of keeping its activations.

    Wraps `forward`, below the module's hooks, so that a sharded layer's weights are gathered once for recomputation
    and gradient together.
    """
    blocks = [*decoder(model).layers, *(vision_tower(model).blocks if vision else ())]
    for block in blocks:
        block.forward = partial(recomputed, block.forward)  # a copy of the model calls its own blocks


def recomputed(forward, *args, **kwargs):
    """forward(...), run again in backward; where there is no backward, as in sampling, it is called as it is."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def compile_layers(model):
    """Has torch.compile fuse the decoder's norms and MLPs; what attention sees stays as it is."""
    for layer in decoder(model).layers:
        for part in (layer.input_layernorm, layer.post_attention_layernorm, layer.mlp):
            part.compile(dynamic=True)


def save_model(model, processor, folder, weights=None):
    """Writes one Hugging Face folder (safetensors, config, processor) that `from_pretrained` loads anywhere.

    weights: {name: tensor} in place of the model's own, for a model that is sharded.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, state_dict=weights)
    processor.save_pretrained(folder)
