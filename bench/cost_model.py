"""What bounds a GRPO step on GPUs, on paper: FLOPs, bytes and link traffic counted from config.json and the code.

    python bench/cost_model.py        prints the tables of docs/forecast.md

Counted for one GPU, one prompt a process and step, every completion C tokens long (real ones end earlier):

    linear layers   2 FLOPs a weight and token; bytes of bf16 weights once a pass, inputs and outputs
    attention       4 FLOPs a channel and visible (query, key) pair; a causal mask counts its visible half
    decode          every weight once a token, the prompt's keys and values once, each completion's own once
    lm_head         completion tokens alone, in chunks of `grpo.policy.LOGITS_PER_CHUNK` numbers; softmax in fp32
    backward        linear layers twice the forward (once where they are frozen), attention 2.5 times (its kernel
                    computes scores again); what is checkpointed once more, up to each block's last linear layer, whose
                    output no gradient needs: torch stops recomputing there
    FSDP2           all weights gathered once for a rollout, in each forward, and for backward all but the root;
                    gradients reduced in fp32 inside a node, the shards summed across nodes
    AdamW           fp32 shards: norm, clip, step

Element-wise kernels, transfers from the host, rewards and waiting for other processes are not counted.
"bound": at the peak, whichever of compute, memory, link and network takes longest; what FSDP overlaps is overlapped.
"expected": at EFFICIENCY of the peak, and with LAUNCH seconds for each kernel. Both are assumptions, not measured.
"""

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from grpo.config import Config
from grpo.families.base import Family
from grpo.policy import LOGITS_PER_CHUNK
from grpo.run.plan import GIB, TEXT_TOKENS, frames_of, memory_plan, parameter_counts, published_config, vision_tokens

EFFICIENCY = {"compute": 0.5, "memory": 0.8, "link": 0.7, "network": 0.7}
LAUNCH = 10e-6  # seconds of Python and dispatch for a kernel that eager torch launches
# Kernels of one decoder layer and one vision block, counted from the operators that torch dispatches.
KERNELS = {"layer": 50, "layer backward": 95, "block": 38, "block backward": 54, "adapter": 4}
# Bytes that all kernels after lm_head read and write for one logit: for a log-probability, for the entropy beside it,
# in backward, and for a sampled token (`Policy.prefill` or `decode`, then `grpo.sampler.sample_next_token`).
SCORE_BYTES, ENTROPY_BYTES, SCORE_BACKWARD_BYTES, CHOOSE_BYTES = 26, 20, 46, 78
PIXELS = 196 * 28 * 28


@dataclass(frozen=True)
class Machine:
    """GPUs, those that share one copy of the weights, and each GPU's peaks: dense bf16 FLOP/s, bytes/s of its memory,
    and bytes/s each way of its link inside the node and of its share of the network."""

    name: str
    gpus: int
    shard: int
    compute: float
    memory: float
    link: float
    network: float = float("inf")


# NVIDIA's data sheets: "A100 80GB SXM" (312 TFLOP/s, 2,039 GB/s, NVLink 600 GB/s both ways together) and "H100
# SXM" (989 TFLOP/s without sparsity, 3.35 TB/s, 900 GB/s).
A100 = Machine("4×A100", 4, 4, 312e12, 2.0e12, 300e9)
H100 = Machine("8×H100", 8, 8, 989e12, 3.35e12, 450e9)
NODES = replace(H100, name="2×8×H100", gpus=16, network=50e9 / 8)  # one 400 Gb/s port for the 8 GPUs of a node
MACHINES = (A100, H100, NODES)
MODELS = {"7B": "Qwen/Qwen2-VL-7B-Instruct", "2B": "Qwen/Qwen2-VL-2B-Instruct"}


@dataclass(frozen=True)
class Cost:
    """Of one GPU: FLOPs, bytes of its memory, bytes it sends over the link and over the network, kernels."""

    flops: float = 0
    bytes: float = 0
    link: float = 0
    network: float = 0
    kernels: float = 0

    def __add__(self, other):
        return Cost(*(a + b for a, b in zip(vars(self).values(), vars(other).values())))

    def __rmul__(self, times):
        return Cost(*(times * value for value in vars(self).values()))


def linears(sizes, tokens):
    """Linear layers of (inputs, outputs) each, over so many tokens, in bf16."""
    weights, ends = sum(i * o for i, o in sizes), sum(i + o for i, o in sizes)
    return Cost(flops=2 * tokens * weights, bytes=2 * (weights + tokens * ends))


def attention(pairs, queries, keys, width, kv_width):
    """Scores and values over visible (query, key) pairs; `keys` counts how often a key and value is moved."""
    return Cost(flops=4 * pairs * width, bytes=2 * 2 * (queries * width + keys * kv_width))


def widths(text):
    """Channels of all query heads, and of all key/value heads."""
    size = Family().head_size(text)
    return text.num_attention_heads * size, text.num_key_value_heads * size


def layer_linears(text, rank=0):
    """[(inputs, outputs)] of one decoder layer's linear layers, and of adapters of that rank on each of them."""
    heads, kv = widths(text)
    hidden, inner = text.hidden_size, text.intermediate_size
    base = [(hidden, heads), *2 * [(hidden, kv)], (heads, hidden), *2 * [(hidden, inner)], (inner, hidden)]
    return base, [pair for i, o in base if rank for pair in ((i, rank), (rank, o))]


def decoder(config, prompts, prompt, rows, completion, rank=0, frozen=False):
    """(forward, backward with recomputation) of the decoder: `prompts` copies of the prompt and `rows` completions."""
    text = config.text_config
    heads, kv = widths(text)
    tokens = prompts * prompt + rows * completion
    pairs = prompts * prompt * (prompt + 1) // 2 + rows * (completion * prompt + completion * (completion + 1) // 2)
    keys = tokens  # each copy of the prompt with its own completion
    if prompts < rows:  # read, written beside the completion's own and read again, for every completion
        keys = prompts * prompt + 3 * rows * (prompt + completion)
    base, adapters = (linears(sizes, tokens) for sizes in layer_linears(text, rank))
    last = linears([(text.intermediate_size, text.hidden_size)], tokens)
    own = attention(pairs, tokens, keys, heads, kv)
    extra = Cost(kernels=KERNELS["adapter"] * 7 * bool(rank))
    forward = base + adapters + own + extra + Cost(kernels=KERNELS["layer"])
    gradients = (
        (1 if frozen else 2) * base + 2 * adapters + 2.5 * own + 2 * extra + Cost(kernels=KERNELS["layer backward"])
    )
    again = forward + (0 if rank else -1) * last  # an adapter's product comes after it
    return text.num_hidden_layers * forward, text.num_hidden_layers * (again + gradients)


def vision(config, patches, frame):
    """(forward, backward with recomputation of the blocks) of the tower; `frame`: patches that see each other."""
    tower = config.vision_config
    wide, merged = tower.embed_dim, tower.embed_dim * tower.spatial_merge_size**2
    inner = int(wide * tower.mlp_ratio)
    block = linears([(wide, 3 * wide), (wide, wide), (wide, inner), (inner, wide)], patches)
    own = attention(patches * frame, patches, patches, wide, wide)
    embed = linears([(tower.in_channels * tower.temporal_patch_size * tower.patch_size**2, wide)], patches)
    merge = linears([(merged, merged), (merged, tower.hidden_size)], patches // tower.spatial_merge_size**2)
    last = linears([(inner, wide)], patches)
    forward = block + own + Cost(kernels=KERNELS["block"])
    again = forward + -1 * last
    gradients = 2 * block + 2.5 * own + Cost(kernels=KERNELS["block backward"])
    # The pixels need no gradient, so the patch embedding has its weight's alone.
    return embed + tower.depth * forward + merge, embed + tower.depth * (again + gradients) + 2 * merge


def score(config, tokens, frozen=False):
    """(reference, policy forward, backward) of lm_head and the log-probabilities of so many tokens; several chunks are
    computed again in backward, the entropy is the policy's alone."""
    hidden, words = config.text_config.hidden_size, config.text_config.vocab_size
    chunks = -(-tokens // (LOGITS_PER_CHUNK // words))
    head = chunks * linears([(hidden, words)], tokens / chunks)
    plain = head + Cost(bytes=SCORE_BYTES * tokens * words)
    again = plain if chunks > 1 else Cost()
    gradients = (1 if frozen else 2) * head + Cost(bytes=SCORE_BACKWARD_BYTES * tokens * words)
    return plain, plain + Cost(bytes=ENTROPY_BYTES * tokens * words), again + gradients


def last_logits(text, rows):
    """lm_head on one token of each row."""
    return linears([(text.hidden_size, text.vocab_size)], rows)


def decode(config, prompts, prompt, rows, completion, rank=0, graph=False):
    """completion - 1 tokens of each row, after the one that prefill gives. graph: as a CUDA graph, whose shapes never
    change: it launches nothing from Python, and attends to whole buffers of `completion` tokens."""
    text, steps = config.text_config, completion - 1
    heads, kv = widths(text)
    own = completion * steps if graph else completion * steps // 2  # keys of its own a row reads: 1 + 2 + ... + steps
    base, adapters = layer_linears(text, rank)
    weights = linears(base + adapters, rows)
    seen = attention(rows * (prompt * steps + own), rows * steps, prompts * prompt * steps + rows * own, heads, kv)
    kernels = 0 if graph else KERNELS["layer"] + KERNELS["adapter"] * 7 * bool(rank)
    layers = text.num_hidden_layers * (steps * (weights + Cost(kernels=kernels)) + seen)
    words = Cost(bytes=CHOOSE_BYTES * completion * rows * text.vocab_size)
    return layers + steps * last_logits(text, rows) + words


def gather(weights, shard, held=4):
    """An all-gather in bf16 of so many weights, `held` bytes each: cast, received into FSDP2's buffer, copied out."""
    return Cost(bytes=(held + 2) * weights / shard + 6 * weights, link=2 * weights * (shard - 1) / shard)


def reduction(weights, machine):
    """Gradients: copied to fp32, reduced and scattered inside a node; the shards summed across nodes."""
    shard, nodes = machine.shard, machine.gpus // machine.shard
    shared = 2 * (nodes - 1) / nodes * 4 * weights / shard
    return Cost(bytes=10 * weights + 4 * weights / shard, link=4 * weights * (shard - 1) / shard, network=shared)


def step_costs(config, counts, settings, machine, repeat=False, graph=False):
    """[{phase: Cost}, ...] of one step in order; the phases of one dict overlap. repeat: the prompt G times, as if
    completions were sequences of their own, all else as here; graph: see `decode`."""
    patches, merged = vision_tokens(config, frames_of(settings), settings.max_pixels)
    frame = patches // -(-frames_of(settings) // config.vision_config.temporal_patch_size)
    prompt, rows, rank = merged + TEXT_TOKENS, settings.group_size, settings.lora_rank
    copies = rows if repeat else 1
    frozen = settings.freeze_vision
    trained = rank * counts["adapters"] if rank else counts["all"] - counts["vision"] * frozen
    layers = config.text_config.num_hidden_layers * counts["layer"]
    root, blocks = counts["root"], config.vision_config.depth * counts["block"]
    used = layers if frozen else layers + blocks  # a frozen tower's features are those of sampling
    seen, seen_back = vision(config, copies * patches, frame)
    scored, with_entropy, scored_back = score(config, rows * settings.max_new_tokens, bool(rank))
    packed = (config, copies, prompt, rows, settings.max_new_tokens)
    plain, _ = decoder(*packed)
    forward, backward = decoder(*packed, rank, bool(rank))
    first, _ = decoder(config, copies, prompt, 0, 0, rank)
    here = Cost() if frozen else seen
    gathered = lambda weights: gather(weights, machine.shard, held=2 if rank else 4)
    steps = [
        {"gather weights": gathered(counts["all"])},
        {"vision": seen},
        {"prefill": first + last_logits(config.text_config, copies)},
        {"decode": decode(*packed, rank, graph)},
    ]
    if settings.kl_coef:
        steps.append({"reference": here + plain + scored, "its gathers": gather(used + root, machine.shard, held=2)})
    kept = rank and settings.kl_coef  # with adapters the reference is the policy, whose root stays gathered
    return [
        *steps,
        {"policy forward": here + forward + with_entropy, "its gathers": gathered(used + root * (not kept))},
        {
            "backward": (Cost() if frozen else seen_back) + backward + scored_back,
            "its gathers": gathered(used),
            "gradient reduction": reduction(trained, machine),
        },
        {"optimizer": Cost(bytes=40 * trained / machine.shard)},
    ]


def bounded(cost, machine, expected=False):
    """(seconds, what takes them): the longest of compute, memory, link, network and, where expected, launches."""
    share = EFFICIENCY if expected else dict.fromkeys(EFFICIENCY, 1.0)
    needs = {"compute": cost.flops, "memory": cost.bytes, "link": cost.link, "network": cost.network}
    busy = {name: need / (getattr(machine, name) * share[name]) for name, need in needs.items()}
    busy["launch"] = LAUNCH * cost.kernels if expected else 0.0
    name = max(busy, key=busy.get)
    return busy[name], name


def step_seconds(steps, machine, expected=False):
    """Seconds of a step: what is in one dict of phases runs side by side, and the dicts follow each other."""
    return sum(bounded(sum(phases.values(), Cost()), machine, expected)[0] for phases in steps)


def table(head, rows):
    """A Markdown table, its first column to the left and the others to the right."""
    line = lambda cells: "| " + " | ".join(str(cell) for cell in cells) + " |"
    return "\n".join([line(head), "|---|" + "---:|" * (len(head) - 1), *map(line, rows)])


# What differs from the default recipe, in the settings of a run.
VARIATIONS = {
    "the recipe": {},
    "32 frames": {"nframes": 32},
    "64 frames": {"nframes": 64},
    "128 frames": {"nframes": 128},
    "G 16": {"group_size": 16},
    "G 32": {"group_size": 32},
    "C 1024": {"max_new_tokens": 1024},
    "64 frames, G 16, C 1024": {"nframes": 64, "group_size": 16, "max_new_tokens": 1024},
    "frozen tower": {"freeze_vision": True},
    "LoRA, rank 16": {"lora_rank": 16, "freeze_vision": True},
}


def phase_table(config, counts, machine):
    settings = Config(plan=machine.shard)
    steps = step_costs(config, counts, settings, machine)
    rows = []
    for phases in steps:
        for name, cost in phases.items():
            (bound, by), (expected, then) = bounded(cost, machine), bounded(cost, machine, True)
            amounts = (cost.flops / 1e12, cost.bytes / 1e9, cost.link / 1e9, cost.network / 1e9)
            amounts = [f"{amount:.1f}" if amount else "" for amount in amounts]
            name = name if name == next(iter(phases)) else f"· {name}"
            rows.append([name, *amounts, f"{1e3 * bound:.1f}", by, f"{1e3 * expected:.0f}", then])
    graph = step_costs(config, counts, settings, machine, graph=True)
    for name, which in (("step", steps), ("step with --decode_graph", graph)):
        bound, expected = (1e3 * step_seconds(which, machine, expected) for expected in (False, True))
        rows.append([f"**{name}**", "", "", "", "", f"**{bound:.0f}**", "", f"**{expected:.0f}**", ""])
    head = ["phase", "TFLOP", "memory GB", "link GB", "network GB", "bound ms", "by", "expected ms", "by"]
    return table(head, rows)


def variation_table(config, counts):
    rows = []
    for name, changes in VARIATIONS.items():
        plan = memory_plan(config, counts, Config(plan=A100.shard, **changes))
        cells = []
        for machine in MACHINES:
            settings = Config(plan=machine.shard, **changes)
            ours, theirs, graph = (
                step_seconds(step_costs(config, counts, settings, machine, *how), machine, True)
                for how in ((False,), (True,), (False, True))
            )
            cells.append(f"{ours:.1f} ({graph:.1f}) s, {machine.gpus * 3600 / ours:,.0f}, {theirs / ours:.1f}×")
        rows.append([name, plan["tokens"]["prompt tokens"], f"{plan['peak'] / GIB:.0f}", *cells])
    heads = [f"{machine.name}: step (--decode_graph), samples/h, factor" for machine in MACHINES]
    return table(["", "P", f"GiB on {A100.name}", *heads], rows)


def token_factor(prompt, group, completion):
    """How many times more tokens go through the decoder where the prompt is repeated for each completion."""
    return group * (prompt + completion) / (prompt + group * completion)


def factor_table(config, counts, machine):
    rows, groups = [], (8, 16, 32)
    for frames in (16, 32, 64, 128):
        prompt = vision_tokens(config, frames, PIXELS)[1] + TEXT_TOKENS
        for completion in (256, 1024):
            cells = []
            for group in groups:
                settings = Config(plan=machine.shard, nframes=frames, group_size=group, max_new_tokens=completion)
                repeated, once, repeated_graph, once_graph = (
                    step_costs(config, counts, settings, machine, repeat, graph)
                    for graph in (False, True)
                    for repeat in (True, False)
                )
                flops = [sum(cost.flops for phases in steps for cost in phases.values()) for steps in (repeated, once)]
                times = [step_seconds(steps, machine, True) for steps in (repeated, once, repeated_graph, once_graph)]
                ratios = (flops[0] / flops[1], times[0] / times[1], times[2] / times[3])
                ratios = (token_factor(prompt, group, completion), *ratios)
                cells.append(" / ".join(f"{ratio:.1f}" for ratio in ratios))
            rows.append([f"{frames} frames, P {prompt}, C {completion}", *cells])
    return table(["tokens / FLOPs / time / time with --decode_graph", *(f"G {group}" for group in groups)], rows)


def report():
    """All tables, as docs/forecast.md holds them."""
    parts = []
    for label, name in MODELS.items():
        config = published_config(name)
        counts = parameter_counts(config)
        for machine in MACHINES:
            parts += [f"### Qwen2-VL-{label} on {machine.name}, the recipe", phase_table(config, counts, machine)]
        parts += [f"### Qwen2-VL-{label}, variations, expected", variation_table(config, counts)]
        parts += [f"### Qwen2-VL-{label}, the factor on {A100.name}", factor_table(config, counts, A100)]
    return "\n\n".join(parts)


if __name__ == "__main__":
    layout = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=layout).parse_args()
    print(report())
