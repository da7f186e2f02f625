"""How much memory a run takes on each GPU, from config.json alone: a stated formula, counted before any weight loads.

All sizes are bytes on one GPU. n parameters over S processes that share one copy; b2 = 2 bytes (bf16), b4 = 4 (fp32).

    masters, gradients   b4 n/S each                  moments  2 b4 n/S             reference  b2 n/S
    gathered (rollout)   b2 n: all weights at once    gathered (else)  the root (embedding, head) and two blocks in bf16
    reduction            bf16 gradients on their way to fp32 shards: lm_head's, a layer's, at the end the root's
    KV cache             (b4 + b2) · layers · key/value heads · head size · (P + G C) for each prompt of a rollout
    activations          what --activation_checkpointing keeps of each decoder layer (P + G C tokens) and vision block
                         (patches), and what one of them holds while it is computed or differentiated
    logits               COPIES fp32 buffers of one chunk of `grpo.policy.LOGITS_PER_CHUNK` numbers
    overhead             CUDA context, NCCL buffers

With --sequence_parallel R, tokens, patches and completions are those of one of the R ranks that share a prompt, 1/R of
all; the KV cache of the prompt and the logits of one chunk are on each of them.

Neither phases nor the moments of a phase add up: a phase takes what its largest moment takes, the peak is the largest
phase. Without the overhead, this is what torch's allocator hands out; what it reserves is more (RESERVED). Both were
held against torch's own allocator at the real shapes, within 10% (docs/performance.md). Not yet run on a GPU: OVERHEAD
and COPIES are estimates; `bench/gpu_check.py` puts measured peaks beside it.
"""

from bisect import bisect_left
from dataclasses import replace
from math import inf
from pathlib import Path

import torch
import yaml
from torch import nn

from grpo.engine.model_files import read_config
from grpo.errors import ConfigError, ModelError
from grpo.families import load_family
from grpo.policy import LOGITS_PER_CHUNK
from grpo.sequence import check_heads
from video.frames import frame_limit

GIB = 2**30
OVERHEAD = 3 * GIB
RESERVED = 1.5  # times what is in use: blocks that no phase after theirs fits; given back when memory runs out
COPIES = 6  # raw, masked and scaled logits, log-probabilities, and in backward the gradients of two of them
TEXT_TOKENS = 256  # of a prompt beside its video: chat template, question, options, instruction
MOST_FRAMES = 4096


def published_config(name):
    """The transformers config of a folder, a hub name, or (without a network) a name in published.yaml."""
    published = yaml.safe_load(Path(__file__).with_name("published.yaml").read_text())
    if name not in published:
        return read_config(name)
    return load_family(published[name]["model_type"]).model_class.config_class(**published[name])


def frames_of(settings):
    """The most frames of one video of a run."""
    return settings.nframes or settings.max_frames


def frame_pixels(config, settings):
    """The most pixels of a frame: --max_pixels, or the frame's share of --total_pixels."""
    factor = config.vision_config.patch_size * config.vision_config.spatial_merge_size
    return int(frame_limit(frames_of(settings), settings, factor))


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
    counted on the meta device; tied embeddings count once. {"block outputs", "layer outputs"}: how many numbers its
    linear layers make of a token. {"adapters"}: weights of adapters of rank 1, inputs + outputs of each linear layer of
    the decoder."""
    with torch.device("meta"):
        model = load_family(config.model_type).model_class(config)
    count = lambda module: sum(p.numel() for p in module.parameters())
    linears = lambda module: [part for part in module.modules() if isinstance(part, nn.Linear)]
    outputs = lambda module: sum(part.out_features for part in linears(module))
    visual, text = model.model.visual, model.model.language_model
    block, layer, everything = count(visual.blocks[0]), count(text.layers[0]), count(model)
    root = everything - block * len(visual.blocks) - layer * len(text.layers)
    made = {"block outputs": outputs(visual.blocks[0]), "layer outputs": outputs(text.layers[0])}
    made["adapters"] = sum(part.in_features + part.out_features for part in linears(text.layers))
    return {"block": block, "layer": layer, "root": root, "vision": count(visual), "all": everything, **made}


def kept_bytes(setting, width, products, rest):
    """Bytes for each token that autograd keeps of one bf16 block, by --activation_checkpointing: its input; unless
    that is "full", what its products and attention make; if it is "none", the rest. All in numbers of a token."""
    return 2 * (width + products * (setting != "full") + rest * (setting == "none"))


def memory_plan(config, counts, settings):
    """{"tokens": {...}, "phases": {phase: {part: bytes}}, "peak": bytes} for one GPU of a run on settings.plan of them.
    A phase's parts are those of its `moments` that takes most.

    config: the model's; counts: its `parameter_counts`; settings: the run's Config.
    """
    width, lora = copy_width(settings), settings.lora_rank > 0
    patches, merged = vision_tokens(config, frames_of(settings), frame_pixels(config, settings))
    steps = -(-frames_of(settings) // config.vision_config.temporal_patch_size)
    prompt = merged + TEXT_TOKENS + steps * load_family(config.model_type).step_tokens
    packed = prompt + settings.group_size * settings.max_new_tokens
    tokens = {"patches": patches, "video tokens": merged, "prompt tokens": prompt, "packed tokens": packed}
    trained = counts["all"] - (counts["vision"] if settings.freeze_vision else 0)
    masters = 4 * counts["all"]
    if lora:
        trained = settings.lora_rank * counts["adapters"]
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
    """{phase: [{part: bytes} at each moment of the phase that may take most]}, beside what is always there."""
    sizes = Sizes(config, counts, settings, tokens)
    reference = reference_moments(sizes) if settings.kl_coef else [{}]
    return {"rollout": rollout_moments(sizes), "reference": reference, "update": update_moments(sizes, trained)}


class Sizes:
    """What the moments of a run are made of, in bytes."""

    def __init__(self, config, counts, settings, tokens):
        text, vision, self.width = config.text_config, config.vision_config, copy_width(settings)
        self.counts, self.settings, self.lora = counts, settings, settings.lora_rank > 0
        self.depth, self.text_layers, self.words = vision.depth, text.num_hidden_layers, text.vocab_size
        # What this rank holds of a prompt that it shares with others
        part = {name: -(-count // settings.sequence_parallel) for name, count in tokens.items()}
        patches, self.prompt, self.packed = part["patches"], part["prompt tokens"], part["packed tokens"]
        self.completions = -(-settings.group_size // settings.sequence_parallel)
        self.cached = tokens["prompt tokens"], tokens["prompt tokens"] + self.completions * settings.max_new_tokens
        self.rows, self.frozen = settings.prompts_per_forward, settings.freeze_vision or self.lora
        hidden, inner = text.hidden_size, text.intermediate_size
        family = load_family(config.model_type)
        wide, tall = family.tower_sizes(vision)
        kv, heads = (n * family.head_size(text) for n in (text.num_key_value_heads, text.num_attention_heads))
        self.whole, self.root, self.layer, self.block = (2 * counts[n] for n in ("all", "root", "layer", "block"))
        self.pixels = 4 * patches * vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        shared = settings.sequence_parallel > 1  # what it encodes of the features, and what it is sent
        self.features = 2 * (1 + shared) * family.feature_width(config) * part["video tokens"]
        # What one block holds at its peak, 2 bytes a bf16 number: read off the lists of blocks that torch's allocator
        # had out. The tower rotates queries and keys in fp32.
        self.see, self.see_backward = 2 * 17 * wide * patches, 2 * max(6 * tall + 5 * wide, 17 * wide) * patches
        self.read, self.read_backward = 2 * (3 * inner + 4 * hidden), 2 * (6 * inner + 15 * hidden)  # a token
        # Kept for backward, of all layers and blocks.
        setting = settings.activation_checkpointing
        products = counts["layer outputs"] * (3 if self.lora else 1) + heads  # those of adapters are in fp32
        layer = kept_bytes(setting, hidden, products, family.layer_rest(text))
        block = kept_bytes(setting, wide, counts["block outputs"] + wide, family.tower_rest(vision))
        self.layers = text.num_hidden_layers * layer * self.packed * self.rows
        self.blocks = 0 if self.frozen else (vision.depth * block + 4 * 2 * wide) * patches * self.rows
        scored = settings.group_size * settings.max_new_tokens * self.rows  # all on one rank: they end the row
        self.logits = COPIES * 4 * min(LOGITS_PER_CHUNK, scored * self.words)
        self.cache = (4 + 2) * text.num_hidden_layers * kv * settings.prompts_per_rollout  # a token
        self.head = 0 if self.lora else 2 * hidden * self.words  # lm_head's gradient in bf16, alive until the end
        self.gathers = 1 if self.width > 1 or not self.lora else 0  # alone, adapters compute with the base itself


def rollout_moments(s):
    kept, whole = s.settings.prompts_per_rollout, s.gathers * s.whole
    return [
        {"gathered weights": s.gathers * (s.whole + s.layer)},
        {"gathered weights": whole, "activations": (1.5 * s.pixels + s.see) * kept},
        {"gathered weights": whole, "KV cache": s.cache * s.cached[0],
         "activations": (s.features + s.read * s.prompt) * kept},
        {"gathered weights": whole, "KV cache": s.cache * s.cached[1],
         "logits": 40 * kept * s.completions * s.words},
    ]  # fmt: skip


def reference_moments(s):
    shared = 1 if s.width > 1 else 0  # one process holds its reference whole
    return [
        {"gathered weights": shared * 2 * s.root},  # sent, and unpacked
        {"gathered weights": shared * (s.root + 3 * s.block), "activations": (1.5 * s.pixels + s.see) * s.rows},
        {"gathered weights": shared * (s.root + 2 * s.layer),
         "activations": (s.features + s.read * s.packed) * s.rows},
        {"gathered weights": shared * s.root, "logits": s.logits},
    ]  # fmt: skip


def update_moments(s, trained):
    shard = 4 / s.width  # bytes of a gradient
    of_text = shard * (trained if s.lora else s.text_layers * s.counts["layer"])
    of_blocks = 0 if s.frozen else shard * s.depth * s.counts["block"]
    patches, saved = 0 if s.frozen else 0.5 * s.pixels * s.rows, s.layers + s.blocks  # in bf16
    backward = s.read_backward * s.packed * s.rows
    return [
        {"gathered weights": s.gathers * s.root, "reduction": s.head, "activations": patches + saved,
         "logits": s.logits},
        # The last layer's backward is the first.
        {"gathered weights": s.gathers * (s.root + 2 * s.layer), "reduction": s.head,
         "activations": patches + saved + backward},
        {"gathered weights": s.gathers * (s.root + 2 * s.layer), "gradients": of_text,
         "reduction": s.head + (0 if s.lora else 2 * s.layer),  # a layer's in fp32
         "activations": patches + backward + s.layers / s.text_layers + s.blocks},
        {"gathered weights": s.gathers * (s.root + 2 * s.block), "gradients": of_text, "reduction": s.head,
         "activations": patches + (0 if s.frozen else s.blocks + s.see_backward * s.rows)},
        {"gradients": of_text + of_blocks, "reduction": 0 if s.lora else 3 * s.root,  # in bf16, and fp32 to be sent
         "activations": patches},
        {"gradients": shard * trained},
    ]  # fmt: skip


def most_frames(plan_of, limit, most_tokens):
    """The largest even number of frames whose plan_of(frames) has a peak within `limit` bytes and a prompt within
    most_tokens; 0 if there is none."""
    pairs = range(1, MOST_FRAMES // 2 + 1)

    def too_many(pair):
        plan = plan_of(2 * pair)
        return plan["peak"] > limit or plan["tokens"]["prompt tokens"] > most_tokens

    return 2 * bisect_left(pairs, True, key=too_many)


def plan_text(config):
    """What `--plan` prints: tokens, memory by phase and part, whether it fits, and how many frames would.

    Raises ConfigError where config.json cannot be had.
    """
    shared = config.sequence_parallel
    for flag, count in (("shard_size", copy_width(config)), ("sequence_parallel", shared)):
        if config.plan % count:
            raise ConfigError(f"--{flag} {count}: must divide the number of GPUs, {config.plan}")
    try:
        model = published_config(config.model)
    except ModelError as error:
        raise ConfigError(str(error)) from error
    check_heads(model.text_config.num_attention_heads, shared)
    counts, limit = parameter_counts(model), config.gpu_memory * GIB
    plan = memory_plan(model, counts, config)
    plan_of = lambda frames: memory_plan(model, counts, replace(config, nframes=frames))
    names = list(dict.fromkeys(name for parts in plan["phases"].values() for name in parts))
    row = lambda name, cells: f"{name:<18}" + "".join(f"{cell:>12}" for cell in cells)
    part = lambda phase, name: f"{plan['phases'][phase].get(name, 0) / GIB:.2f}"
    fits = lambda plan: f"{plan['peak'] / GIB:.1f} GiB {'fits' if plan['peak'] <= limit else 'does not fit'}"
    others = [name for name in ("full", "selective", "none") if name != config.activation_checkpointing]
    plan_with = lambda setting: memory_plan(model, counts, replace(config, activation_checkpointing=setting))
    reserved = RESERVED * (plan["peak"] - OVERHEAD) + OVERHEAD
    in_memory, in_tokens = (most_frames(plan_of, *of) for of in ((limit, inf), (inf, config.max_prompt_tokens)))
    skipped = plan["tokens"]["prompt tokens"] > config.max_prompt_tokens
    return "\n".join(
        [
            f"{config.model}: {counts['all'] / 1e9:.2f}B parameters on {config.plan} GPUs, "
            f"{copy_width(config)} to a copy" + (f", {shared} to a prompt" if shared > 1 else ""),
            f"{frames_of(config)} frames of {frame_pixels(model, config)} pixels, G {config.group_size}, "
            f"C {config.max_new_tokens}: " + ", ".join(f"{count} {name}" for name, count in plan["tokens"].items()),
            row("GiB on each GPU", plan["phases"]),
            *(row(name, [part(phase, name) for phase in plan["phases"]]) for name in names),
            row("sum", [f"{sum(parts.values()) / GIB:.2f}" for parts in plan["phases"].values()]),
            f"peak {fits(plan)} --gpu_memory {config.gpu_memory:g} (torch reserves up to {reserved / GIB:.1f} if there "
            f"is room); most frames: {in_memory} in this memory, {in_tokens} in --max_prompt_tokens",
            "with --activation_checkpointing " + "; ".join(f"{name}: {fits(plan_with(name))}" for name in others),
            f"prompts this long {'are SKIPPED: raise' if skipped else 'fit'} --max_prompt_tokens "
            f"{config.max_prompt_tokens}; a formula (grpo/run/plan.py), not yet run on a GPU",
        ]
    )
