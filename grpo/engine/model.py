"""The one file that touches transformers' model classes: what they are, how they are loaded and entered."""

import json
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    GenerationConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
)
from transformers.activations import ACT2FN
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import rename_source_key
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from grpo import attention
from grpo.errors import ModelError
from video.prompt import load_processor

FAMILIES = {"qwen2_vl": Qwen2VLForConditionalGeneration, "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration}

STORED = ("BF16", "F16", "F32", "F64")  # as safetensors names them; any other number is quantised, and needs its scale


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


@contextmanager
def reading(path, what, fix):
    """Turns any exception of its block into one ModelError. transformers checks few of the values that it reads, so a
    damaged file ends in a KeyError, a ZeroDivisionError or any other. The line names a .json file that does not parse.
    """
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        broken = [file.name for file in sorted(Path(path).glob("*.json")) if not _is_json(file)]
        reason = f"{broken[0]} is not JSON" if broken else f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ModelError(f"--model {path}: {what} ({reason[:300]}); {fix}") from error


def _is_json(file):
    try:
        json.loads(file.read_bytes())
    except (OSError, ValueError):
        return False
    return True


def check_folder(flag, path):
    """Raises ModelError, naming the models beside it, if `path` is missing and can be no hub name (OWNER/NAME)."""
    parent = Path(path).parent
    if not Path(path).exists() and (parent.is_dir() or str(path).count("/") > 1):
        there = ", ".join(sorted(file.parent.name for file in parent.glob("*/config.json"))) or "no model"
        raise ModelError(f"{flag} {path}: no such folder; {parent} has {there}")


def read_config(path):
    """The transformers config of a folder or hub name; only its config.json is needed.

    Raises ModelError for a model that cannot be built from it, or is not supported.
    """
    check_folder("--model", path)
    for file in Path(path).glob("*"):
        if file.exists() and not (file.is_file() or file.is_dir()):  # opening a named pipe would wait for ever
            raise ModelError(f"--model {path}: {file.name} is not a regular file")
    if (Path(path) / "adapter_config.json").exists():
        raise ModelError(f"--model {path}: holds adapters; take the run's `merged` folder (train with --lora_merge)")
    what, fix = "its config.json cannot be used", "compare it with the original model's"
    if not (Path(path) / "config.json").exists():
        what, fix = (
            "no model there",
            (
                "give a folder with config.json and safetensors, a hub name that this machine can download, or try "
                "`python train.py --preset demo`"
            ),
        )
    with reading(path, what, fix):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        if config.model_type not in FAMILIES:
            raise ModelError(f"--model {path}: family {config.model_type!r}; supported are {', '.join(FAMILIES)}")
        for field, must, holds in _rules(config):
            if not holds:
                value = repr(attrgetter(field)(config))[:100]
                raise ModelError(f"--model {path}: {field} must be {must}, and is {value} in its config.json")
    return config


def _rules(config):
    """Yields (field of config.json, what it must be, whether it is); a rule may rely on those before it."""
    text, vision = config.text_config, config.vision_config
    number = lambda value: type(value) in (int, float) and value > 0
    sizes = "hidden_size intermediate_size vocab_size num_attention_heads num_key_value_heads rms_norm_eps"
    patches = "num_heads in_channels patch_size spatial_merge_size temporal_patch_size"
    for part, names in (("text_config", sizes), ("vision_config", patches)):
        for field in (f"{part}.{name}" for name in names.split()):
            yield field, "a number above 0", number(attrgetter(field)(config))
    for field in ("text_config.num_hidden_layers", "vision_config.depth"):
        yield field, "from 1 to 1000", 1 <= attrgetter(field)(config) <= 1000  # a slip would be built for hours
    heads, width = text.num_attention_heads, getattr(vision, "embed_dim", vision.hidden_size)
    yield "text_config.num_attention_heads", "a divisor of hidden_size / 2", text.hidden_size % (2 * heads) == 0
    yield "text_config.num_key_value_heads", "a divisor of the heads", heads % text.num_key_value_heads == 0
    yield "vision_config.num_heads", f"a divisor of {width} / 4", width % (4 * vision.num_heads) == 0
    for field in ("text_config.hidden_act", "vision_config.hidden_act"):
        yield field, "an activation that transformers has", attrgetter(field)(config) in ACT2FN
    rope, half = text.rope_parameters, text.hidden_size // heads // 2
    sections = rope.get("mrope_section", [16, 24, 24])  # the models' default
    field = "text_config.rope_parameters"
    yield field, "of a type that transformers has", rope.get("rope_type") in ("default", *ROPE_INIT_FUNCTIONS)
    yield field, "of a rope_theta above 0", number(rope.get("rope_theta"))
    whole = isinstance(sections, list) and len(sections) == 3 and all(type(n) is int and n >= 0 for n in sections)
    yield field, f"of three mrope_section that add up to {half}", whole and sum(sections) == half
    for field in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
        yield field, f"from 0 to {text.vocab_size - 1}", 0 <= attrgetter(field)(config) < text.vocab_size
    # What could be built, but not trained here: dropout would make the scorer disagree with the sampler.
    yield "text_config.attention_dropout", "0", text.attention_dropout == 0
    yield "text_config.use_sliding_window", "false", "sliding_attention" not in text.layer_types
    for part, prefix in ((config, ""), (text, "text_config.")):
        plain = getattr(part, "quantization_config", None) is None
        yield prefix + "quantization_config", "absent (take the model in bf16, not a quantised one)", plain


def read_processor(path):
    """The processor of a folder or hub name, for the ids and patches of its config.json. Raises ModelError."""
    config = read_config(path)
    with reading(path, "its processor cannot be used", "copy tokenizer and processor files from the original model"):
        processor = load_processor(path)
        ids, cut = processor.tokenizer.get_vocab(), processor.video_processor
        for field, value in (
            ("image_token_id", ids.get(processor.image_token)),
            ("video_token_id", ids.get(processor.video_token)),
            ("vision_config.patch_size", cut.patch_size),
            ("vision_config.temporal_patch_size", cut.temporal_patch_size),
            ("vision_config.spatial_merge_size", cut.merge_size),
        ):
            if attrgetter(field)(config) != value:
                raise ValueError(f"{field} is {attrgetter(field)(config)} in config.json, and {value} in the processor")
        most = config.text_config.vocab_size - 1
        if max(ids.values()) > most:
            raise ValueError(f"it has a token {max(ids.values())}, config.json's vocab_size allows {most}")
    return processor


def empty_model(path, dtype=torch.float32):
    """The unmodified transformers model of a folder or hub name, entered through this project's attention, on the meta
    device: it takes no memory until `materialise`. Raises as `read_config`."""
    config = read_config(path)
    with reading(path, "no model can be built from its config.json", "compare it with the original model's"):
        with torch.device("meta"):
            model = FAMILIES[config.model_type]._from_config(config, dtype=dtype)
    with reading(path, "its generation_config.json cannot be used", "compare it with the original model's"):
        try:
            model.generation_config = GenerationConfig.from_pretrained(path)
        except OSError:
            if (Path(path) / "generation_config.json").exists():
                raise
            # a checkpoint without one: the config's EOS ids, which the model has taken already
        wrong = [i for i in eos_ids(model) if type(i) is not int or not 0 <= i < config.text_config.vocab_size]
        if wrong:
            raise ValueError(f"eos_token_id {wrong[0]!r} is no token id")
    return use_own_kernels(model).eval()


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
    for a weight that is missing, of another shape, quantised, not finite, or that the model has no place for.
    """
    renamings = get_model_conversion_mapping(model)
    targets = {name.replace(".base_layer", ""): p for name, p in model.named_parameters(remove_duplicate=False)}
    filled, unknown = {}, []
    for file in weight_files(path):
        with _opened(file) as stored:
            for key in stored.keys():
                name, _ = rename_source_key(key, renamings, [], model.base_model_prefix, targets)
                if name in targets:
                    source, target = stored.get_slice(key), targets[name]
                    _check_form(file, key, source, list(target.shape))
                    other, rows = filled.get(id(target), (key, None))
                    before = None if rows is None else rows.clone()
                    rows = fill(target, source)
                    if before is not None and not torch.equal(before, rows):
                        raise ModelError(f"{file}: {key} is not {other}, but config.json has tie_word_embeddings")
                    # A NaN shows in the least and largest: 7 s for 7B on one thread, where isfinite takes minutes.
                    if rows.numel() and not torch.stack(rows.aminmax()).isfinite().all():
                        raise ModelError(f"{file}: {key} holds NaN or infinity; take an earlier checkpoint")
                    filled[id(target)] = key, rows
                elif not key.endswith(".inv_freq"):  # a rotary buffer, as old libraries saved it
                    unknown.append(key)
    missing = [name for name, p in targets.items() if id(p) not in filled and ".lora_" not in name]
    if missing:
        raise ModelError(f"--model {path}: its safetensors lack {len(missing)} weights, {missing[0]} among them")
    if unknown:
        raise ModelError(
            f"--model {path}: its safetensors hold {len(unknown)} weights that its config.json has no place for, "
            f"{unknown[0]} among them: quantised, or another model's"
        )


def _check_form(file, key, source, shape):
    """Raises ModelError if what is stored under `key` cannot be a parameter of this shape."""
    if source.get_dtype() not in STORED:
        raise ModelError(f"{file}: {key} is stored as {source.get_dtype()}, quantised; take the model in bf16")
    if source.get_shape() != shape:
        raise ModelError(f"{file}: {key} is of shape {source.get_shape()}, config.json says {shape}")


def _opened(file):
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file}: is no whole safetensors file ({error}); download it again") from error


def fill(parameter, source):
    """Copies a source of the parameter's whole shape (a tensor, or a safetensors slice) into it, or into the rows that
    this process holds: only those are read, and cast on the device. Returns what it filled."""
    if not isinstance(parameter, DTensor):
        return parameter.copy_(source[:].to(parameter.device))
    local = parameter.to_local()
    _, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    if local.numel():
        local.copy_(source[offset[0] : offset[0] + local.shape[0]].to(local.device))
    return local


def weight_files(path):
    """The safetensors files of a folder or hub name, downloaded where need be. Raises ModelError where none are."""
    folder = Path(path)
    try:
        if not folder.is_dir():
            folder = Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors"]))
    except (OSError, ValueError) as error:
        raise ModelError(f"--model {path}: cannot be downloaded ({str(error).splitlines()[0]})") from error
    index, names = folder / "model.safetensors.index.json", ["model.safetensors"]
    if index.exists():
        with reading(path, f"{index.name} cannot be used", "download it again"):
            names = sorted({str(Path(name)) for name in json.loads(index.read_text())["weight_map"].values()})
    for name in names:
        if not (folder / name).is_file():
            raise ModelError(f"--model {path}: {name} is missing (weights are read from safetensors only)")
    return [folder / name for name in names]


def load_model(path, dtype=torch.float32):
    """Returns the model of a folder or hub name on the CPU, whole. Raises as `read_config` and `load_weights`."""
    model = empty_model(path, dtype)
    materialise(model, "cpu")
    load_weights(model, path)
    return model


def use_own_kernels(model):
    """Returns the model, entered through `grpo.attention`, `embed_patches` and `rms_norm` from now on.

    Attention's names are set after construction: at construction transformers would try to fetch a kernel for a name
    with "flash" in it.
    """
    attention.register()
    tower = vision_tower(model)
    tower.config._attn_implementation = attention.VISION_ATTENTION
    decoder(model).config._attn_implementation = attention.TEXT_ATTENTION
    # `forward` is bound below FSDP's hooks, and to the module, so that a copy of the model calls its own modules.
    tower.patch_embed.forward = partial(embed_patches, tower.patch_embed.proj)
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.forward = partial(rms_norm, module)
    return model


def embed_patches(proj, patches):
    """patches (n, 1176) -> (n, width). The convolution `proj` sees each patch once, as its kernel is as large as its
    stride: it is a matrix product, and torch's Conv3d takes ten times as long over it."""
    return F.linear(patches.to(proj.weight.dtype), proj.weight.flatten(1))


def rms_norm(norm, hidden):
    """transformers' RMSNorm, while "fused norms" is in use as one kernel instead of eight.

    In fp32 both are equal to rounding. In bf16 the kernel rounds once, after the product with the weight; transformers
    rounds before it too.
    """
    if "fused norms" in attention.IN_USE:
        return F.rms_norm(hidden, norm.weight.shape, norm.weight, norm.variance_epsilon)
    return type(norm).forward(norm, hidden)


def model_spec(model, tokenizer):
    """The spec of a loaded model. EOS ids are the tokenizer's and the generation_config's; nothing else of
    generation_config is ever used (its top_k 1 and temperature .01 would silence all exploration)."""
    ids = eos_ids(model) + ([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])
    if not ids:
        raise ModelError("the model has no end-of-sequence id: set eos_token in its tokenizer_config.json")
    return ModelSpec.of(model.config, ids, tokenizer.convert_tokens_to_ids("<|vision_pad|>"))


def eos_ids(model):
    """The EOS ids that its generation_config lists: null, a number or a list there."""
    listed = model.generation_config.eos_token_id
    return [] if listed is None else listed if isinstance(listed, list) else [listed]


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
