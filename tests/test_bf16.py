"""What a GPU computes in, bf16, on the CPU: scores, sums and logits must not be rounded to 8 bits."""

import pytest
import torch
import torch.nn.functional as F
from conftest import load_pair, make_prompt

from demo.tiny import build_tiny_model
from grpo.model import decoder
from grpo.packing import pack
from grpo.sampler import SamplingSettings, sample

HEAD = 128
LARGE = {
    "hidden_size": 2 * HEAD, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 4,
    "rope_parameters": {"rope_type": "default", "type": "mrope", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
}  # fmt: skip


@pytest.fixture(scope="module")
def large_heads(tmp_path_factory):
    """A checkpoint whose heads are as large as those of Qwen2-VL-7B."""
    return build_tiny_model(tmp_path_factory.mktemp("bf16"), text=LARGE, vision={"hidden_size": 2 * HEAD}, seed=1)


def with_large_keys(model, norm):
    """Adds biases of that norm to the keys of the first and last layer, and of an eighth to the queries, along slowly
    rotating channels. Qwen2.5-7B's key biases have norms of 605 and 921 there, so its scores are in the thousands."""
    generator, slow = torch.Generator().manual_seed(3), torch.zeros(HEAD)
    slow[40:64] = slow[104:128] = 1
    layers = decoder(model).layers
    with torch.no_grad():
        for layer in (layers[0], layers[-1]):
            way = F.normalize(torch.randn(HEAD, generator=generator) * slow, dim=0)
            layer.self_attn.k_proj.bias.add_(norm * way)
            layer.self_attn.q_proj.bias.add_(norm / 8 * way.repeat(2))


@pytest.mark.parametrize("norm", [0, 150, 600, 1000])
def test_sampler_agrees_with_scorer_where_keys_are_large(large_heads, norm):
    policy, _, tokenizer = load_pair(large_heads)
    with_large_keys(policy.model, norm)
    policy = policy.bfloat16()
    prompts = [make_prompt(tokenizer, [("video", (8, 8, 12))], seed) for seed in (1, 2)]
    rollouts = sample(policy, prompts, 8, SamplingSettings(max_new_tokens=24), [1, 2], tokenizer)
    with torch.no_grad():
        scored, _ = policy(pack(prompts, [group.tokens for group in rollouts], policy.spec))
    seen = torch.cat([row for group in rollouts for row in group.logprobs])
    assert (scored - seen).abs().mean() < 0.1
