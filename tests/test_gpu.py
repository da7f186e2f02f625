"""What must hold on a GPU, in the precision of training; without one the same tests run on the CPU.

Not yet run on a GPU.
"""

import sys
from dataclasses import replace

import pytest
import torch
from conftest import FAMILIES, PIXEL_FIELDS, load_pair, make_prompt, naive_logprobs, random_completions
from test_fast_paths import always_faster
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoProcessor

from grpo import update
from grpo.batch import pack
from grpo.config import parse_config
from grpo.engine import distributed
from grpo.engine.build import build_policy
from grpo.engine.checkpoint import Saver, load_training
from grpo.engine.fast_paths import FAST_PATHS, find_faults, using
from grpo.engine.optimizer import make_optimizer, set_learning_rate
from grpo.sampler import SamplingSettings, generate

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.gpu
on_a_gpu = pytest.mark.skipif(DEVICE.type == "cpu", reason="fast paths are a GPU's")
# The largest difference of two log-probabilities; bf16 has 8 bits, and the two paths round at different places.
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 0.15}


def on_device(folder, dtype):
    policy, naive, tokenizer = load_pair(folder, dtype)
    return policy.to(DEVICE), naive.to(DEVICE), tokenizer


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_logprobs_equal_the_naive_forward(checkpoints, family, dtype):
    if family == "qwen3_vl" and "softgpu" in sys.modules:
        pytest.skip("the GPU that is not there does not index by a boolean mask, as transformers' Qwen3-VL does")
    policy, naive, tokenizer = on_device(checkpoints[family], dtype)
    prompt = make_prompt(tokenizer, [("video", (4, 4, 6))])
    for lengths in ((5, 5, 5), (7, 1, 4)):
        completions = random_completions(tokenizer, lengths)
        packed = pack([prompt], [completions], policy.spec).to(DEVICE)
        with torch.no_grad():
            ours, _ = policy(packed)
            theirs = naive_on_device(naive, policy.spec, prompt, completions)
        assert (ours - theirs).abs().max() < TOLERANCE[dtype]


def naive_on_device(naive, spec, prompt, completions):
    """`naive_logprobs` with its inputs moved to the model's device."""
    call = naive.forward
    move = lambda value: value.to(DEVICE) if isinstance(value, torch.Tensor) else value

    class Moved:
        def __call__(self, **given):
            given = {name: move(value) for name, value in given.items()}
            pixels = [name for name in PIXEL_FIELDS if name.startswith("pixel") and name in given]
            given |= {name: given[name].to(naive.dtype) for name in pixels}
            out = call(**given)
            out.logits = out.logits.float().cpu()
            return out

    return naive_logprobs(Moved(), spec, prompt, completions).to(DEVICE)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_sampler_and_scorer_agree(checkpoints, dtype):
    policy, _, tokenizer = on_device(checkpoints["qwen2_vl"], dtype)
    prompts = [make_prompt(tokenizer, [("video", (4, 4, 6))], seed) for seed in (1, 2)]
    settings = SamplingSettings(max_new_tokens=12)
    groups = generate(policy, prompts, 4, settings, [1, 2], tokenizer)
    packed = pack(prompts, [group.tokens for group in groups], policy.spec).to(DEVICE)
    with torch.no_grad():
        scored, _ = policy(packed)
    seen = torch.cat([row for group in groups for row in group.logprobs])
    assert (scored.cpu() - seen).abs().max() < TOLERANCE[dtype]


def installed(path):
    if path == "flash-attn":
        pytest.importorskip("flash_attn")


@on_a_gpu
@pytest.mark.parametrize("path", FAST_PATHS)
def test_the_self_check_finds_no_fault_in_a_fast_path(checkpoints, monkeypatch, path):
    installed(path)
    always_faster(monkeypatch)
    policy, _, tokenizer = on_device(checkpoints["qwen2_vl"], torch.bfloat16)
    config = parse_config(["--preset", "demo", "--max_new_tokens", "24"])
    assert find_faults([path], policy, make_prompt(tokenizer, [("video", (4, 4, 6))]), config, tokenizer) == [None]


@on_a_gpu
@pytest.mark.parametrize("path", ["flash-attn", "fused norms"])
def test_a_fast_path_has_the_gradients_of_the_plain_one(checkpoints, path):
    """In bf16 they differ by less than 5% of the norm of all, and each by 10% of its norm or 1% of the norm of all."""
    installed(path)
    policy, _, tokenizer = on_device(checkpoints["qwen2_vl"], torch.bfloat16)
    prompt = make_prompt(tokenizer, [("video", (4, 4, 6))])
    packed = pack([prompt], [random_completions(tokenizer, (9, 4, 7))], policy.spec).to(DEVICE)

    def gradients(names):
        policy.zero_grad()
        with using(names):
            policy(packed)[0].sum().backward()
        return {name: p.grad.float() for name, p in policy.named_parameters()}

    plain, fast = gradients(()), gradients({path})
    whole = torch.stack([g.norm() for g in plain.values()]).norm()
    off = {name: (fast[name] - plain[name]).norm() for name in plain}
    assert torch.stack(list(off.values())).norm() < 0.05 * whole
    for name, difference in off.items():
        assert difference < 0.1 * plain[name].norm() + 0.01 * whole, name


@on_a_gpu
def test_decoding_by_graphs_gives_the_same_completions(checkpoints):
    policy, _, tokenizer = on_device(checkpoints["qwen2_vl"], torch.float32)
    policy.spec = replace(policy.spec, eos_ids=tuple(range(0, 390, 29)))  # rows end early, so shapes change
    prompts = [make_prompt(tokenizer, [("video", (4, 4, 6))], seed) for seed in (1, 2)]
    run = lambda: generate(policy, prompts, 8, SamplingSettings(max_new_tokens=40), [1, 2], tokenizer)
    eager = run()
    with using({"decoding graph"}):
        graphed = run()
    for ours, theirs in zip(graphed, eager):
        assert [t.tolist() for t in ours.tokens] == [t.tolist() for t in theirs.tokens]


def test_an_update_as_the_recipe_runs_it(checkpoints):
    """build_policy's own precision (bf16 compute, fp32 masters on a GPU): finite, and masters move by a lr of 1e-6."""
    folder = checkpoints["qwen2_vl"]
    config = parse_config(["--preset", "demo", "--model", str(folder), "--activation_checkpointing", "full"])
    device, mesh = distributed.start()
    try:
        processor = AutoProcessor.from_pretrained(folder)
        policy = build_policy(folder, config, processor, device, mesh)
        optimizer = make_optimizer(policy, config)
        set_learning_rate(optimizer, 1e-6)
        packed = pack([make_prompt(processor.tokenizer, [("video", (4, 4, 6))])], [[torch.arange(5)]], policy.spec)
        policy(packed.to(DEVICE))[0].sum().backward()
        before = [p.detach().clone() for p in policy.parameters()]
        norm = update.apply_gradients(policy, optimizer, 1.0)
        assert 0 < norm < float("inf")
        assert {p.dtype for p in policy.parameters()} == {torch.float32}
        assert any(not torch.equal(a, b) for a, b in zip(before, policy.parameters()))
    finally:
        distributed.stop()


class Crossings(TorchDispatchMode):
    """Counts the bytes of numbers that calls copy from one kind of device to another, as they cross."""

    def __init__(self, source, target):
        super().__init__()
        self.ends, self.bytes = (source, target), 0

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented  # the calls that it makes come here one by one
        made = call(*args, **(kwargs or {}))
        if call.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_) and FakeTensor not in types:
            given = args[call.overloadpacket is torch.ops.aten.copy_]
            if (given.device.type, made.device.type) == self.ends and given.is_floating_point():
                self.bytes += given.nbytes
        return made


def test_weights_masters_and_moments_cross_between_host_and_device_once(checkpoints, tmp_path):
    """12 bytes a number for the masters and both moments, and what the weights are computed in, saved and loaded."""
    (device, mesh), folder = distributed.start(), checkpoints["qwen2_vl"]
    config = parse_config(["--preset", "demo", "--model", str(folder), "--output", str(tmp_path)])
    processor = AutoProcessor.from_pretrained(folder)
    try:
        policy = build_policy(folder, config, processor, device, mesh)
        optimizer, saver = make_optimizer(policy, config), Saver(device, processor, config)
        with Crossings(DEVICE.type, "cpu") as saved:
            folder = saver.save(1, policy, optimizer, {})
        saver.wait()
        with Crossings("cpu", DEVICE.type) as loaded:
            policy = build_policy(folder, config, processor, device, mesh)
            load_training(folder, policy, make_optimizer(policy, config))
    finally:
        distributed.stop()
    expected = sum(p.numel() for p in policy.parameters()) * (12 + distributed.compute_dtype(device).itemsize)
    assert saved.bytes == expected
    assert loaded.bytes == pytest.approx(expected, rel=0.01)  # and a few buffers
