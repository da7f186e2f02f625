"""The one idea: computing a prompt once per group gives the same log-probabilities and gradients as repeating it."""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import (
    PIXEL_FIELDS,
    PROMPT_KINDS,
    assert_close_to_scale,
    load_pair,
    make_prompt,
    naive_logprobs,
    random_completions,
)
from transformers import AutoProcessor

from demo.tiny import build_tiny_model
from grpo import attention
from grpo.batch import pack
from grpo.engine.model import checkpoint_activations, decoder, save_model, vision_tower
from grpo.positions import prompt_positions
from grpo.sampler import SamplingSettings, generate

LENGTHS = {"even": (5, 5, 5), "uneven": (1, 7, 3, 4)}


@pytest.mark.parametrize("kind", PROMPT_KINDS)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_packed_logprobs_equal_naive(tiny, kind, lengths):
    policy, naive, tokenizer = tiny
    prompt = make_prompt(tokenizer, PROMPT_KINDS[kind])
    completions = random_completions(tokenizer, lengths)
    logprobs, _ = policy(pack([prompt], [completions], policy.spec), temperature=0.7)
    expected = naive_logprobs(naive, policy.spec, prompt, completions, temperature=0.7)
    assert (logprobs - expected).abs().max() <= 2e-5


def test_several_prompts_in_one_row_equal_naive(tiny):
    policy, naive, tokenizer = tiny
    prompts = [
        make_prompt(tokenizer, kinds, seed=i, words="a b c"[: 1 + i]) for i, kinds in enumerate(PROMPT_KINDS.values())
    ]
    groups = [random_completions(tokenizer, (2 + i, 3), seed=i) for i in range(len(prompts))]
    logprobs, _ = policy(pack(prompts, groups, policy.spec))
    expected = torch.cat([naive_logprobs(naive, policy.spec, p, g) for p, g in zip(prompts, groups)])
    assert (logprobs - expected).abs().max() <= 2e-5


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal=False
):
    """What flash-attn documents (2.1 on): q (total, H, D), k and v (total, K, D), int32 cumulative lengths; a causal
    mask is aligned to the lower right. One sequence at a time, by explicit masks."""
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32 and all(x.is_contiguous() for x in (q, k, v))
    assert max_seqlen_q == cu_seqlens_q.diff().max() and max_seqlen_k == cu_seqlens_k.diff().max()
    repeats, outputs = q.shape[1] // k.shape[1], []
    for (a, b), (c, d) in zip(cu_seqlens_q.unfold(0, 2, 1).tolist(), cu_seqlens_k.unfold(0, 2, 1).tolist()):
        keys, values = (x[c:d].repeat_interleave(repeats, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[a:b], keys) * softmax_scale
        if causal:
            hidden = torch.arange(d - c) > torch.arange(b - a)[:, None] + (d - c) - (b - a)
            scores = scores.masked_fill(hidden, float("-inf"))
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
    assert len(q) == b and len(k) == d
    return torch.cat(outputs)


@pytest.mark.parametrize("kinds", [["video", "text"], ["two videos", "image"]])
def test_flash_attn_is_told_the_same(tiny, kinds, monkeypatch):
    """flash-attn itself needs a GPU; a stand-in of its documented meaning takes its place, for text and vision."""
    policy, _, tokenizer = tiny
    prompts = [make_prompt(tokenizer, PROMPT_KINDS[kind], seed=i) for i, kind in enumerate(kinds)]
    packed = pack(prompts, [random_completions(tokenizer, n) for n in ((1, 7, 3), (4, 4))], policy.spec)
    calls = []

    def kernel(*given, **named):
        calls.append(named.get("causal", False))
        return flash_attn_varlen_func(*given, **named)

    def outcome():
        policy.zero_grad()
        logprobs, _ = policy(packed)
        logprobs.sum().backward()
        return logprobs, {name: p.grad for name, p in policy.named_parameters()}

    expected, gradients = outcome()
    monkeypatch.setattr(attention, "flash_attention", kernel)
    monkeypatch.setattr(attention, "flash_fits", lambda query: True)
    logprobs, ours = outcome()
    assert calls.count(True) == len(decoder(policy.model).layers) and calls.count(False) == len(
        vision_tower(policy.model).blocks
    )
    assert (logprobs - expected).abs().max() <= 2e-5
    for name, gradient in gradients.items():
        assert_close_to_scale(ours[name], gradient, 1e-4, name)


@pytest.mark.parametrize("kind", ["video", "image", "two videos", "text"])
def test_packed_gradients_equal_naive(tiny, kind):
    policy, naive, tokenizer = tiny
    prompt = make_prompt(tokenizer, PROMPT_KINDS[kind])
    completions = random_completions(tokenizer, (1, 7, 3, 4))
    weights = torch.linspace(-1, 1, 15)
    logprobs, _ = policy(pack([prompt], [completions], policy.spec))
    (logprobs * weights).sum().backward()
    (naive_logprobs(naive, policy.spec, prompt, completions) * weights).sum().backward()
    compared = 0
    for (name, mine), (_, theirs) in zip(policy.model.named_parameters(), naive.named_parameters(), strict=True):
        if theirs.grad is None:
            assert mine.grad is None, name
            continue
        assert_close_to_scale(mine.grad, theirs.grad, 1e-4, name)
        compared += 1
    assert compared > 20


@pytest.mark.parametrize("vision", [True, False], ids=["trained tower", "frozen tower"])
@pytest.mark.parametrize("kind", ["two videos", "text"])
def test_checkpointing_changes_no_bit_of_the_gradients(tiny, kind, vision):
    """Neither recomputing all activations nor all but products and attention: two prompts and their uneven groups."""
    policy, _, tokenizer = tiny
    vision_tower(policy.model).requires_grad_(vision)
    prompts = [make_prompt(tokenizer, PROMPT_KINDS[each], seed=i) for i, each in enumerate((kind, "text"))]
    packed = pack(prompts, [random_completions(tokenizer, n) for n in ((1, 7, 3, 4), (2, 2))], policy.spec)

    def gradients(policy):
        policy(packed)[0].square().sum().backward()
        return {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}

    plain, full, selective = policy, copy.deepcopy(policy), copy.deepcopy(policy)
    checkpoint_activations(full.model, vision=vision)
    checkpoint_activations(selective.model, selective=True, vision=vision)
    expected = gradients(plain)
    assert len(expected) > 20
    for other in map(gradients, (full, selective)):
        assert other.keys() == expected.keys()
        assert [name for name, gradient in expected.items() if not torch.equal(other[name], gradient)] == []


def test_a_copy_of_a_checkpointed_model_runs_its_own_blocks(tiny):
    """Sampling beside a sharded policy runs on such a copy."""
    policy, _, tokenizer = tiny
    checkpoint_activations(policy.model)
    twin = copy.deepcopy(policy)
    for layer in decoder(twin.model).layers:
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    packed = pack([make_prompt(tokenizer, PROMPT_KINDS["text"])], [random_completions(tokenizer, (3,))], policy.spec)
    with torch.no_grad():
        assert (policy(packed)[0] - twin(packed)[0]).abs().max() > 1e-3


def test_chunked_logits_equal_whole(tiny_vl, monkeypatch):
    policy, _, tokenizer = tiny_vl
    packed = pack([make_prompt(tokenizer, PROMPT_KINDS["video"])], [random_completions(tokenizer, (5, 6))], policy.spec)
    whole, entropy = policy(packed)
    gradient = torch.autograd.grad(whole.sum(), policy.model.lm_head.weight)[0]
    monkeypatch.setattr("grpo.policy.LOGITS_PER_CHUNK", 3 * policy.model.lm_head.weight.shape[0])
    chunked, chunked_entropy = policy(packed)
    torch.testing.assert_close(chunked, whole, atol=1e-5, rtol=0)
    torch.testing.assert_close(chunked_entropy, entropy, atol=1e-5, rtol=0)
    assert_close_to_scale(torch.autograd.grad(chunked.sum(), policy.model.lm_head.weight)[0], gradient, 1e-5)


def test_whole_logits_are_never_alive(tiny_vl, monkeypatch):
    """lm_head must run on completion positions only, a chunk at a time."""
    policy, _, tokenizer = tiny_vl
    monkeypatch.setattr("grpo.policy.LOGITS_PER_CHUNK", 4 * policy.model.lm_head.weight.shape[0])
    rows = []
    policy.model.lm_head.register_forward_hook(lambda module, args, out: rows.append(args[0].shape[0]))
    policy(pack([make_prompt(tokenizer, PROMPT_KINDS["video"])], [random_completions(tokenizer, (5, 6))], policy.spec))
    assert rows == [4, 4, 3]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampler_logprobs_equal_scorer(tiny, temperature):
    """Prompts of different kinds and lengths in one batch, rows that end at different times."""
    policy, _, tokenizer = tiny
    prompts = [
        make_prompt(tokenizer, kinds, seed=i, words="move " * (i + 1)) for i, kinds in enumerate(PROMPT_KINDS.values())
    ]
    settings = SamplingSettings(temperature=temperature, max_new_tokens=40)
    policy.spec = spec_with_frequent_eos(policy.spec)
    groups = generate(policy, prompts, 4, settings, list(range(len(prompts))), tokenizer)
    lengths = [n for group in groups for n in group.lengths]
    assert len(set(lengths)) > 5, "the test wants rows that end at different times"
    logprobs, _ = policy(pack(prompts, [group.tokens for group in groups], policy.spec), temperature=temperature)
    seen = torch.cat([row for group in groups for row in group.logprobs])
    assert (logprobs - seen).abs().max() <= 1e-5


def spec_with_frequent_eos(spec):
    """A random model hardly ever ends: let a twelfth of the vocabulary be EOS."""
    return replace(spec, eos_ids=tuple(range(0, 390, 12)))


def test_finished_rows_cost_nothing_more(tiny_vl):
    policy, _, tokenizer = tiny_vl
    policy.spec = spec_with_frequent_eos(policy.spec)
    rows = []
    decode = policy.decode
    policy.decode = lambda tokens, positions, layout: (rows.append(len(tokens)), decode(tokens, positions, layout))[1]
    prompts = [make_prompt(tokenizer, PROMPT_KINDS["video"], seed=i) for i in range(3)]
    groups = generate(policy, prompts, 4, SamplingSettings(max_new_tokens=60), [5, 6, 7], tokenizer)
    # The first token of a row comes from the prefill; each further one costs one decoded row, and no more.
    assert sum(rows) == sum(n - 1 for group in groups for n in group.lengths)


@pytest.mark.parametrize("kind", PROMPT_KINDS)
def test_greedy_equals_generate(tiny, kind):
    """Token for token against transformers' generate, which continues from the largest position, as the trained rule
    does. generate computes the prompt's positions itself, so it is handed ours where the two rules differ."""
    policy, naive, tokenizer = tiny
    prompt = make_prompt(tokenizer, PROMPT_KINDS[kind])
    (group,) = generate(policy, [prompt], 1, SamplingSettings(temperature=0, max_new_tokens=30), [0], tokenizer)
    assert group.tokens[0].tolist() == greedy_reference(naive, policy.spec, prompt, 30)


def greedy_reference(model, spec, prompt, count):
    positions, first = prompt_positions(prompt, spec)
    model.model.rope_deltas = None
    # Both sides get the same explicit positions: the rule of transformers 5 is what test_positions is about.
    model.model.get_rope_index = lambda *a, **k: (positions[:, None], torch.tensor([[first - len(prompt.input_ids)]]))
    types = torch.zeros_like(prompt.input_ids)
    types[prompt.input_ids == spec.image_token_id] = 1
    types[prompt.input_ids == spec.video_token_id] = 2
    out = model.generate(
        input_ids=prompt.input_ids[None], attention_mask=torch.ones_like(prompt.input_ids)[None],
        mm_token_type_ids=types[None],
        **{name: value for name in PIXEL_FIELDS if (value := getattr(prompt, name)) is not None},
        max_new_tokens=count, do_sample=False, eos_token_id=list(spec.eos_ids),
        suppress_tokens=list(spec.never_sampled),
    )  # fmt: skip
    return out[0, len(prompt.input_ids) :].tolist()


def test_a_changed_video_changes_the_logprobs(tiny):
    """Pixels must reach the scorer."""
    policy, _, tokenizer = tiny
    prompt, other = (make_prompt(tokenizer, PROMPT_KINDS["video"], seed=s) for s in (0, 1))
    completions = random_completions(tokenizer, (5, 6))
    a, b = (policy(pack([p], [completions], policy.spec))[0] for p in (prompt, other))
    assert (a - b).abs().max() > 1e-2


def test_pixels_follow_their_prompt(tiny):
    """Two prompts with their videos swapped must not score as before."""
    policy, _, tokenizer = tiny
    prompts = [make_prompt(tokenizer, PROMPT_KINDS["video"], seed=s) for s in (0, 1)]
    groups = [random_completions(tokenizer, (4, 2), seed=s) for s in (0, 1)]
    together = policy(pack(prompts, groups, policy.spec))[0]
    alone = torch.cat([policy(pack([p], [g], policy.spec))[0] for p, g in zip(prompts, groups)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_one_vision_pass_and_one_prompt_pass_per_group(tiny_vl):
    """What goes through tower and decoder is 1 video and P + G·C tokens, in scoring and in sampling."""
    policy, _, tokenizer = tiny_vl
    patches, tokens = [], []
    policy.model.model.visual.register_forward_hook(
        lambda m, args, kw, out: patches.append(args[0].shape[0]), with_kwargs=True
    )
    policy.model.model.language_model.layers[0].register_forward_pre_hook(
        lambda m, args: tokens.append(args[0].shape[0] * args[0].shape[1])
    )
    prompt = make_prompt(tokenizer, PROMPT_KINDS["video"])
    size = len(prompt.input_ids)
    policy(pack([prompt], [random_completions(tokenizer, (5,) * 8)], policy.spec))
    assert (patches, tokens) == ([96], [size + 40])
    patches.clear(), tokens.clear()
    (group,) = generate(policy, [prompt], 8, SamplingSettings(max_new_tokens=5), [0], tokenizer)
    assert (patches, sum(tokens)) == ([96], size + sum(n - 1 for n in group.lengths))


@pytest.mark.parametrize("tie", [False, True])
def test_save_and_load_keep_the_logprobs(tmp_path, tie):
    """Tied and untied embeddings."""
    policy, _, tokenizer = load_pair(build_tiny_model(tmp_path / "a", tie=tie))
    packed = pack([make_prompt(tokenizer, PROMPT_KINDS["video"])], [random_completions(tokenizer, (5, 6))], policy.spec)
    with torch.no_grad():
        policy.model.model.language_model.embed_tokens.weight.mul_(1.1)
        before = policy(packed)[0]
        save_model(policy.model, AutoProcessor.from_pretrained(tmp_path / "a"), tmp_path / "b")
        after = load_pair(tmp_path / "b")[0](packed)[0]
    assert torch.equal(before, after)
    assert (policy.model.lm_head.weight is policy.model.model.language_model.embed_tokens.weight) == tie
