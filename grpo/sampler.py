"""Samples groups of completions: one vision pass and one prefill a prompt, then rows decode together.

Every completion's randomness is drawn beforehand from (run seed, step, prompt): one uniform number a token, turned into
a token by inverting the cumulative distribution. So a completion does not depend on which other prompts share its
batch, on the order of rows, or on the number of processes.
"""

import hashlib
from dataclasses import dataclass

import torch

from grpo.attention import DecodeLayout
from grpo.packing import pack
from grpo.types import Rollout


@dataclass(frozen=True)
class SamplingSettings:
    """temperature 0 is greedy. top_k 0 and top_p 1 are off; where on, sampling leaves the distribution whose
    log-probabilities are returned and trained (the whole vocabulary at this temperature)."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 256


def prompt_seed(run_seed, step, key):
    """A 63-bit seed that depends on the run's seed, the step and the prompt alone."""
    digest = hashlib.sha256(f"{run_seed}/{step}/{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def uniforms(seeds, group, count):
    """(len(seeds)·group, count) numbers in [0, 1), each prompt's from its own generator."""
    draws = [torch.rand(group, count, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in seeds]
    return torch.cat(draws)


def truncate(logprobs, top_k, top_p):
    """logprobs (R, V) with what top-k and nucleus sampling exclude set to -inf (Holtzman et al. 2020, eq. 2-3)."""
    if top_k:
        least = logprobs.topk(min(top_k, logprobs.shape[-1]), dim=-1).values[:, -1:]
        logprobs = logprobs.masked_fill(logprobs < least, float("-inf"))
    if top_p < 1.0:
        ordered, order = logprobs.sort(dim=-1, descending=True)
        probs = ordered.softmax(-1)
        beyond = probs.cumsum(-1) - probs >= top_p  # the most likely token always stays
        logprobs = logprobs.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), float("-inf"))
    return logprobs


def choose(logits, uniform, settings):
    """logits (R, V) and uniform (R,) in [0, 1) -> (tokens (R,), their logprobs (R,) at the temperature)."""
    greedy = settings.temperature == 0
    logprobs = (logits if greedy else logits / settings.temperature).log_softmax(-1)
    if greedy:
        tokens = logits.argmax(-1)
    else:
        cumulative = truncate(logprobs, settings.top_k, settings.top_p).double().exp().cumsum(-1)
        # The first token whose cumulative probability exceeds u: a token of probability 0 is never that.
        threshold = uniform.to(logits.device)[:, None] * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, threshold, right=True)[:, 0]
        tokens = tokens.clamp(max=logits.shape[-1] - 1)  # beyond only where logits are NaN, which `sample` reports
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]


@torch.no_grad()
def sample(policy, prompts, group, settings, seeds, tokenizer, features=None):
    """Returns one `Rollout` of `group` completions for each prompt.

    prompts: B `video.prompt.Prompt`; seeds: B ints (see `prompt_seed`). A row ends with the first of the model's EOS
    ids or after max_new_tokens; rows that have ended are dropped and cost nothing more. Raises FloatingPointError where
    the model's logits are not finite.
    """
    device, count = policy.device, len(prompts) * group
    packed = pack(prompts, [[] for _ in prompts], policy.spec).to(device)
    logits, prompt_kv = policy.prefill(packed, features)
    draws = uniforms(seeds, group, settings.max_new_tokens).to(device)
    prompt_of_row = torch.arange(len(prompts), device=device).repeat_interleave(group)
    eos = torch.tensor(policy.spec.eos_ids, device=device)
    layout = DecodeLayout(prompt_kv, prompt_of_row, settings.max_new_tokens)
    del prompt_kv

    positions = packed.next_position[prompt_of_row]
    out_tokens = torch.zeros(count, settings.max_new_tokens, dtype=torch.long, device=device)
    out_logprobs = torch.zeros(count, settings.max_new_tokens, device=device)
    lengths = torch.zeros(count, dtype=torch.long, device=device)
    finished = torch.zeros(count, dtype=torch.bool, device=device)
    rows, logits = torch.arange(count, device=device), logits[prompt_of_row]
    for at in range(settings.max_new_tokens):
        tokens, logprobs = choose(logits, draws[rows, at], settings)
        out_tokens[rows, at], out_logprobs[rows, at] = tokens, logprobs
        lengths[rows] = at + 1
        ended = torch.isin(tokens, eos)
        finished[rows] = ended
        if at + 1 == settings.max_new_tokens:
            break
        if bool(ended.any()):
            keep = (~ended).nonzero()[:, 0]
            if len(keep) == 0:
                break
            rows, tokens = rows[keep], tokens[keep]
            layout.keep_rows(keep)
        logits = policy.decode(tokens, positions[rows] + at, layout)

    if not bool(out_logprobs.isfinite().all()):
        raise FloatingPointError(
            "the model's logits are not finite: lower --learning_rate or raise --kl_coef, and go on from an earlier checkpoint"
        )
    lengths, finished = lengths.tolist(), finished.tolist()
    out_tokens, out_logprobs = out_tokens.cpu(), out_logprobs.cpu()
    rollouts = []
    for start in range(0, count, group):
        own = range(start, start + group)
        tokens = [out_tokens[r, : lengths[r]] for r in own]
        texts = tokenizer.batch_decode(
            [t[:-1] if finished[r] else t for r, t in zip(own, tokens)], skip_special_tokens=False
        )
        rollouts.append(
            Rollout(tokens, [out_logprobs[r, : lengths[r]] for r in own], texts, [finished[r] for r in own])
        )
    return rollouts
