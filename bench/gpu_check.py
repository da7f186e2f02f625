"""Checks a GPU of 80 GB or more, in under ten minutes, and writes what it measured as JSON and as a Markdown table.

    python bench/gpu_check.py [--output docs/gpu_check]
    python bench/gpu_check.py --tiny        the same code on a tiny model, on any machine: shows only that it runs

First the tests marked `gpu`. Then one whole step (rollout, reference, update) of Qwen2-VL-7B's shapes with random
weights, as one of 4 GPUs: a "fake" process group allocates exactly what a real rank would, and its collectives do
nothing, so times are without communication and numbers mean nothing. Then the same of 2B in one real process. Beside
each peak stand what `--plan` predicts, without its overhead, and what the allocator reserved.

Not yet run on a GPU.
"""

import argparse
import copy
import datetime
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import torch
import torch.distributed as dist
from cost_model import H100, decode, step_costs
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from demo.tiny import build_tiny_model
from grpo import sampler, update
from grpo.config import parse_config
from grpo.engine import distributed
from grpo.engine.fast_paths import using
from grpo.engine.model import ModelSpec, checkpoint_activations, use_own_kernels
from grpo.engine.model_files import read_config
from grpo.engine.optimizer import make_optimizer
from grpo.engine.weights import materialise
from grpo.families import load_family
from grpo.policy import Policy
from grpo.run.plan import GIB, memory_plan, parameter_counts, published_config, vision_tokens
from video.dataset import Sample
from video.prompt import Prompt

CASES = {"7B": ("Qwen/Qwen2-VL-7B-Instruct", 4), "2B": ("Qwen/Qwen2-VL-2B-Instruct", 1)}
SIDE = 14  # merged rows and columns of a frame of 196·28² pixels
TEXT_TOKENS = 256


def build(config, device, mesh, master, compute):
    """A Policy of random weights, sharded if there is a mesh; no file is read."""
    with torch.device("meta"):
        model = load_family(config.model_type).model_class._from_config(copy.deepcopy(config), dtype=master)
    use_own_kernels(model).eval()
    if master is torch.float32:
        checkpoint_activations(model)
    spec = ModelSpec.of(config, [config.text_config.vocab_size - 1], None)
    policy = Policy(model, spec)
    if mesh is not None:
        distributed.shard(policy, mesh, compute)
    materialise(model, device)
    with torch.no_grad():
        for parameter in policy.parameters():
            (parameter.to_local() if isinstance(parameter, DTensor) else parameter).normal_(std=0.02)
    return policy.to(device)


def make_prompt(config, frames, side):
    """A Prompt of random patches: `frames` frames of side · side merged patches, and TEXT_TOKENS of text."""
    vision, video = config.vision_config, config.video_token_id
    steps, merge = frames // vision.temporal_patch_size, vision.spatial_merge_size
    values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    text = torch.full((TEXT_TOKENS // 2,), 5)
    return Prompt(
        sample=Sample(key="random", problem="?", answer="A"),
        input_ids=torch.cat([text, torch.full((steps * side * side,), video), text]),
        pixel_values=None, image_grid_thw=None,
        pixel_values_videos=torch.randn(steps * (side * merge) ** 2, values),
        video_grid_thw=torch.tensor([[steps, side * merge, side * merge]]), seconds_per_grid=[1.0],
    )  # fmt: skip


def never_ending(sample_next_token):
    """A `sample_next_token` that always returns one ordinary token. So every completion is as long as it may be, and
    what a fake collective left in the logits does not matter."""

    def chosen(logits, uniform, settings):
        tokens, logprobs = sample_next_token(logits.nan_to_num(), uniform, settings)
        return torch.full_like(tokens, 7), logprobs.nan_to_num()

    return chosen


def finite(clip_grad_norm):
    """A `clip_grad_norm` that always returns 1: what fake collectives left in gradients must not skip the update."""

    def clipped(policy, limit):
        clip_grad_norm(policy, limit)
        return 1.0

    return clipped


class Meter:
    """Times a phase and notes its peak memory, in use and reserved; `measured` is {phase: {"seconds", "gib",
    "reserved_gib"}}, GiB None on a CPU."""

    def __init__(self, device):
        self.cuda, self.measured = device.type == "cuda", {}

    def __call__(self, phase, work):
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        result = work()
        if self.cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        peak, reserved = (
            size() / GIB if self.cuda else None
            for size in (torch.cuda.max_memory_allocated, torch.cuda.max_memory_reserved)
        )
        self.measured[phase] = {"seconds": seconds, "gib": peak, "reserved_gib": reserved}
        return result


def decode_rates(config, policy, prompt, settings, words):
    """{"eager", "graph"}: {"ms" of one token of every row, "gb_per_second" that it reads}; a graph that fails says why.

    A token's time is that of a sampling of all tokens less one of half as many, so that vision and prefill drop out.
    """
    whole, rates = settings.max_new_tokens, {}
    cost = decode(config, 1, len(prompt.input_ids), settings.group_size, whole)

    def seconds(length, graph):
        sampling = sampler.SamplingSettings(max_new_tokens=length)
        began = time.perf_counter()
        # Its end waits for the device: tokens are copied to the host.
        with distributed.unsharded(policy) as plain, using({"decoding graph"} if graph else ()):
            sampler.generate(plain, [prompt], settings.group_size, sampling, [1], words)
        return time.perf_counter() - began

    for name in ("eager", "graph") if policy.device.type == "cuda" else ("eager",):
        try:
            seconds(whole, name == "graph")
            token = (seconds(whole, name == "graph") - seconds(whole // 2, name == "graph")) / (whole - whole // 2)
        except RuntimeError as error:
            rates[name] = {"error": str(error)}
            continue
        rates[name] = {"ms": 1e3 * token, "gb_per_second": cost.bytes / (whole - 1) / token / 1e9}
    return rates


def measure(case, tiny):
    """One case's {phase: {"seconds", "gib", "planned_gib"}} and rates, of the second of two steps."""
    name, world = CASES[case]
    device = torch.device("cpu" if tiny else "cuda")
    flags = ["--model", name, "--plan", str(world)]
    side, frames = SIDE, 16
    if tiny:
        flags += ["--max_new_tokens", "6", "--group_size", "2", "--max_frames", "4", "--max_pixels", str(4 * 28 * 28),
                  "--min_pixels", "784"]  # fmt: skip
        side, frames = 2, 4
    settings = parse_config(flags)
    with TemporaryDirectory() as folder:
        config = read_config(build_tiny_model(Path(folder) / "model")) if tiny else published_config(name)
    if world > 1:
        dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
        mesh = init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    else:
        device, mesh = distributed.start(device.type)
    compute = None if tiny else torch.bfloat16
    policy = build(config, device, mesh, torch.float32, compute)
    shared = mesh if world > 1 else None  # as in `grpo.engine.build`
    reference = build(config, device, shared, compute or torch.float32, compute).requires_grad_(False)
    if reference.sharded:
        reference.set_reshard_after_forward(True, recurse=False)
    optimizer = make_optimizer(policy, settings)
    if world > 1:
        sampler.sample_next_token = never_ending(sampler.sample_next_token)
        update.clip_grad_norm = finite(update.clip_grad_norm)

    prompt, meter = make_prompt(config, frames, side), Meter(device)
    words = SimpleNamespace(batch_decode=lambda rows, **_: ["" for _ in rows])
    sampling = sampler.SamplingSettings(max_new_tokens=settings.max_new_tokens)
    for _ in range(2):  # the first also pays for kernels being chosen and memory being claimed

        def roll_out():
            with distributed.unsharded(policy) as plain:
                return sampler.generate(plain, [prompt], settings.group_size, sampling, [1], words)

        groups = meter("rollout", roll_out)
        groups[0].rewards = torch.randn(settings.group_size).tolist()
        [batches] = update.mini_batches(groups, policy, settings)
        meter("reference", lambda: update.add_reference(reference, batches, 1.0))
        update.add_advantages(batches, settings)
        metrics = meter("update", lambda: update.update(policy, optimizer, [batches], settings, seed=0))

    counts = parameter_counts(config)
    tokens = settings.group_size * settings.max_new_tokens
    rates = decode_rates(config, policy, prompt, settings, words)
    costs = {name: cost for phases in step_costs(config, counts, settings, H100) for name, cost in phases.items()}
    flops = costs["policy forward"].flops + costs["backward"].flops
    assert vision_tokens(config, frames, settings.max_pixels)[0] == len(prompt.pixel_values_videos)
    plan = memory_plan(config, counts, settings)
    for phase, parts in plan["phases"].items():
        meter.measured[phase]["planned_gib"] = (sum(parts.values()) - parts["overhead"]) / GIB  # not the allocator's
    result = {"model": "tiny" if tiny else name, "ranks": world, "real": world == 1, "phases": meter.measured,
              "prompt_tokens": len(prompt.input_ids), "completion_tokens": tokens,
              "decoded_tokens_per_second": tokens / meter.measured["rollout"]["seconds"], "decode": rates,
              "update_tflop_per_second": flops / meter.measured["update"]["seconds"] / 1e12,
              "step_seconds": sum(phase["seconds"] for phase in meter.measured.values())}  # fmt: skip
    if world == 1:
        result["sampler_logprob_diff"] = metrics["sampler_logprob_diff"]
    distributed.stop()
    return result


def table(report):
    """The report as Markdown."""
    about = f"{report['device']}, torch {report['torch']}; tests: {report['tests']}"
    lines = [f"# GPU check, {report['date']}", "", about, ""]
    if not report["gpu"]:
        lines += ["Tiny models on a CPU, to show that the script runs: **not yet run on a GPU**.", ""]
    lines += ["| case | phase | peak GiB | planned GiB | reserved GiB | seconds |", "|---|---|---|---|---|---|"]
    for name, case in report["cases"].items():
        ranks = "1 real process" if case["real"] else f"1 of {case['ranks']} ranks, fake group"
        for phase, row in case["phases"].items():
            peak, reserved = ("–" if row[key] is None else f"{row[key]:.1f}" for key in ("gib", "reserved_gib"))
            memory = f"{peak} | {row['planned_gib']:.1f} | {reserved}"
            lines.append(f"| {name}, {ranks} | {phase} | {memory} | {row['seconds']:.2f} |")
        lines.append(f"| {name} | whole rollout | | | | {case['decoded_tokens_per_second']:.0f} tokens/s |")
        lines.append(f"| {name} | update | | | | {case['update_tflop_per_second']:.3g} TFLOP/s |")
        for how, rate in case["decode"].items():
            figure = rate.get("error") or f"{rate['ms']:.1f} ms a token, {rate['gb_per_second']:.3g} GB/s"
            lines.append(f"| {name} | decoding, {how} | | | | {figure} |")
    return "\n".join(lines) + "\n"


def run(command):
    """(exit code, output) of a command, its output shown as it comes."""
    lines, environment = [], {**os.environ, "PYTHONUNBUFFERED": "1"}
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": environment}
    with subprocess.Popen(command, cwd=ROOT, **pipe) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    return process.returncode, "".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="runs/gpu_check", help="Written with .json and .md added [runs/gpu_check].")
    parser.add_argument("--tiny", action="store_true", help="A tiny model on the CPU.")
    parser.add_argument("--measure", choices=CASES, help="One case alone, as JSON on the last line.")
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.tiny)))
        return 0
    if not (arguments.tiny or torch.cuda.is_available()):
        print("gpu_check.py: error: no GPU here; --tiny shows that the script runs", file=sys.stderr)
        return 2
    code, output = run([sys.executable, "-m", "pytest", "-vv", "-m", "gpu", "tests/test_gpu.py"])
    report = {
        "date": datetime.date.today().isoformat(), "gpu": not arguments.tiny, "torch": torch.__version__,
        "device": "CPU" if arguments.tiny else torch.cuda.get_device_name(),
        "tests": output.strip().splitlines()[-1].strip("= "), "cases": {},
    }  # fmt: skip
    for case in CASES:  # each in a process of its own, so that no memory of one counts for the other
        failed, output = run([sys.executable, __file__, "--measure", case, *(["--tiny"] if arguments.tiny else [])])
        if failed:
            code = failed
        else:
            label = f"tiny in place of {case}" if arguments.tiny else case
            report["cases"][label] = json.loads([line for line in output.splitlines() if line.startswith("{")][-1])
    path = Path(arguments.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
    path.with_suffix(".md").write_text(table(report))
    print(table(report))
    return code


if __name__ == "__main__":
    sys.exit(main())
