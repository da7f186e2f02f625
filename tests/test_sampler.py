"""Choosing tokens: distributions, truncation, seeds, endings, and what must never be sampled."""

from dataclasses import replace

import pytest
import torch
from conftest import PROMPT_KINDS, make_prompt, random_completions

from grpo import sampler
from grpo.batch import pack
from grpo.sampler import SamplingSettings, generate, prompt_seed, sample_next_token, truncate, uniforms


def test_inverse_of_the_cumulative_distribution():
    """Probabilities 0.2, 0, 0.5, 0.3: u < 0.2 is token 0, u < 0.7 token 2, else token 3; token 1 never."""
    logits = torch.tensor([0.2, 0.0, 0.5, 0.3]).log()
    for u, token in ((0.0, 0), (0.19, 0), (0.21, 2), (0.69, 2), (0.71, 3), (1 - 1e-16, 3)):
        tokens, logprobs = sample_next_token(logits[None], torch.tensor([u], dtype=torch.float64), SamplingSettings())
        assert tokens.item() == token
        assert logprobs.item() == pytest.approx(logits[token].item())


def test_frequencies_follow_the_temperature():
    logits = torch.tensor([[1.0, 0.0, -1.0]]).expand(20000, -1)
    u = torch.rand(20000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens, _ = sample_next_token(logits, u, SamplingSettings(temperature=0.5))
    expected = (logits[0] / 0.5).softmax(-1)
    assert (torch.bincount(tokens, minlength=3) / 20000 - expected).abs().max() < 0.01


def test_truncation_by_hand():
    logprobs = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).log()
    kept = lambda k, p: torch.isfinite(truncate(logprobs, k, p))[0].nonzero()[:, 0].tolist()
    assert kept(0, 1.0) == [0, 1, 2, 3]
    assert kept(2, 1.0) == [1, 3]
    assert kept(0, 0.6) == [1, 3]  # 0.5 does not reach 0.6, 0.75 does
    assert kept(0, 0.5) == [1]
    assert kept(0, 0.01) == [1]  # the likeliest token always stays
    assert kept(3, 0.9) == [1, 2, 3]


def test_seed_depends_on_run_step_and_prompt_alone():
    seeds = {prompt_seed(r, s, k) for r in (0, 1) for s in (0, 1, 11) for k in ("a:1", "a:11")}
    assert len(seeds) == 12 and prompt_seed(0, 1, "a:1") == prompt_seed(0, 1, "a:1")
    assert torch.equal(uniforms([5, 6], 2, 3)[2:], uniforms([6], 2, 3))


def test_completions_do_not_depend_on_the_batch(tiny):
    """The same prompt alone, among others, and in another order gives the same completions, all of them different."""
    policy, _, tokenizer = tiny
    prompts = [make_prompt(tokenizer, kinds, seed=i) for i, kinds in enumerate(PROMPT_KINDS.values())]
    settings = SamplingSettings(max_new_tokens=12)
    run = lambda order: generate(policy, [prompts[i] for i in order], 3, settings, [100 + i for i in order], tokenizer)
    tokens = lambda groups: [[t.tolist() for t in group.tokens] for group in groups]
    together, alone = tokens(run([0, 1, 2, 3])), [tokens(run([i]))[0] for i in range(4)]
    assert together == alone
    assert tokens(run([3, 1]))[1] == alone[1]
    assert len({tuple(t) for group in together for t in group}) == 12, "identical completions carry no signal"


def test_generation_config_is_ignored(tiny_vl):
    """top_k 1 and temperature .01 there would make all completions equal."""
    policy, _, tokenizer = tiny_vl
    prompt, settings = make_prompt(tokenizer, PROMPT_KINDS["video"]), SamplingSettings(max_new_tokens=6)
    before = generate(policy, [prompt], 4, settings, [0], tokenizer)[0].tokens
    policy.model.generation_config.update(top_k=1, temperature=0.01, do_sample=False, repetition_penalty=5.0)
    after = generate(policy, [prompt], 4, settings, [0], tokenizer)[0].tokens
    assert all(torch.equal(a, b) for a, b in zip(before, after))


def test_any_eos_ends_a_row_and_is_trained(tiny_vl):
    """Both ids end a completion, which keeps that one EOS and nothing after it."""
    policy, _, tokenizer = tiny_vl
    assert set(policy.spec.eos_ids) == {tokenizer.eos_token_id, tokenizer.pad_token_id}
    policy.spec = replace(policy.spec, eos_ids=tuple(range(0, 390, 9)))
    prompt = make_prompt(tokenizer, PROMPT_KINDS["text"])
    (group,) = generate(policy, [prompt], 16, SamplingSettings(max_new_tokens=9), [3], tokenizer)
    assert {True, False} == set(group.finished)
    for tokens, finished in zip(group.tokens, group.finished):
        ends = [token.item() in policy.spec.eos_ids for token in tokens]
        assert ends == [False] * (len(tokens) - 1) + [finished]
        assert finished or len(tokens) == 9


def test_vision_tokens_are_never_sampled_and_masked_alike(tiny):
    """The head is bent so that placeholders would be nearly certain."""
    policy, _, tokenizer = tiny
    forbidden = list(policy.spec.never_sampled)
    names = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>")
    assert set(forbidden) == set(tokenizer.convert_tokens_to_ids(list(names)))
    prompt = make_prompt(tokenizer, PROMPT_KINDS["video"])
    with torch.no_grad():
        policy.model.lm_head.weight[forbidden] = 50 * policy.model.lm_head.weight[0]
    for settings in (SamplingSettings(max_new_tokens=8), SamplingSettings(temperature=0, max_new_tokens=8)):
        (group,) = generate(policy, [prompt], 4, settings, [0], tokenizer)
        assert not set(torch.cat(group.tokens).tolist()) & set(forbidden)
    completions = random_completions(tokenizer, (4,))
    logprobs, _ = policy(pack([prompt], [completions], policy.spec))
    assert logprobs.isfinite().all()
    allowed = [torch.tensor([i]) for i in range(len(tokenizer)) if i not in forbidden]
    total = policy(pack([prompt], [allowed], policy.spec))[0].exp().sum()
    assert total.item() == pytest.approx(1.0, abs=1e-4), "probabilities of what may be sampled sum to one"


def test_text_leaves_out_only_the_eos(tiny_vl):
    policy, _, tokenizer = tiny_vl
    prompt = make_prompt(tokenizer, PROMPT_KINDS["text"])
    (group,) = generate(policy, [prompt], 4, SamplingSettings(max_new_tokens=5), [0], tokenizer)
    assert group.prompt is prompt
    for text, tokens, finished in zip(group.texts, group.tokens, group.finished):
        assert text == tokenizer.decode(tokens[: len(tokens) - finished])


@pytest.mark.parametrize("look", [1, 3])
def test_a_gpu_decodes_the_same_with_static_shapes_and_few_looks(tiny_vl, monkeypatch, look):
    """The loop as a GPU runs it: rows that have ended decode on until it looks, whole buffers are attended to, and
    rows leave by halves. The step is not recorded here: a CPU has no graphs."""
    policy, _, tokenizer = tiny_vl
    policy.spec = replace(policy.spec, eos_ids=tuple(range(0, 390, 9)))
    prompts = [make_prompt(tokenizer, kinds, seed=i) for i, kinds in enumerate(PROMPT_KINDS.values())]
    run = lambda settings: generate(policy, prompts, 6, settings, list(range(len(prompts))), tokenizer)
    expected = run(SamplingSettings(max_new_tokens=17))
    monkeypatch.setattr(sampler, "LOOK_EVERY", look)
    monkeypatch.setattr(sampler.Decoding, "advance", lambda decoding, graph: decoding.step())
    monkeypatch.setattr(sampler, "on_gpu", lambda policy: True)
    steps = []
    decode = policy.decode
    monkeypatch.setattr(policy, "decode", lambda tokens, *given: steps.append(len(tokens)) or decode(tokens, *given))
    for names in (set(), {"decoding graph"}):
        monkeypatch.setattr(sampler, "IN_USE", names)
        for ours, theirs in zip(run(SamplingSettings(max_new_tokens=17)), expected):
            assert [t.tolist() for t in ours.tokens] == [t.tolist() for t in theirs.tokens]
            assert ours.finished == theirs.finished and ours.texts == theirs.texts
            gaps = [(a - b).abs().max() for a, b in zip(ours.logprobs, theirs.logprobs)]
            assert max(gaps) < 2e-5
    assert min(steps) <= steps[0] / 2, "rows that have ended leave by halves"
