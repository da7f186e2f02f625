"""How much memory a run takes on each GPU, from config.json alone: a stated formula, counted before any weight loads.

All sizes are bytes on one GPU. n parameters over S processes that share one copy; b2 = 2 bytes (bf16), b4 = 4 (fp32).

    masters, gradients   b4 n/S each                  moments  2 b4 n/S             reference  b2 n/S
    gathered (rollout)   b2 n: all weights at once    gathered (else)  the root (embedding, head) and two blocks in bf16
    reduction            bf16 gradients on their way to fp32 shards: lm_head's, a layer's, at the end the root's
    KV cache             (b4 + b2) · layers · key/value heads · head size · (P + G C) for each prompt of a rollout
    activations          saved inputs of each decoder layer (P + G C tokens) and vision block (patches), and what one of
                         them holds while it is computed or differentiated; without checkpointing, all that is saved
    logits               COPIES fp32 buffers of one chunk of `grpo.policy.LOGITS_PER_CHUNK` numbers
    overhead             CUDA context, NCCL buffers

Neither phases nor the moments of a phase add up: a phase takes what its largest moment takes, the peak is the largest
phase. Without the overhead, this is what torch's allocator hands out; what it reserves is more (RESERVED). Both were
held against torch's own allocator at the real shapes, within 10% (docs/performance.md). Not yet run on a GPU: OVERHEAD
and COPIES are estimates; `bench/gpu_check.py` puts measured peaks beside it.
"""

from bisect import bisect_left
from dataclasses import replace

import torch

from grpo.engine.model_files import FAMILIES, read_config
from grpo.errors import ConfigError, ModelError
from grpo.policy import LOGITS_PER_CHUNK

GIB = 2**30
OVERHEAD = 3 * GIB
RESERVED = 1.5  # times what is in use: blocks that no phase after theirs fits; given back when memory runs out
COPIES = 6  # raw, masked and scaled logits, log-probabilities, and in backward the gradients of two of them
TEXT_TOKENS = 256  # of a prompt beside its video: chat template, question, options, instruction
MOST_FRAMES = 4096

# config.json as published, for the names that need no download: what differs from transformers' defaults.
_PUBLISHED = {
    # family, hidden, inner, layers, heads, key/value heads, vocabulary, tied embeddings, inner of the vision tower
    "Qwen/Qwen2-VL-2B-Instruct": ("qwen2_vl", 1536, 8960, 28, 12, 2, 151936, True, 5120),
    "Qwen/Qwen2-VL-7B-Instruct": ("qwen2_vl", 3584, 18944, 28, 28, 4, 152064, False, 5120),
    "Qwen/Qwen2.5-VL-3B-Instruct": ("qwen2_5_vl", 2048, 11008, 36, 16, 2, 151936, True, 3420),
    "Qwen/Qwen2.5-VL-7B-Instruct": ("qwen2_5_vl", 3584, 18944, 28, 28, 4, 152064, False, 3420),
    "Qwen/Qwen2.5-VL-32B-Instruct": ("qwen2_5_vl", 5120, 27648, 64, 40, 8, 152064, False, 3456),
    "Qwen/Qwen2.5-VL-72B-Instruct": ("qwen2_5_vl", 8192, 29568, 80, 64, 8, 152064, False, 3456),
}


def published_config(name):
    """The transformers config of a folder, a hub name, or (without network) one of the names above."""
    if name not in _PUBLISHED:
        return read_config(name)
    family, hidden, inner, layers, heads, kv_heads, words, tied, tower = _PUBLISHED[name]
    text = dict(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=words, tie_word_embeddings=tied,
    )  # fmt: skip
    vision = {"depth": 32, "num_heads": 16}
    if family == "qwen2_vl":
        vision |= {"embed_dim": 1280, "hidden_size": hidden, "mlp_ratio": tower // 1280}
    else:
        vision |= {"hidden_size": 1280, "out_hidden_size": hidden, "intermediate_size": tower, "tokens_per_second": 2}
    return FAMILIES[family].config_class(text_config=text, vision_config=vision, tie_word_embeddings=tied)


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
    """Bytes for each token that autograd keeps of one bf16 block that is not checkpointed: two norms in fp32, q, k, v
    before and after rotation, residuals, gate, up, their activation and product; counted on the meta device."""
    return 2 * (27 * hidden + 3 * (heads + 2 * kv) + 4 * inner)


def memory_plan(config, counts, settings):
    """{"tokens": {...}, "phases": {phase: {part: bytes}}, "peak": bytes} for one GPU of a run on settings.plan of them.
    A phase's parts are those of its `moments` that takes most.

    config: the model's; counts: its `parameter_counts`; settings: the run's Config.
    """
    width, lora = copy_width(settings), settings.lora_rank > 0
    patches, merged = vision_tokens(config, frames_of(settings), settings.max_pixels)
    prompt = merged + TEXT_TOKENS
    packed = prompt + settings.group_size * settings.max_new_tokens
    tokens = {"patches": patches, "video tokens": merged, "prompt tokens": prompt, "packed tokens": packed}
    trained = counts["all"] - (counts["vision"] if settings.freeze_vision else 0)
    masters = 4 * counts["all"]
    if lora:
        trained = lora_count(config, settings.lora_rank)
        masters = 2 * counts["all"] + 4 * trained
    always = {
        "masters": masters / width,
        "moments": 8 * trained / width,
        "reference": 2 * counts["all"] / width if settings.kl_coef and not lora else 0,
        "overhead": OVERHEAD,
    }
    largest = lambda parts: sum(parts.values())
    phases = {
        phase: always | max(parts, key=largest)
        for phase, parts in moments(config, counts, settings, tokens, trained).items()
    }
    return {"tokens": tokens, "phases": phases, "peak": max(map(largest, phases.values()))}


def moments(config, counts, settings, tokens, trained):
    """{phase: [{part: bytes} at each moment of it that may take most]}, beside what is always there."""
    text, vision, width, lora = config.text_config, config.vision_config, copy_width(settings), settings.lora_rank > 0
    patches, prompt, packed = tokens["patches"], tokens["prompt tokens"], tokens["packed tokens"]
    rows, kept, frozen = settings.prompts_per_forward, settings.prompts_per_rollout, settings.freeze_vision or lora
    hidden, inner, words = text.hidden_size, text.intermediate_size, text.vocab_size
    wide = getattr(vision, "embed_dim", vision.hidden_size)
    tall = getattr(vision, "intermediate_size", None) or wide * vision.mlp_ratio
    kv = text.num_key_value_heads * head_size(text)
    whole, root, layer, block = (2 * counts[name] for name in ("all", "root", "layer", "block"))  # in bf16
    pixels = 4 * patches * vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    features = 2 * hidden * tokens["video tokens"]
    # What one block holds at its peak, each bf16 number 2 bytes: read off the lists of blocks that torch's allocator
    # had out. The tower rotates queries and keys in fp32.
    see, see_backward = 2 * 17 * wide * patches, 2 * max(6 * tall + 5 * wide, 17 * wide) * patches
    read, read_backward = 2 * (3 * inner + 4 * hidden), 2 * (6 * inner + 15 * hidden)
    layers, blocks = text.num_hidden_layers * 2 * hidden, (vision.depth + 4) * 2 * wide  # saved for backward, a token
    if not settings.gradient_checkpointing:
        layers = text.num_hidden_layers * layer_bytes(hidden, inner, text.num_attention_heads * head_size(text), kv)
        blocks = vision.depth * layer_bytes(wide, tall, wide, wide)
    layers, blocks = layers * packed * rows, 0 if frozen else blocks * patches * rows
    logits = COPIES * 4 * min(LOGITS_PER_CHUNK, (packed - prompt) * rows * words)
    cache = (4 + 2) * text.num_hidden_layers * kv * kept

    gathers = 1 if width > 1 or not lora else 0  # one process that trains adapters computes with the base itself
    rollout = [
        {"gathered weights": gathers * (whole + layer)},
        {"gathered weights": gathers * whole, "activations": (1.5 * pixels + see) * kept},
        {"gathered weights": gathers * whole, "KV cache": cache * prompt,
         "activations": (pixels + features + read * prompt) * kept},
        {"gathered weights": gathers * whole, "KV cache": cache * packed, "activations": pixels * kept,
         "logits": 40 * kept * settings.group_size * words},
    ]  # fmt: skip
    shared = 1 if width > 1 else 0  # one process holds its reference whole
    reference = [
        {"gathered weights": shared * 2 * root, "activations": pixels * rows},  # what is sent, and what is unpacked
        {"gathered weights": shared * (root + 3 * block), "activations": (1.5 * pixels + see) * rows},
        {"gathered weights": shared * (root + 2 * layer), "activations": (pixels + features + read * packed) * rows},
        {"gathered weights": shared * root, "activations": pixels * rows, "logits": logits},
    ]  # fmt: skip
    head = 0 if lora else 2 * hidden * words  # lm_head's gradient in bf16, from the first chunk of logits to the end
    shard = 4 / width  # bytes of a gradient
    of_text = shard * text.num_hidden_layers * counts["layer"]
    of_blocks = 0 if frozen else shard * vision.depth * counts["block"]
    if lora:
        of_text = shard * trained
    update = [
        {"gathered weights": gathers * root, "reduction": head, "activations": 1.5 * pixels * rows + layers + blocks,
         "logits": logits},
        {"gathered weights": gathers * (root + 2 * layer), "reduction": head,  # the last layer's backward is the first
         "activations": 1.5 * pixels * rows + layers + blocks + read_backward * packed * rows},
        {"gathered weights": gathers * (root + 2 * layer), "gradients": of_text,
         "reduction": head + (0 if lora else 2 * layer),  # a layer's in fp32
         "activations": (1.5 * pixels + read_backward * packed) * rows + layers / text.num_hidden_layers + blocks},
        {"gathered weights": gathers * (root + 2 * block), "gradients": of_text, "reduction": head,
         "activations": 1.5 * pixels * rows + (0 if frozen else blocks + see_backward * rows)},
        {"gradients": of_text + of_blocks, "reduction": 0 if lora else 3 * root,  # in bf16, and in fp32 to be sent
         "activations": 1.5 * pixels * rows},
        {"gradients": shard * trained},
    ]  # fmt: skip
    return {"rollout": rollout, "reference": reference if settings.kl_coef else [{}], "update": update}


def most_frames(plan_of, limit, most_tokens):
    """The largest even number of frames whose plan_of(frames) has a peak within `limit` bytes and a prompt within
    most_tokens; 0 where none is."""
    pairs = range(1, MOST_FRAMES // 2 + 1)

    def too_many(pair):
        plan = plan_of(2 * pair)
        return plan["peak"] > limit or plan["tokens"]["prompt tokens"] > most_tokens

    return 2 * bisect_left(pairs, True, key=too_many)


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
    reserved = RESERVED * (plan["peak"] - OVERHEAD) + OVERHEAD
    most = most_frames(plan_of, limit, config.max_prompt_tokens)
    skipped = plan["tokens"]["prompt tokens"] > config.max_prompt_tokens
    return "\n".join(
        [
            f"{config.model}: {counts['all'] / 1e9:.2f}B parameters on {config.plan} GPUs, "
            f"{copy_width(config)} to a copy",
            f"{frames_of(config)} frames of {config.max_pixels} pixels, G {config.group_size}, "
            f"C {config.max_new_tokens}: " + ", ".join(f"{count} {name}" for name, count in plan["tokens"].items()),
            row("GiB on each GPU", plan["phases"]),
            *(row(name, [part(phase, name) for phase in plan["phases"]]) for name in names),
            row("sum", [f"{sum(parts.values()) / GIB:.2f}" for parts in plan["phases"].values()]),
            f"peak {plan['peak'] / GIB:.1f} GiB {fits} --gpu_memory {config.gpu_memory:g} (torch reserves up to "
            f"{reserved / GIB:.1f} if there is room); most frames that fit: {most}",
            f"prompts this long {'are SKIPPED: raise' if skipped else 'fit'} --max_prompt_tokens "
            f"{config.max_prompt_tokens}; a formula (grpo/plan.py), not yet run on a GPU",
        ]
    )
