"""What only a GPU shows, on a GPU that is not there: torch's own CUDA path, its kernels answered by the CPU's.

`.ci/run` runs these tests if it finds that GPU beside the project. What a kernel computes, and how long it takes, they
cannot show.
"""

import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import load_pair, make_prompt
from processes import command, finish, metrics_of, run_here
from test_fast_paths import always_faster, wrong

import eval as evaluation
from grpo import policy, sampler
from grpo.attention import IN_USE, PackedLayout
from grpo.batch import pack
from grpo.config import parse_config
from grpo.engine import build, checkpoint, distributed, fast_paths
from grpo.engine.fast_paths import FAST_PATHS, find_faults, using
from grpo.sampler import Decoding, SamplingSettings, generate

softgpu = pytest.importorskip("softgpu", reason="needs the GPU that is not there; .ci/run says where it looks for it")
pytestmark = pytest.mark.slow
NUMBERS = ("loss", "grad_norm", "kl", "entropy", "reward", "length")


@pytest.fixture
def fp32(monkeypatch):
    for module in (distributed, checkpoint):
        monkeypatch.setattr(module, "compute_dtype", lambda device: torch.float32)


@pytest.fixture
def gpu(_soft):
    """The GPU that is not there; no fast path is in use on it before or after."""
    IN_USE.clear()
    yield _soft
    IN_USE.clear()


@pytest.fixture
def decoder(checkpoints, gpu):
    """(policy in fp32 whose rows end early, so that shapes change, a prompt, tokenizer)."""
    policy, _, tokenizer = load_pair(checkpoints["qwen2_vl"])
    policy.spec = replace(policy.spec, eos_ids=tuple(range(0, 390, 29)))
    return policy.to("cuda"), make_prompt(tokenizer, [("video", (4, 4, 6))]), tokenizer


def relative(ours, theirs):
    """The largest difference between what the steps of two runs logged, relative to the larger of 1 and the value."""
    pairs = [(a[name], b[name]) for a, b in zip(ours, theirs, strict=True) for name in NUMBERS if name in b]
    return max(abs(a - b) / max(1, abs(b)) for a, b in pairs)


# Whole runs: the numbers of the CPU


@pytest.fixture(scope="module")
def on_cpu(world, tmp_path_factory):
    return run_here(tmp_path_factory.mktemp("cpu"), world, "--device", "cpu")


@pytest.mark.parametrize("count", [1, 2, 4])
def test_ranks_train_as_on_the_cpu(world, tmp_path, on_cpu, count):
    """3 steps over NCCL, sharded, in fp32."""
    if torch.cuda.device_count() < count:
        pytest.skip("NULLGPU_COUNT=4 gives four")
    process = subprocess.Popen(
        command(count, tmp_path, world, script="tests/null_train.py"),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    assert f"{count} x cuda" in finish(process)
    rows = [row for row in metrics_of(tmp_path) if row["phase"] == "train"]
    assert relative(rows[:1], on_cpu[:1]) < 1e-6
    assert relative(rows, on_cpu) < 1e-5  # 3e-7 was seen; but Adam makes whole steps of gradients that are rounding


RUNS = {
    "adapters": ("--lora_rank", "4"),
    "frozen tower": ("--freeze_vision",),
    "T-GRPO": ("--temporal_bonus", "0.3", "--reward", "accuracy:1", "format:0.5", "--group_size", "4"),
}


@pytest.mark.parametrize("flags", RUNS.values(), ids=RUNS)
def test_each_kind_of_run_has_the_numbers_of_the_cpu(world, tmp_path, fp32, gpu, flags):
    if "--lora_rank" in flags:
        pytest.importorskip("peft")
    ours, theirs = (run_here(tmp_path / device, world, *flags, "--device", device) for device in ("cuda", "cpu"))
    assert relative(ours, theirs) < 1e-5


def test_warm_up_and_evaluation_against_it_leave_no_memory_behind(world, tmp_path, fp32, gpu, monkeypatch):
    """Two policies of training and two of evaluation: before the second, as much is allocated as before the first."""
    allocated, materialise = [], build.materialise

    def noted(model, device):
        if device.type == "cuda":
            allocated.append(torch.cuda.memory_allocated())
        materialise(model, device)

    monkeypatch.setattr(build, "materialise", noted)
    flags = ("--sft_data", str(world[0]["warmup"]), "--sft_steps", "2", "--sft_prompts_per_step", "4", "--kl_coef", "0")
    ours, theirs = (run_here(tmp_path / device, world, *flags, "--device", device) for device in ("cuda", "cpu"))
    assert relative(ours, theirs) < 1e-5
    results = []
    for device in ("cuda", "cpu"):
        run, output = tmp_path / "cpu", tmp_path / f"answers by {device}"
        flags = ["--ckpt", run / "checkpoint-3", "--against", run / "warmup", "--output", output, "--device", device]
        assert evaluation.main([str(flag) for flag in flags]) == 0
        results.append(json.loads((output / "results.json").read_text()))
    assert results[0] == results[1]
    warmed, trained, answered, compared = allocated
    assert warmed == trained >= answered == compared


# Faults that a CPU does not show, planted


def test_an_index_left_on_the_cpu_is_caught(decoder, monkeypatch):
    model, prompt, _ = decoder
    packed = pack([prompt], [[torch.arange(5), torch.arange(3)]], model.spec).to("cuda")
    model(packed)
    monkeypatch.setattr(policy, "PackedLayout", lambda groups, device: PackedLayout(groups, "cpu"))
    with pytest.raises(RuntimeError, match="same device"):
        model(packed)


def waits_of_steps(decoder, gpu, monkeypatch):
    """How often each step of a sampling waited for the device."""
    waits, step = [], Decoding.step
    count = lambda: sum(gpu.syncs.values()) + sum(n for way, n in gpu.copies.items() if "blocking" in way)

    def counted(decoding):
        before = count()
        step(decoding)
        waits.append(count() - before)

    monkeypatch.setattr(Decoding, "step", counted)
    model, prompt, tokenizer = decoder
    generate(model, [prompt], 4, SamplingSettings(max_new_tokens=20), [1], tokenizer)
    return waits


def waiting(sample_next_token):
    """`grpo.sampler.sample_next_token` that looks at the tokens."""

    def looking(*given):
        tokens, logprobs = sample_next_token(*given)
        assert tokens.max().item() >= 0
        return tokens, logprobs

    return looking


def test_a_decoding_step_waits_for_nothing(decoder, gpu, monkeypatch):
    waits = waits_of_steps(decoder, gpu, monkeypatch)
    assert len(waits) > 5 and set(waits) == {0}


def test_a_step_that_waits_is_caught(decoder, gpu, monkeypatch):
    monkeypatch.setattr(sampler, "sample_next_token", waiting(sampler.sample_next_token))
    assert min(waits_of_steps(decoder, gpu, monkeypatch)) > 0


def fault_of_graphs(decoder, monkeypatch):
    """What the self-check finds in decoding by graphs, with no regard to time."""
    always_faster(monkeypatch)
    config = parse_config(["--preset", "demo", "--group_size", "8", "--max_new_tokens", "40"])
    model, prompt, tokenizer = decoder
    return find_faults(["decoding graph"], model, prompt, config, tokenizer)[0]


def test_graphs_are_right_as_rows_leave(decoder, monkeypatch):
    made, record = [], sampler.record
    monkeypatch.setattr(sampler, "record", lambda *given: made.append(1) or record(*given))
    assert fault_of_graphs(decoder, monkeypatch) is None
    assert len(made) >= 4, "in each of two samplings one graph, and another once rows have left"


def test_a_wait_in_a_graph_is_caught(decoder, monkeypatch):
    monkeypatch.setattr(sampler, "sample_next_token", waiting(sampler.sample_next_token))
    assert "not permitted when stream is capturing" in fault_of_graphs(decoder, monkeypatch)


def test_a_stale_graph_is_caught(decoder, monkeypatch):
    """One that is replayed though rows have left: it writes where the old rows were."""
    drop_ended = Decoding.drop_ended

    def keep_graph(decoding):
        state = decoding.warm, decoding.recorded
        drop_ended(decoding)
        decoding.warm, decoding.recorded = state

    monkeypatch.setattr(Decoding, "drop_ended", keep_graph)
    assert fault_of_graphs(decoder, monkeypatch) is not None


def test_recording_leaves_the_allocators_cache_and_its_memory_is_given_back(decoder, monkeypatch):
    """torch.cuda.graph empties the cache at each recording."""
    model, prompt, tokenizer = decoder
    freed, reserved, record = [], [], sampler.record

    def counted(*given):
        before = softgpu.counters()["free"]
        graph = record(*given)
        freed.append(softgpu.counters()["free"] - before)
        return graph

    monkeypatch.setattr(sampler, "record", counted)
    with using({"decoding graph"}):
        for _ in range(3):
            generate(model, [prompt], 8, SamplingSettings(max_new_tokens=40), [1], tokenizer)
            reserved.append(torch.cuda.memory_reserved())
    assert len(freed) >= 6 and set(freed) == {0}
    assert reserved[1] == reserved[2]


# Fast paths that return other numbers: one line, and the run's numbers are the plain path's

LONG = ("--max_new_tokens", "20", "--steps", "2", "--prompts_per_step", "2", "--eval_samples", "0")


@pytest.fixture(scope="module")
def plain_run(world, tmp_path_factory):
    """Steps of a run that tries no fast path, in bf16."""
    with pytest.MonkeyPatch.context() as patch, softgpu.SoftGPU():
        patch.setattr(fast_paths, "FAST_PATHS", {})
        return run_here(tmp_path_factory.mktemp("plain"), world, *LONG)


def wrong_flash(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=wrong))


def wrong_graph(monkeypatch):
    """A graph that does nothing."""
    monkeypatch.setattr(sampler, "record", lambda step, pool: SimpleNamespace(replay=lambda: None))


def wrong_norms(monkeypatch):
    rms_norm = F.rms_norm
    monkeypatch.setattr(F, "rms_norm", lambda *given: 1.5 * rms_norm(*given))


WRONG = {"flash-attn": wrong_flash, "fused norms": wrong_norms, "decoding graph": wrong_graph}


@pytest.mark.parametrize("name", WRONG)
def test_a_run_leaves_out_a_path_of_other_numbers(world, tmp_path, plain_run, gpu, monkeypatch, capsys, name):
    WRONG[name](monkeypatch)
    always_faster(monkeypatch)
    monkeypatch.setattr(fast_paths, "FAST_PATHS", {name: FAST_PATHS[name]})
    rows = run_here(tmp_path, world, *LONG)
    shown = capsys.readouterr().out
    assert shown.count(f"{name} is left out: ") == 1
    assert "fast paths in use: none" in shown
    assert rows == plain_run
