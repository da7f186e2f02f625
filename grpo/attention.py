"""Attention for a group that shares its prompt, registered with transformers by name, so that its models stay unmodified.

Extra keyword arguments of a transformers forward reach the attention function. `layout` is such an argument: an object
that knows how the tokens of this forward are arranged and attends accordingly.

Shapes: H query heads, K key/value heads (H a multiple of K), D head size, P prompt tokens, C completion tokens,
G completions, R rows that still decode.
"""

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, AttentionMaskInterface

TEXT_ATTENTION = "grpo_shared_prompt"
# The vision towers hand `cu_seq_lens_q` to any implementation with "flash" in its name, instead of looping over frames.
VISION_ATTENTION = "grpo_batched_flash"


class PackedLayout:
    """One row `[prompt | c_1 | ... | c_G]` per group, groups one after another; no padding between them.

    groups: for each group (P, (C_1, ..., C_G)). A prompt attends causally to itself; a completion to its prompt and,
    causally, to itself. With `keep_prompt_kv`, the prompts' keys and values stay in `prompt_kv[layer][group]`, each
    (K, P, D): what decoding continues from.
    """

    def __init__(self, groups, keep_prompt_kv=False):
        self.groups = tuple((p, tuple(cs)) for p, cs in groups)
        self.prompt_kv = {} if keep_prompt_kv else None

    def attend(self, layer, query, key, value, scaling):
        """query (1, H, L, D), key and value (1, K, L, D) -> (1, H, L, D), L = sum of P + C_1 + ... + C_G."""
        outputs, start = [], 0
        for prompt_len, lengths in self.groups:
            stop = start + prompt_len
            q, k, v = (x[:, :, start:stop] for x in (query, key, value))
            outputs.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True))
            if self.prompt_kv is not None:
                self.prompt_kv.setdefault(layer, []).append((k[0], v[0]))
            start, stop = stop, stop + sum(lengths)
            if lengths:
                own = [x[0, :, start:stop] for x in (query, key, value)]
                outputs.append(_attend_completions(*own, k, v, lengths, scaling))
            start = stop
        return torch.cat(outputs, dim=2)


def _attend_completions(query, key, value, prompt_key, prompt_value, lengths, scaling):
    """query (H, sum C, D), key and value (K, sum C, D), prompt ones (1, K, P, D) -> (1, H, sum C, D)."""
    group, longest = len(lengths), max(lengths)
    if min(lengths) == longest:
        query, key, value = (x.unflatten(1, (group, longest)).transpose(0, 1) for x in (query, key, value))
        real = None
    else:
        # Pad each completion on the right, where a causal mask hides it from every real token.
        at = torch.tensor([0, *lengths[:-1]]).cumsum(0)[:, None] + torch.arange(longest)
        real = (torch.arange(longest) < torch.tensor(lengths)[:, None]).to(query.device)
        at = at.clamp(max=query.shape[1] - 1).to(query.device)
        query, key, value = (x[:, at].transpose(0, 1) for x in (query, key, value))
    key = torch.cat([prompt_key.expand(group, -1, -1, -1), key], dim=2)
    value = torch.cat([prompt_value.expand(group, -1, -1, -1), value], dim=2)
    mask = causal_lower_right(longest, key.shape[2])
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=True)
    out = out.transpose(0, 1)
    return (out.flatten(1, 2) if real is None else out[:, real])[None]


class DecodeLayout:
    """One new token for each of R rows; prompts' keys and values are kept once, not once per completion.

    prompt_kv: from a prefill's `PackedLayout`; prompt_of_row (R,) says which prompt each row continues, rows of one
    prompt next to each other. Own keys and values live in buffers of `capacity` tokens a row. `keep_rows` drops
    finished rows, and prompts with no row left.
    """

    def __init__(self, prompt_kv, prompt_of_row, capacity):
        self.length = 0
        self.prompt_k, self.prompt_v, self.own_k, self.own_v = {}, {}, {}, {}
        sizes = torch.tensor([k.shape[1] for k, _ in prompt_kv[0]])
        for layer, pairs in prompt_kv.items():
            self.prompt_k[layer], self.prompt_v[layer] = (
                pairs[0][i][None]
                if len(pairs) == 1
                else torch.nn.utils.rnn.pad_sequence([p[i].transpose(0, 1) for p in pairs], batch_first=True)
                .transpose(1, 2)
                .contiguous()
                for i in (0, 1)
            )
            kv_heads, _, head_size = pairs[0][0].shape
            own = (prompt_of_row.shape[0], kv_heads, capacity, head_size)
            self.own_k[layer], self.own_v[layer] = (pairs[0][i].new_zeros(own) for i in (0, 1))
        device = prompt_kv[0][0][0].device
        hidden = torch.arange(int(sizes.max())) >= sizes[:, None]
        self.hidden = hidden.to(device) if bool(hidden.any()) else None
        self._index_rows(prompt_of_row.to(device))

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
                self.prompt_k[layer], self.prompt_v[layer] = self.prompt_k[layer][prompts], self.prompt_v[layer][prompts]
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
        own_k, own_v, at = self.own_k[layer], self.own_v[layer], self.length
        own_k[:, :, at], own_v[:, :, at] = key[:, :, 0], value[:, :, 0]
        rows, heads, _, size = query.shape
        kv_heads = key.shape[1]
        repeats = heads // kv_heads
        query = query.view(rows, kv_heads, repeats, size) * scaling
        to_prompt = self._to_grid(query) @ self.prompt_k[layer].transpose(2, 3)
        if self.hidden is not None:
            to_prompt = to_prompt.masked_fill(self.hidden[:, None, None], float("-inf"))
        to_prompt = self._to_rows(to_prompt, repeats)
        to_own = query @ own_k[:, :, : at + 1].transpose(2, 3)
        weights = torch.cat([to_prompt, to_own], dim=-1).softmax(-1, dtype=torch.float32).to(value.dtype)
        to_prompt, to_own = weights.split([to_prompt.shape[-1], at + 1], dim=-1)
        out = self._to_rows(self._to_grid(to_prompt) @ self.prompt_v[layer], repeats)
        out = out + to_own @ own_v[:, :, : at + 1]
        return out.reshape(rows, heads, 1, size)


def shared_prompt_attention(module, query, key, value, attention_mask, *, layout, scaling, **_):
    """transformers' attention interface: returns ((B, L, H, D), None). `layout` decides who sees whom."""
    return layout.attend(module.layer_idx, query, key, value, scaling).transpose(1, 2), None


def batched_vision_attention(module, query, key, value, attention_mask, *, scaling, cu_seq_lens_q, **_):
    """Full attention inside each frame or window; query (1, H, L, D) -> (1, L, H, D).

    Segments of equal length are attended as one batch, so a tower runs one kernel per distinct length rather than one
    per frame.
    """
    bounds = cu_seq_lens_q.tolist()
    spans = {}
    for start, stop in zip(bounds, bounds[1:]):
        spans.setdefault(stop - start, []).append(start)
    parts, index = [], []
    for length, starts in spans.items():
        at = (torch.tensor(starts)[:, None] + torch.arange(length)).to(query.device)
        q, k, v = (x[0, :, at].transpose(0, 1) for x in (query, key, value))
        parts.append(F.scaled_dot_product_attention(q, k, v, scale=scaling).transpose(1, 2).flatten(0, 1))
        index.append(at.flatten())
    return torch.cat(parts)[torch.cat(index).argsort()][None], None


def register():
    """Makes both attentions known to transformers under their names; no mask is ever built for them."""
    AttentionInterface.register(TEXT_ATTENTION, shared_prompt_attention)
    AttentionInterface.register(VISION_ATTENTION, batched_vision_attention)
    for name in (TEXT_ATTENTION, VISION_ATTENTION):
        AttentionMaskInterface.register(name, lambda *args, **kwargs: None)
