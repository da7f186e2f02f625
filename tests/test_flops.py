"""The arithmetic of a step: what it costs by torch's counter, against the least that it can cost."""

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig

spec = importlib.util.spec_from_file_location("bench_step", Path(__file__).parent.parent / "bench" / "step.py")
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)

IMAGES, COMPLETION = 3, 12


def count(folder, group, checkpointing="full"):
    """({phase: counted FLOPs}, {phase: least FLOPs counted alike}, the true least) of one step of this project."""
    case = bench.Case("tiny", IMAGES, group, COMPLETION)
    bench.make_inputs(folder, case)
    meter = bench.Meter()
    step = bench.ours(case, folder, meter, lambda *models: None, checkpointing)
    meter.begin(counting=True)
    sizes = step()
    _, counted, _ = meter.end()
    assert sizes["completion_tokens"] == group * COMPLETION
    frames = [4 * bench.VISUAL_TOKENS] * IMAGES
    shape = (AutoConfig.from_pretrained(folder), sizes["prompt_tokens"], frames, group, COMPLETION)
    return counted, bench.minimum_flops(*shape, as_counted=True), bench.minimum_flops(*shape)


@pytest.fixture(scope="module")
def counts(tmp_path_factory):
    """{G: `count` of a step of G completions}."""
    return {group: count(tmp_path_factory.mktemp("model"), group) for group in (2, 8, 32)}


@pytest.mark.parametrize("group", (2, 8, 32))
def test_a_step_costs_the_least(counts, group):
    """Sampling + reference + update, within 5% of one vision pass a model and P + G·C tokens; both sides count the
    whole square of a causal attention, as torch's counter does."""
    counted, least, _ = counts[group]
    assert sum(counted.values()) == pytest.approx(sum(least.values()), rel=0.05)


def test_a_completion_costs_its_own_tokens(counts):
    """From 2 to 32 completions the cost grows as their own tokens do: neither prompt nor vision is repeated."""
    measured = (sum(counts[32][0].values()) - sum(counts[2][0].values())) / 30
    own = (sum(counts[32][1].values()) - sum(counts[2][1].values())) / 30
    assert measured == pytest.approx(own, rel=0.15)
    for phase in ("vision", "prefill"):
        assert counts[32][0][phase] == counts[2][0][phase]


def test_selective_checkpointing_repeats_no_product(tmp_path):
    settings = ("full", "selective", "none")
    full, selective, none = (sum(count(tmp_path / name, 2, name)[0].values()) for name in settings)
    assert full > 1.05 * none and selective == none


def test_the_least_is_below_what_is_counted(counts):
    """The true minimum halves the masked squares; what the counter counts holds it and more."""
    for counted, alike, true in counts.values():
        assert 0.5 * sum(alike.values()) < sum(true.values()) < sum(alike.values())
        assert all(true[phase] <= alike[phase] for phase in true)


@pytest.mark.parametrize("keys", (24, 40))
@pytest.mark.parametrize("kv_heads", (2, 4))
def test_attention_is_counted_as_plain_products(keys, kv_heads):
    """SDPA's CPU kernel against the math kernel, whose products are matrix products that the counter sees one by one.
    The fused backward computes the scores once more: five products for the four of the math kernel."""
    query = torch.randn(2, 4, 24, 16, requires_grad=True)
    key, value = (torch.randn(2, kv_heads, keys, 16, requires_grad=True) for _ in range(2))
    totals = {}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
        with sdpa_kernel(backend):
            meter = bench.Meter()
            meter.begin(counting=True)
            meter.to("policy")
            out = F.scaled_dot_product_attention(query, key, value, enable_gqa=kv_heads < 4)
            meter.to("backward")
            out.sum().backward()
            totals[backend] = meter.end()[1]
    fused, plain = totals[SDPBackend.FLASH_ATTENTION], totals[SDPBackend.MATH]
    assert fused["policy"] == plain["policy"] == 4 * 2 * 4 * 24 * keys * 16
    assert fused["backward"] == plain["backward"] * 5 / 4
