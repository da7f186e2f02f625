"""A fast path is used only if it is right and faster; else one line says why. Stand-ins take the place of kernels."""

import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from conftest import make_prompt
from test_shared_prompt import flash_attn_varlen_func

from grpo import attention
from grpo.attention import IN_USE
from grpo.batch import pack
from grpo.config import parse_config
from grpo.engine import fast_paths
from grpo.engine.fast_paths import choose_fast_paths
from grpo.sampler import SamplingSettings, generate
from video.prompt import Skipped

PLAIN = "attention by torch's scaled_dot_product_attention; fast paths in use: none"


def always_faster(monkeypatch):
    """Trials take the less time, the more paths are in use."""
    run_trial = fast_paths.run_trial

    def timed(names, *given):
        seconds = 5.0 - len(names)
        return run_trial(names, *given)._replace(seconds={"scoring": seconds, "sampling": seconds})

    monkeypatch.setattr(fast_paths, "run_trial", timed)


@pytest.fixture
def check(tiny_vl, monkeypatch):
    """A function of a flash-attn kernel: runs the check as a GPU does, and returns the lines that it says."""
    policy, _, tokenizer = tiny_vl
    config = parse_config(["--preset", "demo", "--max_new_tokens", "8", "--group_size", "2"])
    prompt, lines = make_prompt(tokenizer, [("video", (4, 4, 6))]), []
    on_a_gpu = SimpleNamespace(device=torch.device("cuda"))  # its plain twin is on the CPU
    loader = SimpleNamespace(batches=lambda groups: ([Skipped("x", "x", "x")] if s is None else [s] for (s,) in groups))

    def run(kernel, samples=(None, prompt), others=()):
        monkeypatch.setattr(fast_paths, "gather", lambda faults: [faults, *others])
        monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=kernel))
        choose_fast_paths(on_a_gpu, loader, samples, config, tokenizer, lines.append)
        return lines

    monkeypatch.setattr(fast_paths, "FAST_PATHS", {"flash-attn": "scoring"})
    monkeypatch.setattr(fast_paths, "unsharded", lambda _: nullcontext(policy))
    always_faster(monkeypatch)
    monkeypatch.setattr(attention, "flash_fits", lambda query: "flash-attn" in IN_USE)
    yield run
    IN_USE.clear()


def numbers(tiny_vl):
    """What a run computes: log-probabilities of sampling and of scoring."""
    policy, _, tokenizer = tiny_vl
    prompt = make_prompt(tokenizer, [("video", (4, 4, 6))])
    (group,) = generate(policy, [prompt], 3, SamplingSettings(max_new_tokens=6), [5], tokenizer)
    with torch.no_grad():
        scored, _ = policy(pack([prompt], [group.tokens], policy.spec))
    return torch.cat([*group.logprobs, scored])


def test_a_path_that_is_right_and_faster_is_used(check, tiny_vl):
    calls, plain = [], numbers(tiny_vl)

    def kernel(*given, **named):
        calls.append(1)
        return flash_attn_varlen_func(*given, **named)

    assert check(kernel) == ["attention by flash-attn; fast paths in use: flash-attn"]
    calls.clear()
    assert (numbers(tiny_vl) - plain).abs().max() < 1e-5 and calls


def wrong(*given, causal=False, **named):
    return flash_attn_varlen_func(*given, causal=causal, **named) * (0.5 if causal else 1)


def not_finite(*given, **named):
    return flash_attn_varlen_func(*given, **named) * float("nan")


def broken(*given, **named):
    raise RuntimeError("no kernel image is available for execution on the device\nCompile with TORCH_USE_CUDA_DSA")


@pytest.mark.parametrize(
    "kernel, reason",
    [
        (wrong, "its log-probabilities are off by 0."),
        (not_finite, "FloatingPointError: the model's logits are not finite"),
        (broken, "RuntimeError: no kernel image is available for execution on the device"),
    ],
)
def test_a_path_that_is_wrong_is_left_out_and_the_plain_numbers_stay(check, tiny_vl, kernel, reason):
    plain = numbers(tiny_vl)
    left_out, used = check(kernel)
    assert left_out.startswith(f"flash-attn is left out: {reason}") and "\n" not in left_out
    assert used == PLAIN
    assert torch.equal(numbers(tiny_vl), plain)


@pytest.mark.parametrize("error", [ImportError, OSError, AttributeError])
def test_a_build_that_cannot_be_imported_costs_a_line(check, monkeypatch, error):
    class Module:
        @property
        def flash_attn_varlen_func(self):
            raise error("flash_attn_2_cuda.so: undefined symbol: _ZN3c104cuda9SetDeviceEa")

    setitem = monkeypatch.setitem
    monkeypatch.setattr(monkeypatch, "setitem", lambda where, name, _: setitem(where, name, Module()))
    shown = "ImportError" if error is AttributeError else error.__name__  # what `from ... import` makes of it
    left_out, used = check(None)
    assert left_out.startswith(f"flash-attn is left out: {shown}: ") and "\n" not in left_out and used == PLAIN


def test_a_path_that_is_not_faster_is_left_out(check, monkeypatch):
    run_trial = fast_paths.run_trial  # as the fixture has it
    monkeypatch.setattr(fast_paths, "run_trial", lambda *given: run_trial(*given)._replace(seconds={"scoring": 1.5}))
    reason = "it is not faster, 1.5 s against 1.5 s without it"
    assert check(flash_attn_varlen_func) == [f"flash-attn is left out: {reason}", PLAIN]


def test_a_path_that_fails_on_another_rank_is_left_out_here_too(check):
    assert check(flash_attn_varlen_func, others=[["it is not faster"]]) == [
        "flash-attn is left out: it is not faster", PLAIN
    ]  # fmt: skip


def test_without_a_prompt_that_can_be_read_nothing_is_tried(check):
    assert check(flash_attn_varlen_func, samples=[None] * 20) == [
        "flash-attn is left out: none of the first 8 samples can be read, to try it on", PLAIN
    ]  # fmt: skip
