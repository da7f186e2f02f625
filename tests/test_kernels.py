"""Faster kernels for what transformers' modules compute: the same numbers and gradients, in both families."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    FAMILIES,
    PROMPT_KINDS,
    assert_close_to_scale,
    load_pair,
    make_prompt,
    naive_logprobs,
    random_completions,
)  # fmt: skip

from grpo.attention import IN_USE, batched_vision_attention, register
from grpo.batch import pack
from grpo.engine import model
from grpo.engine.model import BLOCK, checkpoint_activations, decoder, few_rows, vision_tower
from grpo.sampler import SamplingSettings, generate


@pytest.mark.parametrize("family", FAMILIES)
def test_patches_are_embedded_as_the_convolution_does(checkpoints, family):
    policy, naive, _ = load_pair(checkpoints[family])
    ours, theirs = vision_tower(policy.model).patch_embed, vision_tower(naive).patch_embed
    results = []
    for embed in (ours, theirs):
        size = policy.spec.patch_values
        patches = torch.randn(64, size, generator=torch.Generator().manual_seed(0), requires_grad=True)
        out = embed(patches)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        results.append((out, patches.grad, embed.proj.weight.grad))
    for mine, expected in zip(*results, strict=True):
        assert_close_to_scale(mine, expected, 1e-5)
    assert list(ours.state_dict()) == list(theirs.state_dict()) and ours.proj.weight.dim() == 5


def test_a_copy_of_the_model_computes_with_its_own_weights(tiny):
    """Sampling beside a sharded policy runs on such a copy."""
    policy, _, _ = tiny
    checkpoint_activations(policy.model)
    twin, patches = copy.deepcopy(policy.model), torch.ones(4, policy.spec.patch_values)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    for copied, parts in ((True, twin.model), (False, policy.model.model)):
        assert bool(parts.visual.patch_embed(patches).any()) != copied
        assert bool(parts.language_model.norm(torch.ones(1, 1, 64)).any()) != copied


def loss_and_gradients(policy, packed):
    policy.zero_grad()
    logprobs, _ = policy(packed)
    (logprobs * torch.linspace(-1, 1, len(logprobs))).sum().backward()
    return logprobs.detach(), {name: p.grad for name, p in policy.named_parameters()}


@pytest.fixture
def fused():
    """Puts fused norms in use, or out of it."""
    yield lambda on: (IN_USE.add if on else IN_USE.discard)("fused norms")
    IN_USE.clear()


def test_fused_norms_give_the_same_numbers(tiny, fused, monkeypatch):
    """In fp32, to rounding; out of use, they are transformers' own again."""
    policy, _, tokenizer = tiny
    norms = [m for m in policy.modules() if type(m).__name__.endswith("RMSNorm")]
    for norm in norms:
        torch.nn.init.uniform_(norm.weight, 0.5, 2)
    packed = pack([make_prompt(tokenizer, PROMPT_KINDS["video"])], [random_completions(tokenizer, (5, 6))], policy.spec)
    calls, kernel = [], F.rms_norm
    monkeypatch.setattr(F, "rms_norm", lambda *given: (calls.append(1), kernel(*given))[1])
    expected, gradients = loss_and_gradients(policy, packed)
    assert not calls
    fused(True)
    logprobs, ours = loss_and_gradients(policy, packed)
    assert len(calls) == len(norms)
    assert (logprobs - expected).abs().max() <= 1e-5
    for name, gradient in gradients.items():
        assert_close_to_scale(ours[name], gradient, 1e-4)
    fused(False)
    assert torch.equal(loss_and_gradients(policy, packed)[0], expected)


def test_a_fused_norm_in_bf16_rounds_once(tiny_vl, fused):
    """Nearer to the norm in fp32 than transformers', which rounds before and after the product with the weight."""
    policy, _, _ = tiny_vl
    norm = policy.model.model.language_model.norm
    torch.nn.init.uniform_(norm.weight, 0.5, 2)
    hidden = (3 * torch.randn(200, 64)).bfloat16()
    norm.bfloat16()
    exact = F.rms_norm(hidden.double(), (64,), norm.weight.double(), norm.variance_epsilon)
    plain = norm(hidden)
    fused(True)
    ours = norm(hidden)
    assert ours.dtype == plain.dtype == torch.bfloat16
    torch.testing.assert_close(ours.double(), exact, rtol=2**-8, atol=0)  # half a step of bf16
    torch.testing.assert_close(plain.double(), exact, rtol=2**-7, atol=0)
    assert (ours - exact).abs().mean() < (plain - exact).abs().mean()


WINDOWS = {
    "frames": ([6, 6, 6], 1),
    "two videos": ([6, 6, 4, 4], 2),
    "windows": ([4, 4, 2, 4, 4, 2, 2, 2, 1, 4, 4, 2], 3),
}


@pytest.mark.parametrize("lengths, calls", WINDOWS.values(), ids=WINDOWS)
def test_segments_of_one_length_are_one_call(lengths, calls, monkeypatch):
    """Equal to attention one segment at a time, gradients included, at one kernel for each length."""
    total, ends = sum(lengths), torch.tensor([0, *lengths]).cumsum(0).int()
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, 3, total, 8, generator=generator, requires_grad=True) for _ in range(3)]
    weight = torch.randn(1, total, 3, 8, generator=generator)
    segments = zip(*(x.split(lengths, dim=2) for x in inputs))
    expected = torch.cat([F.scaled_dot_product_attention(*part, scale=0.3) for part in segments], 2).transpose(1, 2)
    gradients = torch.autograd.grad((expected * weight).sum(), inputs)

    made, kernel = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: (made.append(1), kernel(*a, **k))[1])
    for _ in range(2):  # the second block of a forward is handed the same lengths
        made.clear()
        out, _ = batched_vision_attention(
            None, *inputs, None, scaling=0.3, cu_seq_lens_q=ends, max_length_q=max(lengths)
        )
        assert len(made) == calls
        torch.testing.assert_close(out, expected, atol=1e-6, rtol=0)
        ours = torch.autograd.grad((out * weight).sum(), inputs)
        for mine, theirs in zip(ours, gradients, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)


def test_placeholders_are_where_the_features_go(tiny):
    """Each feature replaces the embedding at its placeholder, in the order of the row, and gets that gradient."""
    policy, _, tokenizer = tiny
    kinds = ("text", "image and video", "video")
    prompts = [make_prompt(tokenizer, PROMPT_KINDS[kind], seed=i) for i, kind in enumerate(kinds)]
    batch = pack(prompts, [random_completions(tokenizer, (3, 2))] * 3, policy.spec)
    ids, spec = batch.input_ids[0].tolist(), policy.spec
    here = [at for at, token in enumerate(ids) if token in (spec.image_token_id, spec.video_token_id)]
    assert batch.placeholders.tolist() == here
    seen = []

    def keep(module, given, named):
        seen.append(named["inputs_embeds"])
        seen[0].retain_grad()

    decoder(policy.model).register_forward_pre_hook(keep, with_kwargs=True)
    embedding = policy.model.get_input_embeddings()
    hidden = embedding.weight.shape[1]
    batch.features = torch.randn(len(here), policy.spec.feature_width, requires_grad=True)
    policy(batch)[0].sum().backward()
    (embeds,) = seen
    others = [at for at in range(len(ids)) if at not in here]
    assert torch.equal(embeds[0, here], batch.features[:, :hidden])
    assert torch.equal(embeds[0, others], embedding(batch.input_ids)[0, others])
    assert torch.equal(batch.features.grad[:, :hidden], embeds.grad[0, here])
    assert batch.features.grad.unflatten(1, (-1, hidden)).any(dim=-1).all(), "of DeepStack's features too"
    table = embedding.weight.grad
    assert table[spec.video_token_id].abs().max() == 0 < table[ids[0]].abs().max()


def test_cudnn_never_attends():
    """On Hopper and newer torch prefers it, and it plans anew for every prompt length."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    register()
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_few_rows_give_the_same_numbers(monkeypatch):
    """By blocks of the weight for 3 to 8 rows without a gradient, else as one product."""
    calls, matmul = [], torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda *given: calls.append(1) or matmul(*given))
    torch.manual_seed(0)
    for bias in (True, False):
        layer = torch.nn.Linear(96, 3 * BLOCK, bias=bias)
        for rows in (1, 2, 3, 8, 9):
            hidden = torch.randn(rows, 1, 96)
            calls.clear()
            with torch.no_grad():
                ours = few_rows(layer, hidden)
            assert len(calls) == (3 <= rows <= 8)
            torch.testing.assert_close(ours, layer(hidden), rtol=1e-5, atol=1e-6)
            assert few_rows(layer, hidden).requires_grad and len(calls) == (3 <= rows <= 8)
    odd, half = torch.nn.Linear(96, BLOCK + 1), torch.nn.Linear(96, BLOCK).bfloat16()
    calls.clear()
    with torch.no_grad():
        assert torch.equal(few_rows(odd, hidden[:4]), odd(hidden[:4]))
        assert torch.equal(few_rows(half, hidden[:4].bfloat16()), half(hidden[:4].bfloat16()))
    assert not calls


def test_a_model_with_large_weights_decodes_few_rows_by_blocks(checkpoints, monkeypatch):
    monkeypatch.setattr(model, "LARGE", 1)
    policy, naive, tokenizer = load_pair(checkpoints["qwen2_vl"])
    shapes, matmul = set(), torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda *given: shapes.add(tuple(given[1].shape)) or matmul(*given))
    prompt, settings = make_prompt(tokenizer, PROMPT_KINDS["video"]), SamplingSettings(max_new_tokens=8)
    (group,) = generate(policy, [prompt], 4, settings, [0], tokenizer)
    assert {shape[0] for shape in shapes if shape[-1] == BLOCK} >= {1, 2, 4}  # blocks of keys, queries, MLP
    with torch.no_grad():
        scored = naive_logprobs(naive, policy.spec, prompt, group.tokens)
    torch.testing.assert_close(torch.cat(group.logprobs), scored, rtol=0, atol=1e-5)
