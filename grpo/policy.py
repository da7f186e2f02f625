"""The model as the loop sees it: log-probabilities of packed groups, and the two forwards of sampling.

All three are methods of one module, so that FSDP has one root, whose forward it hooks. Sampling runs on the plain twin
of that module (`grpo.engine.distributed.unsharded`).
"""

from functools import partial

import torch
from torch import nn

from grpo import sequence
from grpo.attention import PackedLayout
from grpo.batch import pack
from grpo.engine import model as models

# Logits of this many numbers at a time: 64 Mi in fp32 are 256 MiB, about 440 tokens of Qwen2-VL's vocabulary.
LOGITS_PER_CHUNK = 2**26


class Policy(nn.Module):
    """Wraps a transformers model of one of `grpo.families`.

    `forward(batch, temperature)` -> (logprobs (N,), entropy (N,)) of the completion tokens, one prompt pass a group;
    the entropy is (0,) if it is not asked for, and has no gradient unless that is asked for.
    `prefill(batch)` -> (logits (B, V), prompt keys and values); `decode(tokens, positions, layout)` -> logits (R, V).
    Logits of `spec.never_sampled` are -inf in all three.
    """

    cached_tower = None  # called in place of a frozen tower: see `grpo.engine.feature_cache`
    plain = None  # if the policy is sharded: the same modules without FSDP, see `grpo.engine.distributed.unsharded`

    def __init__(self, model, spec):
        super().__init__()
        self.model, self.spec, self.sharded = model, spec, False
        self.register_buffer("never_sampled", torch.tensor(spec.never_sampled), persistent=False)

    @property
    def device(self):
        return self.never_sampled.device

    def blocks(self):
        """The vision blocks and decoder layers: FSDP shards each of them by itself."""
        return [*models.vision_tower(self.model).blocks, *models.decoder(self.model).layers]

    def vision_features(self, batch, keep=True):
        """(merged tokens, spec.feature_width) features of what this rank encodes of the batch's images and videos, None
        for text alone.

        A sharded tower must run on every rank at every forward. So a sharded policy computes the features of one blank
        patch group for text alone, and `_hidden` adds them with weight 0. A rank that encodes nothing of its sequence
        group's media computes these, too; nobody is sent them. keep: whether these media will be seen again.
        """
        if batch.grids is not None:
            encode = partial(self.spec.family.vision_features, self.model)
            return (keep and self.cached_tower or encode)(batch.pixels.to(self.device), batch.grids)
        if not self.sharded and batch.placeholders is None:
            return None
        merge = self.spec.merge_size
        blank = batch.position_ids.new_zeros(merge * merge, self.spec.patch_values, dtype=torch.float32)
        return self.spec.family.vision_features(self.model, blank, batch.position_ids.new_tensor([[1, merge, merge]]))

    def _hidden(self, batch, layout):
        """(1, l, hidden) of this rank's part of the row, `layout.row`."""
        embeds = models.decoder(self.model).embed_tokens(layout.row.cut(batch.input_ids))
        features = self.vision_features(batch) if batch.features is None else batch.features
        more = {}
        if batch.placeholders is not None:
            embeds, more = self.spec.family.decoder_inputs(embeds, *layout.row.media(batch, features))
        elif features is not None:
            embeds = embeds + 0 * features.sum()
        return self._decoder(embeds, layout.row.cut(batch.position_ids), layout, **more)

    def _decoder(self, embeds, position_ids, layout, **more):
        out = models.decoder(self.model)(
            inputs_embeds=embeds,
            position_ids=position_ids,
            attention_mask=self.spec.family.no_mask,
            use_cache=False,
            layout=layout,
            **more,
        )
        return out.last_hidden_state

    def _logits(self, hidden):
        return self.model.lm_head(hidden).float().index_fill_(-1, self.never_sampled, float("-inf"))

    def _score(self, hidden, targets, temperature, entropy, entropy_gradient):
        logprobs = self._logits(hidden).div_(temperature).log_softmax(-1)
        chosen = logprobs.gather(-1, targets[:, None])[:, 0]
        if entropy_gradient:  # entr has no gradient at the tokens that are never sampled
            probabilities = logprobs.exp()
            return chosen, -(probabilities * logprobs.masked_fill(probabilities == 0, 0.0)).sum(-1)
        with torch.no_grad():  # last, so that recomputing for the gradient ends before it
            spread = torch.special.entr(logprobs.exp()).sum(-1) if entropy else chosen.new_zeros(0)
        return chosen, spread

    def forward(self, batch, temperature=1.0, entropy=True, entropy_gradient=False):
        layout = PackedLayout(batch.groups, self.device)
        own, predict, targets = layout.row.predicted(batch.predict, batch.targets)
        hidden = self._hidden(batch, layout)[0][predict]
        size = max(1, LOGITS_PER_CHUNK // self.model.lm_head.weight.shape[0])
        chunks = list(zip(hidden.split(size), targets.split(size)))
        # Each of several chunks is recomputed in backward: the whole (N, V) logits never exist.
        score = partial(models.recomputed, self._score) if len(chunks) > 1 else self._score
        scores = [score(h, t, temperature, entropy, entropy_gradient) for h, t in chunks]
        columns = (torch.cat(column) for column in zip(*scores))
        return tuple(sequence.joined(c, own, len(batch.targets)) if len(c) else c for c in columns)

    def prefill(self, batch):
        layout = PackedLayout(batch.groups, self.device, keep_prompt_kv=True)
        last = torch.tensor([size for size, _ in batch.groups], device=self.device).cumsum(0) - 1
        own, here, _ = layout.row.predicted(last, last)
        hidden = sequence.joined(self._hidden(batch, layout)[0][here], own, len(last))
        return self._logits(hidden), layout.prompt_kv

    def decode(self, tokens, positions, layout):
        """tokens (R,), positions (R,): one step further for each row."""
        embeds = models.decoder(self.model).embed_tokens(tokens[:, None])
        hidden = self._decoder(embeds, positions[None, :, None].expand(3, -1, -1), layout)
        layout.advance()
        return self._logits(hidden[:, 0])


@torch.no_grad()
def features_of(policy, prompts, keep=True):
    """[(merged tokens, spec.feature_width)] vision features of each prompt, from one vision pass; 0 tokens for text.
    keep: see `Policy.vision_features`."""
    batch = pack(prompts, [[] for _ in prompts], policy.spec).to(policy.device)
    if batch.placeholders is None:
        weight = policy.model.get_input_embeddings().weight
        return [weight.new_zeros(0, policy.spec.feature_width)] * len(prompts)
    vision = torch.tensor([policy.spec.image_token_id, policy.spec.video_token_id])
    counts = [int(torch.isin(p.input_ids, vision).sum()) for p in prompts]
    return list(sequence.all_features(batch, policy.vision_features(batch, keep)).split(counts))
