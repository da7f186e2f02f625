"""What a GPU computes in, bf16, on the CPU: scores, sums and logits must not be rounded to 8 bits."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from bf16_update import first_moments
from conftest import assert_close_to_scale, load_pair, make_prompt, naive_logits
from processes import finish, start_command
from test_memory import one_process_mesh

from demo.tiny import build_tiny_model
from grpo.batch import pack
from grpo.engine import distributed
from grpo.engine.model import decoder
from grpo.sampler import SamplingSettings, generate

HEAD = 128
LARGE = {
    "hidden_size": 2 * HEAD, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 4,
    "rope_parameters": {"rope_type": "default", "type": "mrope", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
}  # fmt: skip


@pytest.fixture(scope="module")
def large_heads(tmp_path_factory):
    """A checkpoint whose heads are as large as those of Qwen2-VL-7B."""
    return build_tiny_model(tmp_path_factory.mktemp("bf16"), text=LARGE, vision={"hidden_size": 2 * HEAD}, seed=1)


def large_keys(folder, norm):
    """(policy, naive model, tokenizer) in bf16; no completion ends by itself.

    The keys of the first and last layer have biases of that norm, queries an eighth of it, along slowly rotating
    channels. Qwen2.5-7B's key biases have norms of 605 and 921 there, so its scores are in the thousands.
    """
    policy, naive, tokenizer = load_pair(folder, torch.bfloat16)
    generator, slow = torch.Generator().manual_seed(3), torch.zeros(HEAD)
    slow[40:64] = slow[104:128] = 1
    ways = [F.normalize(torch.randn(HEAD, generator=generator) * slow, dim=0) for _ in range(2)]
    with torch.no_grad():
        for model in (policy.model, naive):
            for layer, way in zip((decoder(model).layers[0], decoder(model).layers[-1]), ways):
                layer.self_attn.k_proj.bias.add_(norm * way)
                layer.self_attn.q_proj.bias.add_(norm / 8 * way.repeat(2))
    policy.spec = replace(policy.spec, eos_ids=policy.spec.never_sampled[:1])
    return policy, naive, tokenizer


@pytest.mark.parametrize("norm", [0, 150, 600, 1000])
def test_sampler_agrees_with_scorer(large_heads, norm):
    policy, _, tokenizer = large_keys(large_heads, norm)
    prompts = [make_prompt(tokenizer, [("video", (8, 8, 12))], seed) for seed in (1, 2)]
    groups = generate(policy, prompts, 8, SamplingSettings(max_new_tokens=24), [1, 2], tokenizer)
    with torch.no_grad():
        scored, _ = policy(pack(prompts, [group.tokens for group in groups], policy.spec))
    seen = torch.cat([row for group in groups for row in group.logprobs])
    assert (scored - seen).abs().mean() < 0.1


@pytest.mark.parametrize("norm", [600, 1000])
def test_greedy_decoding_follows_a_forward_with_scores_in_fp32(large_heads, norm):
    """At each of 200 tokens, the token that transformers' forward thinks most likely, on 95% of them: its attention on
    a CPU keeps scores in fp32."""
    policy, naive, tokenizer = large_keys(large_heads, norm)
    prompts = [make_prompt(tokenizer, [("video", (4, 4, 6))], seed) for seed in range(8)]
    groups = generate(policy, prompts, 1, SamplingSettings(0, max_new_tokens=25), range(8), tokenizer)
    equal = []
    for group in groups:
        with torch.no_grad():
            logits = naive_logits(naive, policy.spec, group.prompt, group.tokens[0])
        equal += (logits.gather(-1, group.tokens[0][:, None])[:, 0] == logits.amax(-1)).tolist()
    assert len(equal) == 200 and sum(equal) >= 190


@pytest.mark.slow
def test_two_ranks_of_mixed_precision_equal_one(checkpoints, tmp_path, monkeypatch):
    """Weights gathered in bf16, gradients reduced in fp32: moments of 2 ranks are those of 1 to the rounding of
    fp32, and those of a run in fp32 to the rounding of bf16. One prompt is text alone."""
    folder = checkpoints["qwen2_vl"]
    exact, expected = first_moments(folder, torch.device("cpu"))
    monkeypatch.setattr(distributed, "compute_dtype", lambda device: torch.bfloat16)
    metrics, alone = first_moments(folder, *one_process_mesh())
    distributed.stop()
    script = Path(__file__).with_name("bf16_update.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script, folder]
    finish(start_command([*command, tmp_path / "two.pt"]))
    counted, together = torch.load(tmp_path / "two.pt")
    for name, moment in together.items():
        assert_close_to_scale(moment, alone[name], 1e-5)
        assert_close_to_scale(alone[name], expected[name], 0.1)
    for name, value in counted.items():
        assert value == pytest.approx(metrics[name], rel=1e-5, abs=1e-7)
        assert value == pytest.approx(exact[name], rel=0.02, abs=1e-3)
