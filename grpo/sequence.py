"""Sequence parallelism (Ulysses, arXiv 2309.14509): S neighbouring ranks, a sequence group, work on the same prompts.

Each rank of the group reads and encodes its share of the frames, and holds 1/S of the tokens of a packed row:
embeddings, norms, MLPs and logits see these tokens alone. Attention exchanges tokens for heads, and back. The
log-probabilities that the ranks find are put together: advantages and loss are the same on all S ranks, the gradient of
each is that of its own tokens. Each decodes its share of the completions, from the keys and values of the whole prompt.
So a sequence group acts as one rank: `grpo.engine.distributed.data_rank` numbers the groups.

A row of 7 tokens with 4 heads, S = 2: rank 0 holds tokens 0 to 3 and attends with heads 0 and 1 of all tokens; rank 1
holds tokens 4 to 6 and a token of padding, which attention never sees, and attends with heads 2 and 3.

Shapes: L tokens of a row, l = ceil(L / S) of them on a rank, H query heads, K key/value heads, D head size, N
completion tokens. Without a sequence group (S = 1) every function here returns what it is given.
"""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh

from grpo.errors import ConfigError
from video.prompt import Skipped

_group = None  # torch's process group of the S ranks, once `join` has made it


def join(count, device):
    """Makes groups of `count` neighbouring ranks; device: "cpu" or "cuda". Collective."""
    global _group
    if count > 1:
        shape, names = (dist.get_world_size() // count, count), ("data", "sequence")
        _group = init_device_mesh(device, shape, mesh_dim_names=names).get_group("sequence")


def size():
    """S."""
    return dist.get_world_size(_group) if _group else 1


def rank():
    """Which of the S ranks this is."""
    return dist.get_rank(_group) if _group else 0


def check_heads(heads, count):
    """Raises ConfigError if `count` ranks cannot share the attention heads of a model."""
    if heads % count:
        fits = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise ConfigError(f"--sequence_parallel {count}: must divide the model's {heads} attention heads; give {fits}")


def gather_items(item):
    """[item of each of the S ranks]; items are plain Python values."""
    items = [item] * size()
    if _group:
        dist.all_gather_object(items, item, group=_group)
    return items


def from_first(make):
    """What make() returns on the first of the S ranks, which alone calls it: a reward may give another value each time
    that it is asked."""
    return gather_items(make() if rank() == 0 else None)[0]


def agreed(batch):
    """The batch of `video.prompt.Prompt` or Skipped, with what any of the S ranks has skipped, or read otherwise than
    the first, skipped on all; empty if it is empty on any, which a signal has stopped."""
    told = gather_items([item if isinstance(item, Skipped) else item.shape for item in batch])
    return [_agreed(item, column) for item, *column in zip(batch, *told)]


def _agreed(item, told):
    """An item of a batch; told: what each of the S ranks has of it."""
    if skipped := next((other for other in told if isinstance(other, Skipped)), None):
        return skipped
    if any(other != told[0] for other in told):
        return Skipped(item.sample.key, next(iter(item.sample.media)), "two processes that share it read other frames")
    return item


def own_rows(count):
    """(n,) the rows of `count` that this rank decodes; a rank without a row decodes the first one, too."""
    own = torch.arange(count).tensor_split(size())[rank()]
    return own if len(own) else torch.zeros(1, dtype=torch.long)


def all_rows(own, rows):
    """[what each row gave]; rows: what the rows `own` of this rank gave, plain values or tensors on the CPU."""
    merged = {number: row for part in gather_items(dict(zip(own.tolist(), rows))) for number, row in part.items()}
    return [merged[number] for number in sorted(merged)]


class _Exchange(torch.autograd.Function):
    """Sends sent[r] lines of x to rank r of the group, and returns received[r] lines from each, one rank's after
    another's. Its gradient takes the same way back."""

    @staticmethod
    def forward(ctx, x, sent, received):
        ctx.way_back = received, sent
        out = x.new_empty(sum(received), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), received, sent, group=_group)
        return out

    @staticmethod
    def backward(ctx, gradient):
        return _Exchange.apply(gradient, *ctx.way_back), None, None


def _swap(chunks):
    """(S, ...) chunks, one for each rank -> (S, ...) chunks, one from each rank."""
    return _Exchange.apply(chunks, [1] * size(), [1] * size())


def joined(local, places, count):
    """(count, ...) of which this rank has `local` at `places` (n,), other ranks the rest. Every rank goes on alike with
    the whole, so the gradient of `local` is that at its places; nothing is summed."""
    if places is None:
        return local
    whole = local.new_zeros(count, *local.shape[1:]).index_copy(0, places, local[: len(places)])
    total = whole.detach().clone()
    dist.all_reduce(total, group=_group)
    return whole + (total - whole.detach())


def all_features(batch, features):
    """(merged tokens, width) features of all the batch's media; features: of what this rank encodes."""
    places = (batch.encoders == rank()).nonzero()[:, 0] if _group else None
    return joined(features, places, len(batch.encoders))


class Row:
    """This rank's part of a packed row of `length` tokens."""

    def __init__(self, length):
        self.length, self.share = length, -(-length // size())
        self.start, self.padding = rank() * self.share, self.share * size() - length

    def cut(self, tokens):
        """(..., L) -> (..., l); padding is 0."""
        return F.pad(tokens, (0, self.padding)).narrow(-1, self.start, self.share) if _group else tokens

    def to_heads(self, query, key, value):
        """(l, H, D) and twice (l, K, D) -> (L, H/S, D) and twice (L, K'/S, D): K' = lcm(K, S), so that fewer key/value
        heads than ranks are repeated."""
        if not _group:
            return query, key, value
        repeats = math.lcm(key.shape[1], size()) // key.shape[1]
        given = query, *(x.repeat_interleave(repeats, dim=1) for x in (key, value))
        given = [x.unflatten(1, (size(), -1)) for x in given]
        heads = _swap(torch.cat(given, dim=2).transpose(0, 1)).flatten(0, 1)[: self.length]
        return heads.split([x.shape[2] for x in given], dim=1)

    def to_tokens(self, x):
        """(L, H/S, D) -> (l, H, D)"""
        if not _group:
            return x
        chunks = F.pad(x, (0, 0, 0, 0, 0, self.padding)).unflatten(0, (size(), -1))
        return _swap(chunks).transpose(0, 1).flatten(1, 2)

    def all_tokens(self, x):
        """(l, K, D) -> (L, K, D), without a gradient."""
        if not _group:
            return x
        whole = x.new_empty(self.share * size(), *x.shape[1:])
        dist.all_gather_into_tensor(whole, x.contiguous(), group=_group)
        return whole[: self.length]

    def predicted(self, predict, targets):
        """The tokens of `targets` (N,) that this rank's part predicts: (their places among the N, the places of the
        predicting tokens in the part, the targets). A rank that has none is given one, which `joined` drops: lm_head
        needs a gradient on every rank."""
        if not _group:
            return None, predict, targets
        own = (predict // self.share == rank()).nonzero()[:, 0]
        if not len(own):
            return own, predict.new_zeros(1), targets[:1]
        return own, predict[own] - self.start, targets[own]

    def media(self, batch, features):
        """(the placeholders in this rank's part, (n,), ascending, and their features (n, width)).

        features: of what this rank encodes, with their gradient; of all media if batch.features has them.
        """
        if not _group:
            return batch.placeholders, features
        users = batch.placeholders // self.share
        here, encoded = users == rank(), batch.encoders == rank()
        if batch.features is not None:
            features = features[here]
        else:
            lines = lambda ranks: torch.bincount(ranks, minlength=size()).tolist()
            sent, received = lines(users[encoded]), lines(batch.encoders[here])
            features = _Exchange.apply(features[: sum(sent)], sent, received)  # [:0] of a blank frame's
            features = features[batch.encoders[here].argsort(stable=True).argsort()]
        return batch.placeholders[here] - self.start, features
