"""Samples groups of completions: one vision pass and one prefill a prompt, then rows decode together.

Every completion's randomness is drawn beforehand from (run seed, step, prompt): one uniform number a token, turned into
a token by inverting the cumulative distribution. So a completion does not depend on which other prompts share its
batch, on the order of rows, or on the number of ranks.
"""

import hashlib
from dataclasses import dataclass, replace

import torch

from grpo import sequence
from grpo.attention import IN_USE, DecodeLayout
from grpo.batch import RolloutGroup, chunked, pack
from grpo.engine.cuda_graph import record

LOOK_EVERY = 8  # tokens between two looks at a GPU for rows that have ended


@dataclass(frozen=True)
class SamplingSettings:
    """With top_k or top_p sampling sees fewer tokens than the returned and trained log-probabilities, which are of the
    full softmax at this temperature."""

    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 is off
    top_p: float = 1.0  # 1 is off
    max_new_tokens: int = 256

    @classmethod
    def of(cls, config):
        """The settings that the flags of a run ask for."""
        return cls(config.temperature, config.top_k, config.top_p, config.max_new_tokens)


def prompt_seed(run_seed, step, key):
    """Returns a 63-bit seed that depends on the run's seed, the step and the prompt's key alone."""
    digest = hashlib.sha256(f"{run_seed}/{step}/{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def uniforms(seeds, group, count):
    """Returns (len(seeds)·group, count) numbers in [0, 1); each seed has its own generator."""
    draws = [torch.rand(group, count, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in seeds]
    return torch.cat(draws)


def truncate(logprobs, top_k, top_p):
    """Returns logprobs (R, V) with the tokens that top-k and nucleus sampling exclude at -inf (Holtzman et al. 2020,
    eq. 2-3)."""
    if top_k:
        least = logprobs.topk(min(top_k, logprobs.shape[-1]), dim=-1).values[:, -1:]
        logprobs = logprobs.masked_fill(logprobs < least, float("-inf"))
    if top_p < 1.0:
        ordered, order = logprobs.sort(dim=-1, descending=True)
        probs = ordered.softmax(-1)
        beyond = probs.cumsum(-1) - probs >= top_p  # the most likely token always stays
        logprobs = logprobs.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), float("-inf"))
    return logprobs


def sample_next_token(logits, uniform, settings):
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
        tokens = tokens.clamp(max=logits.shape[-1] - 1)  # beyond only if logits are NaN, which `generate` reports
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]


class Decoding:
    """Rows that decode together: all that `step` reads and writes, on the device and at fixed addresses.

    logits (B, V) are of the prompts' last tokens, positions (B,) are where completions start, draws (R, C) are uniform
    numbers. Row r writes its tokens and their logprobs to line rows[r] of (R, C) results; tokens not yet sampled are
    -1. A row that has ended decodes on, unread, until `drop_ended` removes it.
    """

    def __init__(self, policy, settings, layout, logits, positions, draws):
        self.policy, self.settings, self.layout, self.draws = policy, settings, layout, draws
        self.eos = torch.tensor(policy.spec.eos_ids, device=policy.device)
        self.tokens = torch.full_like(draws, -1, dtype=torch.long)
        self.logprobs = torch.zeros_like(draws, dtype=torch.float32)
        self.rows = torch.arange(len(draws), device=policy.device)
        self.ended = torch.zeros_like(self.rows, dtype=torch.bool)
        self.last, self.positions = torch.zeros_like(self.rows), positions[layout.prompt_of_row]
        self.warm, self.recorded, self.graph, self.pool = False, False, None, None
        self._sample(logits[layout.prompt_of_row])

    def _sample(self, logits):
        at = self.layout.at
        tokens, logprobs = sample_next_token(logits, self.draws[self.rows, at], self.settings)
        self.tokens[self.rows, at], self.logprobs[self.rows, at] = tokens, logprobs
        self.last.copy_(tokens)
        self.ended |= (tokens[:, None] == self.eos).any(-1)

    def step(self):
        """One token further for every row; nothing in it waits for the device."""
        logits = self.policy.decode(self.last, self.positions, self.layout)
        self.positions += 1
        self._sample(logits)

    def advance(self, graph):
        """One `step`. graph: the first call at these shapes runs it, in which libraries set themselves up, the second
        records it as a CUDA graph, and from then on the graph is replayed."""
        if not self.warm:
            self.step()
            self.warm = graph
            return
        if not self.recorded:  # an old graph is kept until now, as torch asks of one whose pool is used again
            self.pool = self.pool or torch.cuda.MemPool()
            self.graph, self.recorded = record(self.step, self.pool), True
        self.graph.replay()

    def drop_ended(self):
        """Takes rows that have ended out of the batch: shapes and addresses change, so a new graph must be recorded."""
        self.warm = self.recorded = False
        keep = (~self.ended).nonzero()[:, 0]
        self.layout.keep_rows(keep)
        for name in ("rows", "ended", "last", "positions"):
            setattr(self, name, getattr(self, name)[keep])

    def rows_written(self):
        """[(tokens (C,), their logprobs (C,), whether it ended by itself)] of each line, on the CPU."""
        tokens, logprobs = self.tokens.cpu(), self.logprobs.cpu()
        is_eos = torch.isin(tokens, self.eos.cpu())
        ended = is_eos.any(-1)
        lengths = torch.where(ended, is_eos.int().argmax(-1) + 1, is_eos.shape[1]).tolist()
        return [(tokens[r, :n].clone(), logprobs[r, :n].clone(), bool(ended[r])) for r, n in enumerate(lengths)]


def on_gpu(policy):
    return policy.device.type == "cuda"


@torch.no_grad()
def generate(policy, prompts, group_size, settings, seeds, tokenizer, features=None):
    """Returns a `RolloutGroup` of group_size completions for each prompt.

    prompts: B `video.prompt.Prompt`; seeds: B ints (see `prompt_seed`); features: of all prompts, if the vision tower
    has run already. A row ends with the first of the model's EOS ids or after max_new_tokens. On a CPU a row that has
    ended leaves the batch at once. On a GPU the loop looks for ended rows only every LOOK_EVERY tokens and drops them
    once half of the rows have ended: between looks nothing waits for the GPU. Raises FloatingPointError if the model's
    logits are not finite.
    """
    # 1) Prefill: one pass over the prompts, whose keys and values all completions share
    limit, patient, graph = settings.max_new_tokens, on_gpu(policy), "decoding graph" in IN_USE
    batch = replace(pack(prompts, [[] for _ in prompts], policy.spec), features=features).to(policy.device)
    logits, prompt_kv = policy.prefill(batch)
    own = sequence.own_rows(len(prompts) * group_size)
    here, prompt_of_row = torch.unique(own // group_size, return_inverse=True)  # prompts that this rank decodes
    prompt_kv = {layer: [pairs[prompt] for prompt in here] for layer, pairs in prompt_kv.items()}
    layout = DecodeLayout(prompt_kv, prompt_of_row, limit, static=graph)
    del prompt_kv
    draws, here = uniforms(seeds, group_size, limit)[own].to(policy.device), here.to(policy.device)
    decoding = Decoding(policy, settings, layout, logits[here], batch.next_position[here], draws)

    # 2) Decode: one token a step for every row, dropping rows that have ended
    for sampled in range(1, limit):
        if not patient or sampled % LOOK_EVERY == 0:
            ended, rows = int(decoding.ended.sum()), len(decoding.ended)
            if ended == rows:
                break
            if ended >= (rows / 2 if patient else 1):
                decoding.drop_ended()
        decoding.advance(graph and limit - sampled > 2 * LOOK_EVERY)  # recording pays only if several steps are left
    return _groups(sequence.all_rows(own, decoding.rows_written()), prompts, group_size, tokenizer)


def _groups(rows, prompts, group_size, tokenizer):
    """The `RolloutGroup` of each prompt from the `Decoding.rows_written` of all rows."""
    if not all(bool(logprobs.isfinite().all()) for _, logprobs, _ in rows):
        raise FloatingPointError(
            "the model's logits are not finite: lower --learning_rate or raise --kl_coef, and go on from an earlier "
            "checkpoint"
        )
    groups = []
    for prompt, own in zip(prompts, chunked(rows, group_size)):
        tokens, logprobs, finished = map(list, zip(*own))
        spoken = [t[:-1] if ended else t for t, ended in zip(tokens, finished)]
        texts = tokenizer.batch_decode(spoken, skip_special_tokens=False)
        groups.append(RolloutGroup(prompt, tokens, logprobs, texts, finished))
    return groups
