"""Attention for a group that shares its prompt, registered with transformers by name: its models stay unmodified.

Extra keyword arguments of a transformers forward reach the attention function. `layout` is such an argument: an object
that knows how the tokens of this forward are arranged and attends accordingly.

flash-attn's kernel for sequences of unequal length is used if `grpo.engine.fast_paths` finds it right and faster (a
GPU, half precision: not yet run on one); else torch's scaled_dot_product_attention, over batches of equal shape.

Shapes: H query heads, K key/value heads (H a multiple of K), D head size, P prompt tokens, C completion tokens,
G completions, L tokens of a packed row, R rows that still decode.
"""

from collections import Counter
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface

from grpo.sequence import Row

# Names of the fast paths in use, of `grpo.engine.fast_paths.FAST_PATHS`.
IN_USE = set()
TEXT_ATTENTION = "grpo_shared_prompt"
# The vision towers hand `cu_seq_lens_q` to any implementation with "flash" in its name, instead of looping over frames.
VISION_ATTENTION = "grpo_batched_flash"


def flash_fits(query):
    """Whether flash-attn's kernel can take this query."""
    return "flash-attn" in IN_USE and query.is_cuda and query.dtype in (torch.float16, torch.bfloat16)


def flash_attention(*given, **named):
    """flash-attn's kernel, imported when it is first used: what a broken build raises, it raises here."""
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(*given, **named)


class Bucket(NamedTuple):
    """Groups of one packed row whose prompts are equally long: attended as one batch. Indices are into its L tokens.

    prompt (B, P); completion (R, C), C the longest: shorter ones repeat their last token, which a causal mask hides
    from the others; prompt_of_row (R,); real: which of the R·C are no such repeats.
    """

    prompt: torch.Tensor
    completion: torch.Tensor
    prompt_of_row: torch.Tensor
    real: torch.Tensor


class PackedLayout:
    """One row `[prompt | c_1 | ... | c_G]` per group, groups one after another; no padding between them.

    groups: for each group (P, (C_1, ..., C_G)). A prompt attends causally to itself; a completion to its prompt and,
    causally, to itself. With `keep_prompt_kv`, the prompts' keys, in fp32, and values stay in
    `prompt_kv[layer][group]`, each (K, P, D): what decoding continues from.
    """

    def __init__(self, groups, device="cpu", keep_prompt_kv=False):
        self.groups, self.device = [(p, tuple(cs)) for p, cs in groups], device
        sizes = [p + sum(cs) for p, cs in self.groups]
        self.starts = [0, *accumulate(sizes)][:-1]
        self.prompt_kv = {} if keep_prompt_kv else None
        self.row = Row(sum(sizes))
        # Of the completions after a prompt of P tokens, {P: mask}; torch cannot make it inside a selective checkpoint.
        longest = {}
        for p, cs in self.groups:
            longest[p] = max((longest.get(p, 0), *cs))
        self.masks = {p: causal_lower_right(c, p + c) for p, c in longest.items() if c}

    @cached_property
    def buckets(self):
        """([Bucket], (L,) where each token stands in the buckets' outputs, prompts before completions in each).

        Two prompts of 2 tokens with completions of 2 and 1, and of 1, are the row [p p a a b | q q c] of 8 tokens and
        one bucket: prompt [[0 1] [5 6]], completion [[2 3] [4 4] [7 7]], prompt_of_row [0 0 1], real [0 1 2 4]. Its
        outputs are of tokens 0 1 5 6 2 3 4 7, so token 5 stands at 2.
        """
        made, order = [], []
        for size in dict.fromkeys(p for p, _ in self.groups):
            own = [(start, cs) for start, (p, cs) in zip(self.starts, self.groups) if p == size]
            lengths = torch.tensor([c for _, cs in own for c in cs], dtype=torch.long)
            begins = [b for start, cs in own for b in list(accumulate(cs, initial=start + size))[:-1]]
            steps = torch.arange(max(lengths, default=0))
            bucket = Bucket(
                torch.tensor([start for start, _ in own])[:, None] + torch.arange(size),
                torch.tensor(begins, dtype=torch.long)[:, None] + torch.minimum(steps, lengths[:, None] - 1),
                torch.arange(len(own)).repeat_interleave(torch.tensor([len(cs) for _, cs in own])),
                (steps < lengths[:, None]).flatten().nonzero()[:, 0],
            )
            order += [bucket.prompt.flatten(), bucket.completion.flatten()[bucket.real]]
            made.append(Bucket(*(index.to(self.device) for index in bucket)))
        return made, torch.cat(order).argsort().to(self.device)

    @cached_property
    def segments(self):
        """What flash-attn wants to know: each prompt, and each completion after its prompt, is a sequence of its own.

        ((all keys,) index, two cumulative lengths (sequences + 1,) int32, two longest lengths) of queries and keys.
        """
        keys, queries, seen = [], [], []
        for start, (size, lengths) in zip(self.starts, self.groups):
            prompt = torch.arange(start, start + size)
            begins = accumulate(lengths, initial=start + size)
            keys += [prompt, *(t for b, c in zip(begins, lengths) for t in (prompt, torch.arange(b, b + c)))]
            queries += [size, *lengths]
            seen += [size, *(size + c for c in lengths)]
        ends = (torch.tensor([0, *accumulate(n)], dtype=torch.int32, device=self.device) for n in (queries, seen))
        return torch.cat(keys).to(self.device), *ends, max(queries), max(seen)

    def attend(self, layer, query, key, value, scaling):
        """query (1, H, l, D), key and value (1, K, l, D) -> (1, H, l, D): l tokens of a row are this rank's, all L
        without sequence parallelism."""
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
        if self.prompt_kv is not None:
            keys, values = self.row.all_tokens(key), self.row.all_tokens(value)
            spans = [slice(start, start + size) for start, (size, _) in zip(self.starts, self.groups)]
            self.prompt_kv[layer] = [(keys[s].transpose(0, 1).float(), values[s].transpose(0, 1)) for s in spans]
        attend = self._attend_flash if flash_fits(query) else self._attend_buckets
        out = attend(*self.row.to_heads(query, key, value), scaling)
        return self.row.to_tokens(out).transpose(0, 1)[None]

    def _attend_flash(self, query, key, value, scaling):
        index, *lengths = self.segments
        seen = key.index_select(0, index), value.index_select(0, index)
        # flash-attn's causal mask is aligned to the lower right: a completion sees its whole prompt.
        return flash_attention(query.contiguous(), *seen, *lengths, softmax_scale=scaling, causal=True)

    def _attend_buckets(self, query, key, value, scaling):
        """query (L, H, D), key and value (L, K, D) -> (L, H, D)."""
        buckets, place = self.buckets
        outputs = []
        for bucket in buckets:
            q, k, v = (_take(x, bucket.prompt) for x in (query, key, value))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
            outputs.append(out.transpose(1, 2).flatten(0, 1))
            if len(bucket.completion):
                own_q, own_k, own_v = (_take(x, bucket.completion) for x in (query, key, value))
                own_k = torch.cat([k.index_select(0, bucket.prompt_of_row), own_k], dim=2)
                own_v = torch.cat([v.index_select(0, bucket.prompt_of_row), own_v], dim=2)
                mask = self.masks[q.shape[2]]
                out = F.scaled_dot_product_attention(own_q, own_k, own_v, mask, scale=scaling, enable_gqa=True)
                outputs.append(out.transpose(1, 2).flatten(0, 1).index_select(0, bucket.real))
        return torch.cat(outputs).index_select(0, place)


def _take(x, index):
    """x (L, H, D), index (B, n) -> (B, H, n, D)."""
    return x.index_select(0, index.flatten()).unflatten(0, index.shape).transpose(1, 2)


class DecodeLayout:
    """One new token for each of R rows; prompts' keys and values are kept once, not once per completion.

    prompt_kv: from a prefill's `PackedLayout`; prompt_of_row (R,) says which prompt each row continues, rows of one
    prompt next to each other. Own keys and values live in buffers of `capacity` tokens a row, of which `length` are
    taken, also to be read from the device as `at` (1,). `keep_rows` drops finished rows, and prompts with no row left.
    `static`: every step attends to whole buffers, their rest masked, so that all steps have the same shapes.

    Keys are kept in fp32, so that scores are: Qwen2's keys have biases of several hundred, so its scores are in the
    thousands, which bf16 rounds by 8 to 32. Kernels such as flash-attn's keep scores in fp32 too.
    """

    def __init__(self, prompt_kv, prompt_of_row, capacity, static=False):
        self.length, self.static = 0, static
        self.prompt_k, self.prompt_v, self.own_k, self.own_v = {}, {}, {}, {}
        sizes = torch.tensor([k.shape[1] for k, _ in prompt_kv[0]])
        for layer, pairs in prompt_kv.items():
            self.prompt_k[layer], self.prompt_v[layer] = (_pad_prompts([pair[i] for pair in pairs]) for i in (0, 1))
            kv_heads, _, head_size = pairs[0][0].shape
            own = (prompt_of_row.shape[0], kv_heads, capacity, head_size)
            self.own_k[layer], self.own_v[layer] = (pairs[0][i].new_zeros(own) for i in (0, 1))
        device = prompt_kv[0][0][0].device
        self.at = torch.zeros(1, dtype=torch.long, device=device)
        self.places = torch.arange(capacity, device=device)
        hidden = torch.arange(int(sizes.max())) >= sizes[:, None]
        self.hidden = hidden.to(device) if bool(hidden.any()) else None
        self._index_rows(prompt_of_row.to(device))

    def advance(self):
        """Counts the token whose keys and values every layer has just been given."""
        self.length += 1
        self.at += 1

    def _index_rows(self, prompt_of_row):
        """Places row r at (prompt_of_row[r], slot[r]) of a (prompts, most rows of one prompt) grid."""
        self.prompt_of_row = prompt_of_row
        counts = torch.bincount(prompt_of_row)
        self.slot = torch.arange(len(prompt_of_row), device=counts.device) - (counts.cumsum(0) - counts)[prompt_of_row]
        self.grid = (len(counts), int(counts.max()))
        self.full = self.grid[0] * self.grid[1] == len(prompt_of_row)

    def keep_rows(self, rows):
        """Keeps only `rows` (ascending int64 indices into the present rows)."""
        prompts, prompt_of_row = torch.unique(self.prompt_of_row[rows], return_inverse=True)
        for layer in self.own_k:
            self.own_k[layer], self.own_v[layer] = self.own_k[layer][rows], self.own_v[layer][rows]
            if len(prompts) < self.grid[0]:
                self.prompt_k[layer] = self.prompt_k[layer][prompts]
                self.prompt_v[layer] = self.prompt_v[layer][prompts]
        if self.hidden is not None and len(prompts) < self.grid[0]:
            self.hidden = self.hidden[prompts]
        self._index_rows(prompt_of_row)

    def _to_grid(self, rows):
        """(R, K, r, X) -> (prompts, K, slots·r, X): rows of one prompt side by side, for one product with its keys."""
        prompts, slots = self.grid
        if self.full:
            grid = rows.unflatten(0, self.grid)
        else:
            grid = rows.new_zeros(prompts, slots, *rows.shape[1:])
            grid[self.prompt_of_row, self.slot] = rows
        return grid.transpose(1, 2).flatten(2, 3)

    def _to_rows(self, grid, repeats):
        """Inverse of `_to_grid`."""
        grid = grid.unflatten(2, (-1, repeats)).transpose(1, 2)
        return grid.flatten(0, 1) if self.full else grid[self.prompt_of_row, self.slot]

    def attend(self, layer, query, key, value, scaling):
        """query (R, H, 1, D), key and value (R, K, 1, D) -> (R, H, 1, D). Two products with keys, one softmax."""
        for buffer, new in ((self.own_k[layer], key), (self.own_v[layer], value)):
            if self.static:
                buffer.index_copy_(2, self.at, new.to(buffer.dtype))
            else:
                buffer[:, :, self.length] = new[:, :, 0]
        seen = len(self.places) if self.static else self.length + 1
        own_k, own_v = self.own_k[layer][:, :, :seen], self.own_v[layer][:, :, :seen]
        rows, heads, _, size = query.shape
        repeats = heads // key.shape[1]
        query = query.view(rows, -1, repeats, size).float() * scaling
        to_prompt = self._to_grid(query) @ self.prompt_k[layer].transpose(2, 3)
        if self.hidden is not None:
            to_prompt = to_prompt.masked_fill(self.hidden[:, None, None], float("-inf"))
        to_own = query @ own_k.transpose(2, 3)
        if self.static:
            to_own = to_own.masked_fill(self.places > self.at, float("-inf"))
        weights = torch.cat([self._to_rows(to_prompt, repeats), to_own], dim=-1)
        weights = weights.softmax(-1).to(value.dtype)
        to_prompt, to_own = weights.split([to_prompt.shape[-1], seen], dim=-1)
        out = self._to_rows(self._to_grid(to_prompt) @ self.prompt_v[layer], repeats)
        return (out + to_own @ own_v).reshape(rows, heads, 1, size)


def _pad_prompts(tensors):
    """B tensors (K, P_b, D) -> (B, K, longest P, D), zeros on the right."""
    if len(tensors) == 1:
        return tensors[0][None]
    padded = torch.nn.utils.rnn.pad_sequence([t.transpose(0, 1) for t in tensors], batch_first=True)
    return padded.transpose(1, 2).contiguous()


def shared_prompt_attention(module, query, key, value, attention_mask, *, layout, scaling, **_):
    """transformers' attention interface: returns ((B, L, H, D), None). `layout` decides who sees whom."""
    return layout.attend(module.layer_idx, query, key, value, scaling).transpose(1, 2), None


def batched_vision_attention(module, query, key, value, attention_mask, *, scaling, cu_seq_lens_q, max_length_q, **_):
    """Full attention inside each frame or window; query (1, H, L, D) -> (1, L, H, D).

    Without flash-attn, all of equal length are attended as one batch: one kernel for a video rather than one for each
    of its frames, and one for each of the three or four sizes of window.
    """
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    if flash_fits(query):
        lengths = (cu_seq_lens_q, cu_seq_lens_q, int(max_length_q), int(max_length_q))
        own = (x.contiguous() for x in (query, key, value))
        return flash_attention(*own, *lengths, softmax_scale=scaling)[None], None
    counts, order, place = _by_length(cu_seq_lens_q)
    if order is not None:
        query, key, value = (x.index_select(0, order) for x in (query, key, value))
    parts = zip(*(x.split([length * count for length, count in counts.items()]) for x in (query, key, value)))
    outputs = []
    for (length, count), part in zip(counts.items(), parts):
        part = (x.unflatten(0, (count, length)).transpose(1, 2) for x in part)
        outputs.append(F.scaled_dot_product_attention(*part, scale=scaling).transpose(1, 2).flatten(0, 1))
    out = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return (out if order is None else out.index_select(0, place))[None], None


_orders_seen = WeakIdKeyDictionary()  # all blocks of a forward are handed the same tensor: read once from a GPU


def _by_length(ends):
    """Cumulative lengths (n + 1,) -> ({length: number of segments}, (L,) tokens in the order of these lengths, (L,) the
    place of each token there); both orders are None if segments of equal length are neighbours already.

    [0 2 3 5] are segments of 2, 1 and 2 tokens: {2: 2, 1: 1}, [0 1 3 4 2], [0 1 4 2 3].
    """
    if ends not in _orders_seen:
        lengths = ends.diff().tolist()
        counts = Counter(lengths)
        kinds, tokens = list(counts), torch.arange(sum(lengths)).split(lengths)
        order = torch.cat(sorted(tokens, key=lambda segment: kinds.index(len(segment))))
        orders = (order.to(ends.device), order.argsort().to(ends.device)) if (order.diff() < 0).any() else (None, None)
        _orders_seen[ends] = counts, *orders
    return _orders_seen[ends]


def register():
    """Makes both attentions known to transformers under their names; no mask is ever built for them.

    cuDNN's attention, which torch prefers on Hopper and newer, plans for half a second at every new prompt length.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    AttentionInterface.register(TEXT_ATTENTION, shared_prompt_attention)
    AttentionInterface.register(VISION_ATTENTION, batched_vision_attention)
    for name in (TEXT_ATTENTION, VISION_ATTENTION):
        AttentionMaskInterface.register(name, lambda *args, **kwargs: None)
