"""The memory plan against independent counts: meta models, tensors in memory, and by hand."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, load_model, make_prompt, random_completions
from torch.profiler import ProfilerActivity, profile
from transformers import AutoProcessor, Qwen2VLForConditionalGeneration

import train
from grpo.attention import PackedLayout
from grpo.batch import pack
from grpo.config import Config, parse_config
from grpo.engine.model import checkpoint_activations, decoder, model_spec, use_own_kernels, vision_tower
from grpo.engine.model_files import read_config
from grpo.engine.optimizer import make_optimizer
from grpo.families import load_family
from grpo.policy import Policy
from grpo.run.plan import (
    GIB,
    TEXT_TOKENS,
    kept_bytes,
    memory_plan,
    moments,
    most_frames,
    parameter_counts,
    plan_text,
    published_config,
)

SEVEN, TWO = "Qwen/Qwen2-VL-7B-Instruct", "Qwen/Qwen2-VL-2B-Instruct"


@pytest.fixture(scope="module")
def seven():
    config = published_config(SEVEN)
    return config, parameter_counts(config)


def test_published_parameter_counts(seven):
    """What the hub's safetensors metadata say of each."""
    config, counts = seven
    with torch.device("meta"):
        model = Qwen2VLForConditionalGeneration(config)
    assert counts["all"] == sum(p.numel() for p in model.parameters()) == 8_291_375_616
    assert counts["root"] > 2 * config.text_config.vocab_size * config.text_config.hidden_size
    assert parameter_counts(published_config(TWO))["all"] == 2_208_985_600
    sizes = {"3B": 3_754_622_976, "7B": 8_292_166_656, "32B": 33_452_718_336, "72B": 73_410_777_344}
    for size, number in sizes.items():
        assert parameter_counts(published_config(f"Qwen/Qwen2.5-VL-{size}-Instruct"))["all"] == number
    sizes = {"2B": 2_127_532_032, "4B": 4_437_815_808, "8B": 8_767_123_696, "32B": 33_357_390_064}
    for size, number in sizes.items():
        assert parameter_counts(published_config(f"Qwen/Qwen3-VL-{size}-Instruct"))["all"] == number


def test_tokens_by_hand(seven):
    """16 frames of 196·28² pixels: 8 time steps of 196 merged tokens, 4 patches each."""
    settings = Config(nframes=16, max_pixels=196 * 28 * 28, group_size=8, max_new_tokens=256, plan=4)
    tokens = memory_plan(*seven, settings)["tokens"]
    assert tokens["video tokens"] == 8 * 196 and tokens["patches"] == 4 * 8 * 196
    assert tokens["packed tokens"] == tokens["prompt tokens"] + 8 * 256


def test_tokens_of_qwen3_by_hand():
    """128 frames of 512² pixels: 64 time steps of 16 x 16 merged tokens, beside each a stamp; its tower's features are
    the tower's own and three of DeepStack. The published limit of --preset qwen3-vl-8b holds them."""
    config = parse_config(["--preset", "qwen3-vl-8b", "--plan", "8"])
    model = published_config(config.model)
    tokens = memory_plan(model, parameter_counts(model), config)["tokens"]
    assert tokens["video tokens"] == 64 * 256 and tokens["patches"] == 4 * 64 * 256
    assert tokens["prompt tokens"] == 64 * (256 + 10) + TEXT_TOKENS <= config.max_prompt_tokens
    assert load_family("qwen3_vl").feature_width(model) == 4 * 4096


def test_the_recipe_fits_72_gib():
    config = parse_config(["--plan", "4"])
    model = published_config(config.model)
    counts = parameter_counts(model)
    plan_of = lambda frames: memory_plan(model, counts, replace(config, nframes=frames))
    plan = memory_plan(model, counts, config)
    assert 40 * GIB < plan["peak"] <= 72 * GIB
    most = most_frames(plan_of, 80 * GIB, 10**6)
    assert most > 16 and plan_of(most)["peak"] <= 80 * GIB < plan_of(most + 2)["peak"]
    assert "fits --gpu_memory 80" in plan_text(config)


# Peaks of torch's own caching allocator in GiB, by phase: docs/performance.md. P prompts a forward and a rollout.
@pytest.mark.parametrize(
    "name, gpus, frames, changes, measured",
    [
        (SEVEN, 4, 16, {}, (42.95, 31.40, 40.09)),
        (SEVEN, 4, 128, {}, (45.74, 32.31, 47.20)),
        (SEVEN, 4, 64, {"group_size": 16, "max_new_tokens": 1024}, (44.61, 33.23, 47.31)),
        (SEVEN, 4, 64, {"prompts_per_forward": 2, "prompts_per_rollout": 2}, (45.79, 32.61, 47.91)),
        (TWO, 1, 16, {}, (33.45, 29.53, 38.28)),
        (TWO, 1, 64, {}, (34.44, 30.22, 39.36)),
    ],
)
def test_phases_against_the_peaks_of_torchs_allocator(name, gpus, frames, changes, measured):
    model = published_config(name)
    settings = Config(nframes=frames, plan=gpus, **changes)
    plan = memory_plan(model, parameter_counts(model), settings)
    planned = [(sum(parts.values()) - parts["overhead"]) / GIB for parts in plan["phases"].values()]
    assert planned == pytest.approx(measured, rel=0.1)


def test_parts_against_tensors_in_memory(checkpoints, monkeypatch):
    """Masters, moments, gradients, KV cache and saved layer inputs of a tiny fp32 model, byte for byte where exact."""
    folder = checkpoints["qwen2_vl"]
    processor = AutoProcessor.from_pretrained(folder)
    model = load_model(folder)
    policy, config = Policy(model, model_spec(model, processor.tokenizer)), read_config(folder)
    optimizer = make_optimizer(policy, parse_config(["--preset", "demo"]))
    prompt = make_prompt(processor.tokenizer, [("video", (4, 4, 6))])
    completions = random_completions(processor.tokenizer, [5] * 3)
    packed = pack([prompt], [completions], policy.spec)
    policy(packed)[0].sum().backward()

    # 8 frames of 4 x 6 patches of 14²; what is left of the prompt is text.
    monkeypatch.setattr("grpo.run.plan.TEXT_TOKENS", len(prompt.input_ids) - 24)
    settings = Config(nframes=8, max_pixels=4 * 6 * 14 * 14, group_size=3, max_new_tokens=5, plan=1)
    plan = memory_plan(config, parameter_counts(config), settings)
    assert plan["tokens"]["packed tokens"] == packed.input_ids.shape[1]
    assert plan["tokens"]["patches"] == len(packed.pixels)
    update = plan["phases"]["update"]
    sizes = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)
    assert update["masters"] == sizes(policy.parameters())
    parts = moments(config, parameter_counts(config), settings, plan["tokens"], parameter_counts(config)["all"])
    assert parts["update"][-1]["gradients"] == sizes(p.grad for p in policy.parameters())
    both = [state[moment] for state in optimizer.state.values() for moment in ("exp_avg", "exp_avg_sq")]
    assert update["moments"] == sizes(both)

    _, prompt_kv = policy.prefill(pack([prompt], [[]], policy.spec))
    keys, values = (sizes(pair[i] for pairs in prompt_kv.values() for pair in pairs) for i in (0, 1))
    measured = keys + values / 2  # values are fp32 here, bf16 planned
    share = len(prompt.input_ids) / plan["tokens"]["packed tokens"]
    assert parts["rollout"][-1]["KV cache"] * share == pytest.approx(measured)


def bytes_left_by(run):
    """Bytes that torch's CPU allocator handed out in run() and that are still held after it, as its result is."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as events:
        result = run()
    left = sum(event.self_cpu_memory_usage for event in events.key_averages())
    del result
    return left


def wide_model(name, setting):
    """(the family, its bf16 model of one layer and one block, its `parameter_counts`)"""
    family = load_family(name)
    text = {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 8, "num_key_value_heads": 2,
            "num_hidden_layers": 1, "vocab_size": 64}  # fmt: skip
    tower = {"depth": 1, "num_heads": 4, "hidden_size": 160, "intermediate_size": 512, "out_hidden_size": 256}
    if name == "qwen2_vl":
        tower = {"depth": 1, "num_heads": 4, "embed_dim": 160, "mlp_ratio": 4, "hidden_size": 256}
    config = family.model_class.config_class(text_config=text, vision_config=tower)
    counts = parameter_counts(config)
    model = use_own_kernels(family.model_class._from_config(config, dtype=torch.bfloat16))
    if setting != "none":
        checkpoint_activations(model, setting == "selective")
    return family, model, counts


@pytest.mark.parametrize("setting", ["full", "selective", "none"])
@pytest.mark.parametrize("family", FAMILIES)
def test_kept_bytes_against_torchs_allocator(family, setting):
    """Of a decoder layer and a vision block, whose output is the next one's input."""
    family, model, counts = wide_model(family, setting)
    text, vision = model.config.text_config, model.config.vision_config
    wide, narrow = text.hidden_size, family.tower_sizes(vision)[0]
    make = lambda *shape: torch.randn(*shape, dtype=torch.bfloat16, requires_grad=True)
    row, turn, patches = make(1, 128, wide), make(1, 128, family.head_size(text)).detach(), make(128, narrow)
    angles = torch.randn(128, narrow // vision.num_heads)
    layer, block = decoder(model).layers[0], vision_tower(model).blocks[0]
    heads = text.num_attention_heads * family.head_size(text)
    left = bytes_left_by(
        lambda: layer(row, position_embeddings=(turn, turn), attention_mask=None, layout=PackedLayout([(128, ())]))
    )
    planned = kept_bytes(setting, wide, counts["layer outputs"] + heads, family.layer_rest(text))
    assert planned == pytest.approx(left / 128, rel=0.1)
    bounds = torch.tensor([0, 64, 128])
    left = bytes_left_by(lambda: block(patches, cu_seqlens=bounds, position_embeddings=(angles, angles)))
    planned = kept_bytes(setting, narrow, counts["block outputs"] + narrow, family.tower_rest(vision))
    assert planned == pytest.approx(left / 128, rel=0.1)


def test_each_saving_lowers_the_peak(seven):
    base = Config(nframes=16, max_pixels=196 * 28 * 28, group_size=8, max_new_tokens=256, plan=4)
    peak = lambda **changes: memory_plan(*seven, replace(base, **changes))["peak"]
    assert peak(plan=8) < peak() < peak(activation_checkpointing="selective") < peak(activation_checkpointing="none")
    assert peak(plan=8, shard_size=4) == peak()
    assert peak(kl_coef=0.0) == pytest.approx(peak() - 2 * seven[1]["all"] / 4)
    assert peak(freeze_vision=True) < peak() and peak(nframes=32) > peak()
    assert peak(lora_rank=16) < peak() / 2
    assert peak(plan=1, lora_rank=16) < 24 * GIB, "7B by adapters on one 24 GiB card"


def test_what_a_shared_prompt_takes(seven):
    """Activations of 4 ranks that share a prompt are a quarter, but for the features that are sent; the prompt's cache
    is on each, and so are logits. Only so do four GPUs take 1,000 frames."""
    pixels = {"max_pixels": 196 * 28 * 28, "total_pixels": 10**12}
    base = Config(nframes=512, group_size=8, max_new_tokens=256, plan=4, **pixels)
    four, tokens, trained = replace(base, sequence_parallel=4), memory_plan(*seven, base)["tokens"], seven[1]["all"]
    whole, shared = (moments(*seven, settings, tokens, trained) for settings in (base, four))
    for phase, parts in whole.items():
        for ours, theirs in zip(shared[phase], parts, strict=True):
            quarter = theirs.get("activations", 0) / 4
            assert quarter <= ours.get("activations", 0) <= 1.1 * quarter
            assert all(
                ours[name] == theirs[name] for name in theirs if name not in ("activations", "KV cache", "logits")
            )
    caches = [parts["rollout"][-1]["KV cache"] / 6 / 28 / 512 for parts in (whole, shared)]  # tokens
    assert caches == [tokens["prompt tokens"] + 8 * 256, tokens["prompt tokens"] + 2 * 256]
    assert shared["update"][0]["logits"] == whole["update"][0]["logits"]

    def most(settings):
        return most_frames(lambda n: memory_plan(*seven, replace(settings, nframes=n)), 80 * GIB, 10**7)

    assert most(base) < 1000 < most(four)


def test_adapters_by_hand(seven):
    """Rank 8 on 7B: q and o 3584+3584, k and v 3584+512, gate, up and down 3584+18944."""
    assert 8 * seven[1]["adapters"] == 8 * 28 * (2 * 7168 + 2 * 4096 + 3 * 22528)


def test_plan_is_printed_before_anything_loads(capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert train.main(["--plan", "4", "--max_frames", "32"]) == 0
    shown = capsys.readouterr().out
    assert (Path(__file__).parent.parent / re.search(r"a formula \((.*)\)", shown)[1]).is_file()
    for words in ("8.29B parameters on 4 GPUs", "32 frames", "gathered weights", "most frames: ", "not yet run",
                  "torch reserves up to ", "with --activation_checkpointing selective: ", "; none: ",
                  "prompts this long fit --max_prompt_tokens 8192"):  # fmt: skip
        assert words in shown
    assert train.main(["--plan", "4", "--max_frames", "128"]) == 0  # 12,800 tokens; 80 frames are 8,096, 82 are 8,292
    shown = capsys.readouterr().out
    assert "prompts this long are SKIPPED: raise --max_prompt_tokens 8192" in shown
    assert shown.splitlines()[-3].endswith("most frames: 536 in this memory, 80 in --max_prompt_tokens")
    assert train.main(["--plan", "4", "--model", "no/such"]) == 2
    assert "--model no/such" in capsys.readouterr().err
    assert train.main(["--plan", "4", "--sequence_parallel", "4"]) == 0
    assert "4 to a copy, 4 to a prompt" in capsys.readouterr().out
    for more, reason in ((("--sequence_parallel", "3"), "the number of GPUs, 4"),
                         (("--plan", "8", "--sequence_parallel", "8"), "the model's 28 attention heads")):  # fmt: skip
        assert train.main(["--plan", "4", *more]) == 2
        assert reason in capsys.readouterr().err
    for size in ("3", "8"):  # what training itself refuses
        assert train.main(["--plan", "4", "--shard_size", size]) == 2
        assert f"--shard_size {size}: must divide the number of GPUs, 4" in capsys.readouterr().err


@pytest.mark.parametrize("family", FAMILIES)
def test_both_families_are_planned_from_config_alone(checkpoints, family):
    config = read_config(checkpoints[family])
    counts = parameter_counts(config)
    assert counts["all"] == sum(p.numel() for p in load_model(checkpoints[family]).parameters())
    assert memory_plan(config, counts, Config(nframes=8, max_pixels=28 * 28 * 4, plan=2))["peak"] > 0


def test_the_budget_of_a_whole_video_bounds_its_frames(monkeypatch):
    """--preset time-r1: 768 frames share 2,809,856 pixels x 2, but none has less than 1.05 x 12,544 pixels."""
    config = parse_config(["--preset", "time-r1", "--plan", "4"])
    text = plan_text(config)
    assert f"768 frames of {int(12544 * 1.05)} pixels" in text and " fits --gpu_memory 80" in text
    assert "SKIPPED" not in text
