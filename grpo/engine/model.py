"""The model itself, of transformers' classes: how it is built, entered through this project's kernels, and saved."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts, noop_context_fn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from grpo import attention, sequence
from grpo.engine.model_files import eos_ids, read_config, read_generation_config, reading
from grpo.errors import ModelError
from grpo.families import load_family
from grpo.families.base import Family

# Whose outputs selective checkpointing keeps: products with weights, and attention's kernels. Not bmm: attention that
# no kernel fits would keep its scores.
KEPT = frozenset({
    "aten.mm.default",
    "aten.addmm.default",
    "aten._scaled_dot_product_flash_attention_for_cpu.default",
    "aten._scaled_dot_product_flash_attention.default",
    "aten._scaled_dot_product_efficient_attention.default",
    "aten._efficient_attention_forward.default",
    "flash_attn._flash_attn_varlen_forward.default",
})  # fmt: skip
LARGE, BLOCK = 2**19, 32  # of `few_rows`: numbers of a weight, and rows of it in one block


@dataclass(frozen=True, eq=False)
class ModelSpec:
    """What the loop must know of a model."""

    family: Family
    vision: PreTrainedConfig  # its vision_config
    image_token_id: int
    video_token_id: int
    merge_size: int  # the tower merges squares of merge_size x merge_size patches into one token
    patch_values: int  # numbers of one flattened patch: 1176, or 1536 if patches are 16 x 16 (Qwen3-VL)
    feature_width: int  # numbers that the tower makes of a merged token
    eos_ids: tuple[int, ...]
    # Vision ids, masked alike in sampler and scorer: with a sampled placeholder the next forward would have more
    # placeholders than features.
    never_sampled: tuple[int, ...]

    @classmethod
    def of(cls, config: PreTrainedConfig, eos_ids: list[int], vision_pad_id: int | None) -> "ModelSpec":
        family, vision = load_family(config.model_type), config.vision_config
        vision_ids = {config.image_token_id, config.video_token_id, vision_pad_id}
        vision_ids |= {config.vision_start_token_id, config.vision_end_token_id}
        return cls(
            family=family,
            vision=vision,
            image_token_id=config.image_token_id,
            video_token_id=config.video_token_id,
            merge_size=vision.spatial_merge_size,
            patch_values=vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
            feature_width=family.feature_width(config),
            eos_ids=tuple(sorted(set(eos_ids))),
            never_sampled=tuple(sorted(vision_ids - {None})),
        )


def model_spec(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> ModelSpec:
    """The spec of a loaded model. EOS ids are the tokenizer's and the generation_config's.

    Nothing else of generation_config is ever used: its top_k 1 and temperature .01 would silence all exploration.
    """
    ids = eos_ids(model.generation_config) + ([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])
    if not ids:
        raise ModelError("the model has no end-of-sequence id: set eos_token in its tokenizer_config.json")
    return ModelSpec.of(model.config, ids, tokenizer.convert_tokens_to_ids("<|vision_pad|>"))


def empty_model(path: str | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The unmodified transformers model of a folder or hub name, entered through this project's kernels, on the meta
    device: it takes no memory until `materialise`. Raises as `read_config` and `grpo.sequence.check_heads`."""
    config = read_config(path)
    sequence.check_heads(config.text_config.num_attention_heads, sequence.size())
    with reading("--model", path, "config.json"), torch.device("meta"):
        model = load_family(config.model_type).model_class._from_config(config, dtype=dtype)
    model.generation_config = read_generation_config(path, config)
    return use_own_kernels(model).eval()


def use_own_kernels(model: PreTrainedModel) -> PreTrainedModel:
    """Makes the model call `grpo.attention`, `embed_patches`, `rms_norm` and `few_rows` from now on; returns it.

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
        elif isinstance(module, nn.Linear) and module.weight.numel() >= LARGE:
            module.forward = partial(few_rows, module)
    return model


def embed_patches(proj: nn.Conv3d, patches: torch.Tensor) -> torch.Tensor:
    """patches (n, values of a patch) -> (n, width), as a matrix product: the kernel of `proj` is as large as its
    stride, so that it sees each patch once, and torch's Conv3d takes ten times as long."""
    return F.linear(patches.to(proj.weight.dtype), proj.weight.flatten(1), proj.bias)


def rms_norm(norm: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """transformers' RMSNorm; as one kernel instead of eight while "fused norms" is in use.

    In fp32 both are equal to rounding. In bf16 the kernel rounds once, after the product with the weight; transformers
    rounds before it too.
    """
    if "fused norms" in attention.IN_USE:
        return F.rms_norm(hidden, norm.weight.shape, norm.weight, norm.variance_epsilon)
    return type(norm).forward(norm, hidden)


def few_rows(linear: nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
    """`linear`, faster for the 3 to 8 rows that a CPU decodes together: as a batch of products with BLOCK rows of the
    weight each. As one product, torch's MKL takes up to twice as long for 8 rows, and longer than for 16."""
    weight, rows = linear.weight, hidden.shape[:-1].numel()
    decoding = hidden.is_cpu and 3 <= rows <= 8 and not torch.is_grad_enabled()
    if not decoding or hidden.dtype != torch.float32 or len(weight) % BLOCK:
        return F.linear(hidden, weight, linear.bias)
    blocks = weight.unflatten(0, (-1, BLOCK)).transpose(1, 2)
    out = hidden.reshape(1, rows, -1).expand(len(blocks), -1, -1) @ blocks  # (blocks, rows, BLOCK)
    out = out.transpose(0, 1).reshape(*hidden.shape[:-1], -1)
    return out if linear.bias is None else out + linear.bias


def vision_tower(model: PreTrainedModel) -> nn.Module:
    return model.model.visual


def decoder(model: PreTrainedModel) -> nn.Module:
    return model.model.language_model


def checkpoint_activations(model: PreTrainedModel, selective: bool = False, vision: bool = True) -> None:
    """Recomputes every decoder layer (and vision block) in backward instead of keeping its activations; `selective`:
    all but the outputs of `KEPT`, so that only norms, rotations and activation functions are computed twice.

    Wraps `forward`, below the module's hooks, so that a sharded layer's weights are gathered once for recomputation
    and gradient together.
    """
    blocks = [*decoder(model).layers, *(vision_tower(model).blocks if vision else ())]
    run = partial(recomputed, context_fn=keeping_products) if selective else recomputed
    for block in blocks:
        block.forward = partial(run, block.forward)  # a copy of the model calls its own blocks


def recomputed(forward, *args, context_fn=noop_context_fn, **kwargs):
    """forward(...), run again in backward. If there is no backward, as in sampling, it is a plain call."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(
        forward, *args, use_reentrant=False, preserve_rng_state=False, context_fn=context_fn, **kwargs
    )  # fmt: skip


def keeping_products():
    """The contexts of a forward that keeps the outputs of `KEPT`, and of the second forward, which reuses them."""

    def policy(_, operator, *args, **kwargs):
        return CheckpointPolicy.PREFER_SAVE if str(operator) in KEPT else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def compile_layers(model: PreTrainedModel) -> None:
    """Has torch.compile fuse the decoder's norms and MLPs; what attention sees stays as it is."""
    for layer in decoder(model).layers:
        for part in (layer.input_layernorm, layer.post_attention_layernorm, layer.mlp):
            part.compile(dynamic=True)


def save_model(model: PreTrainedModel, processor: ProcessorMixin, folder: Path, weights: dict | None = None) -> None:
    """Writes one Hugging Face folder (safetensors, config, processor) that `from_pretrained` loads anywhere.

    weights: {name: tensor}, saved in place of the model's weights if the model is empty.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, state_dict=weights)
    processor.save_pretrained(folder)
