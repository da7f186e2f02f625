"""How much memory a run takes on each GPU, from config.json alone: a stated formula, counted before any weight loads.

All sizes are bytes on one GPU. n parameters over S processes that share one copy; b2 = 2 bytes (bf16), b4 = 4 (fp32).

    masters, gradients   b4 n/S each                  moments  2 b4 n/S             reference  b2 n/S
    gathered (rollout)   b2 n: all weights at once    gathered (else)  the root (embedding, head) and two blocks in bf16
    reduction            the root's gradient in bf16 and, before it is scattered, in fp32, and one block's
    KV cache             (b4 + b2) · layers · key/value heads · head size · (P + G C) for each prompt of a rollout
    activations          saved inputs of each decoder layer (P + G C tokens) and vision block (patches), and one of
                         them recomputed with its gradient; without checkpointing, all of them
    logits               COPIES fp32 buffers of one chunk of `grpo.policy.LOGITS_PER_CHUNK` numbers
    overhead             CUDA context, NCCL buffers, the allocator's slack

Phases do not add up: the peak is the largest of rollout, reference and update. Not yet run on a GPU: OVERHEAD and
COPIES are estimates, the rest is counted; `bench/gpu_check.py` puts measured peaks beside it.
"""

from bisect import bisect_right
from dataclasses import replace

import torch

from grpo.config import ConfigError
from grpo.model import FAMILIES, ModelError, read_config
from grpo.policy import LOGITS_PER_CHUNK

GIB = 2**30
OVERHEAD = 3 * GIB
COPIES = 6  # raw, masked and scaled logits, log-probabilities, and in backward the gradients of two of them
TEXT_TOKENS = 256  # of a prompt beside its video: chat template, question, options, instruction
MOST_FRAMES = 4096

# config.json as published, for the names that need no download: what differs from transformers' defaults.
_QWEN2_VL = {
    "Qwen/Qwen2-VL-2B-Instruct": dict(
        hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
        vocab_size=151936, tie_word_embeddings=True,
    ),
    "Qwen/Qwen2-VL-7B-Instruct": dict(
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
        vocab_size=152064, tie_word_embeddings=False,
    ),
}  # fmt: skip


def published_config(name):
    """The transformers config of a folder, a hub name, or (without network) one of the names above."""
    if name not in _QWEN2_VL:
        return read_config(name)
    text = _QWEN2_VL[name]
    vision = {"depth": 32, "embed_dim": 1280, "hidden_size": text["hidden_size"], "mlp_ratio": 4, "num_heads": 16}
    return FAMILIES["qwen2_vl"].config_class(
        text_config=text, vision_config=vision, tie_word_embeddings=text["tie_word_embeddings"]
    )


def frames_of(settings):
    """The most frames of one video of a run."""
    return settings.nframes or settings.max_frames


def copy_width(settings):
    """How many of a run's settings.plan GPUs share one copy of the weights."""
    return settings.shard_size or settings.plan


def vision_tokens(config, frames, pixels):
    """(patches, merged tokens) of a video whose frames have so many pixels."""
    vision = config.vision_config
    steps = -(-frames // vision.temporal_patch_size)
    merged = steps * (pixels // (vision.patch_size * vision.spatial_merge_size) ** 2)
    return merged * vision.spatial_merge_size**2, merged


def parameter_counts(config):
    """{"block": one vision block, "layer": one decoder layer, "root": the rest, "vision", "all"}: numbers of weights,
    counted on the meta device; tied embeddings count once."""
    with torch.device("meta"):
        model = FAMILIES[config.model_type](config)
    count = lambda module: sum(p.numel() for p in module.parameters())
    visual, text = model.model.visual, model.model.language_model
    block, layer, everything = count(visual.blocks[0]), count(text.layers[0]), count(model)
    root = everything - block * len(visual.blocks) - layer * len(text.layers)
    return {"block": block, "layer": layer, "root": root, "vision": count(visual), "all": everything}


def lora_count(config, rank):
    """Adapter weights on every linear layer of the decoder: rank · (inputs + outputs) each."""
    text = config.text_config
    heads = text.num_attention_heads * head_size(text)
    kv = text.num_key_value_heads * head_size(text)
    ends = 2 * (heads + kv) + 3 * text.intermediate_size  # the other side of q, o, k, v, gate, up and down
    return rank * text.num_hidden_layers * (7 * text.hidden_size + ends)


def head_size(text):
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def layer_bytes(hidden, inner, heads, kv):
    """Bytes for each token that one bf16 block holds while it is recomputed and differentiated: what autograd keeps
    (two norms in fp32, q, k, v before and after rotation, residuals, gate, up, their activation and product: counted
    on the meta device, rounded up), and three gradients of the inner width in flight."""
    return 2 * (27 * hidden + 3 * (heads + 2 * kv) + 4 * inner) + 2 * 3 * inner


def memory_plan(config, counts, settings):
    """{"tokens": {...}, "phases": {phase: {part: bytes}}, "peak": bytes} for one GPU of a run on settings.plan of them.

    config: the model's; counts: its `parameter_counts`; settings: the run's Config.
    """
    text, vision = config.text_config, config.vision_config
    width, reference = copy_width(settings), settings.kl_coef > 0
    patches, merged = vision_tokens(config, frames_of(settings), settings.max_pixels)
    prompt = merged + TEXT_TOKENS
    completions = settings.group_size * settings.max_new_tokens
    packed = prompt + completions
    trained = counts["all"] - (counts["vision"] if settings.freeze_vision else 0)
    bases = 4 * counts["all"]
    if settings.lora_rank:
        trained, bases = lora_count(config, settings.lora_rank), 2 * counts["all"]
        bases += 4 * trained
    own_reference = reference and not settings.lora_rank
    always = {
        "masters": bases / width,
        "moments": 8 * trained / width,
        "reference": 2 * counts["all"] / width if own_reference else 0,
        "overhead": OVERHEAD,
    }
    kv_heads, size = text.num_key_value_heads, head_size(text)
    heads = text.num_attention_heads * size
    layer = layer_bytes(text.hidden_size, text.intermediate_size, heads, kv_heads * size)
    wide = getattr(vision, "embed_dim", vision.hidden_size)
    inner = getattr(vision, "intermediate_size", None) or wide * vision.mlp_ratio
    block = layer_bytes(wide, inner, wide, wide)
    in_use = 2 * (counts["layer"] * 2 + counts["root"])
    pixels = 4 * patches * vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    rows, kept = settings.prompts_per_forward, settings.prompts_per_rollout
    saved = {"text": text.num_hidden_layers * 2 * text.hidden_size, "vision": vision.depth * 2 * wide}
    if not settings.gradient_checkpointing:
        saved = {"text": text.num_hidden_layers * layer, "vision": vision.depth * block}
    if settings.freeze_vision:
        saved["vision"] = 0
    logits = COPIES * 4 * min(LOGITS_PER_CHUNK, completions * rows * text.vocab_size)
    sharded = width > 1 or not settings.lora_rank  # one process that trains adapters computes with the base itself
    phases = {
        "rollout": {
            "gathered weights": 2 * counts["all"] * sharded,
            "KV cache": (4 + 2) * text.num_hidden_layers * kv_heads * size * packed * kept,
            "activations": max(layer * prompt, block * patches) * kept + pixels * kept,
            "logits": 40 * kept * settings.group_size * text.vocab_size,
        },
        "reference": {
            "gathered weights": in_use * sharded,
            "activations": (max(layer * packed, block * patches) + pixels) * rows if reference else 0,
            "logits": logits if reference else 0,
        },
        "update": {
            "gradients": 4 * trained / width,
            "gathered weights": in_use * sharded,
            "reduction": 0 if settings.lora_rank else 6 * (counts["root"] + counts["layer"]),
            "activations": (
                saved["text"] * packed + saved["vision"] * patches + max(layer * packed, block * patches) + pixels
            ) * rows,
            "logits": logits,
        },
    }  # fmt: skip
    phases = {phase: {**always, **parts} for phase, parts in phases.items()}
    tokens = {"patches": patches, "video tokens": merged, "prompt tokens": prompt, "packed tokens": packed}
    return {"tokens": tokens, "phases": phases, "peak": max(sum(parts.values()) for parts in phases.values())}


def most_frames(plan_of, limit):
    """The largest even number of frames whose plan_of(frames)["peak"] is within `limit` bytes; 0 where none is."""
    pairs = range(1, MOST_FRAMES // 2 + 1)
    return 2 * bisect_right(pairs, limit, key=lambda pair: plan_of(2 * pair)["peak"])


def plan_text(config):
    """What `--plan` prints: tokens, memory by phase and part, whether it fits, and how many frames would.

    Raises ConfigError where config.json cannot be had.
    """
    if config.plan % copy_width(config):
        raise ConfigError(f"--shard_size {config.shard_size}: must divide the number of GPUs, {config.plan}")
    try:
        model = published_config(config.model)
    except ModelError as error:
        raise ConfigError(str(error)) from error
    counts, limit = parameter_counts(model), config.gpu_memory * GIB
    plan = memory_plan(model, counts, config)
    plan_of = lambda frames: memory_plan(model, counts, replace(config, nframes=frames))
    names = list(dict.fromkeys(name for parts in plan["phases"].values() for name in parts))
    row = lambda name, cells: f"{name:<18}" + "".join(f"{cell:>12}" for cell in cells)
    part = lambda phase, name: f"{plan['phases'][phase].get(name, 0) / GIB:.2f}"
    fits = "fits" if plan["peak"] <= limit else "does not fit"
    return "\n".join(
        [
            f"{config.model}: {counts['all'] / 1e9:.2f}B parameters on {config.plan} GPUs, "
            f"{copy_width(config)} to a copy",
            f"{frames_of(config)} frames of {config.max_pixels} pixels, G {config.group_size}, "
            f"C {config.max_new_tokens}: " + ", ".join(f"{count} {name}" for name, count in plan["tokens"].items()),
            row("GiB on each GPU", plan["phases"]),
            *(row(name, [part(phase, name) for phase in plan["phases"]]) for name in names),
            row("sum", [f"{sum(parts.values()) / GIB:.2f}" for parts in plan["phases"].values()]),
            f"peak {plan['peak'] / GIB:.1f} GiB {fits} --gpu_memory {config.gpu_memory:g}; "
            f"most frames that fit: {most_frames(plan_of, limit)}; a formula (grpo/plan.py), not yet run on a GPU",
        ]
    )
