"""The two carriers of a step: `RolloutGroup`, a prompt with its scored completions, and `MicroBatch`, what one forward
and backward takes.

Shape letters used everywhere: B prompts, G completions of a group, P prompt tokens, C completion tokens, T frames,
V vocabulary, L tokens of a packed row, N all completion tokens of a micro-batch. Completion tokens are flat, (N,),
prompt by prompt and completion by completion: nothing is padded, so no mask is needed.
"""

from dataclasses import dataclass, field, replace

import torch

from grpo import sequence
from grpo.positions import media_spans, prompt_positions
from video.prompt import WHOLE_PROMPT, Prompt, encoders


@dataclass
class RolloutGroup:
    """G completions of one prompt; each list has one entry for each completion."""

    prompt: Prompt
    tokens: list  # (C_g,) int64, the EOS included, unless the length limit truncated the completion
    logprobs: list  # (C_g,) float32 of the sampler: full softmax at the sampling temperature
    texts: list  # the decoded tokens, without the EOS
    finished: list  # False if the length limit truncated the completion
    features: torch.Tensor | None = None  # (merged tokens, hidden) of the prompt's media, if the tower is frozen
    rewards: list = field(default_factory=list)  # the total reward
    parts: dict = field(default_factory=dict)  # reward name -> unweighted value of each completion
    errors: dict = field(default_factory=dict)  # reward name -> messages of its failed calls, which scored 0
    logs: dict = field(default_factory=dict)  # "REWARD/NAME" -> numbers that a reward logs of its own
    advantages: torch.Tensor | None = None  # (G,)

    @property
    def lengths(self):
        return [len(t) for t in self.tokens]


@dataclass
class MicroBatch:
    """Rows `[prompt | c_1 | ... | c_G]` of several prompts, one after another, and what the loss needs of each token.

    `pack` fills the fields up to `grids`, `pack_groups` the next ones; the step adds the log-probabilities, all (N,),
    as it computes them.
    """

    input_ids: torch.Tensor  # (1, L)
    position_ids: torch.Tensor  # (3, 1, L)
    next_position: torch.Tensor  # (B,) where the completions of each prompt start
    predict: torch.Tensor  # (N,) index of the hidden state that predicts each completion token
    targets: torch.Tensor  # (N,) the completion tokens
    groups: list  # (P, (C_1, ..., C_G)) of each prompt
    placeholders: torch.Tensor | None = None  # (merged tokens,) where the media's tokens stand in the row
    encoders: torch.Tensor | None = None  # (merged tokens,) the rank of the sequence group that encodes each
    pixels: torch.Tensor | None = None  # (patches, values of a patch) that this rank encodes, in this order
    grids: torch.Tensor | None = None  # (media, 3) of these pixels
    features: torch.Tensor | None = None  # (merged tokens, hidden), if the vision tower has run already
    rollouts: list = field(default_factory=list)  # the `RolloutGroup`s; [] in a dummy, which trains nothing
    completion: torch.Tensor | None = None  # (N,) number of each token's completion in the micro-batch
    sampler_logprobs: torch.Tensor | None = None
    old_logprobs: torch.Tensor | None = None
    ref_logprobs: torch.Tensor | None = None

    @property
    def lengths(self):
        """Tokens of each completion."""
        return [n for group in self.rollouts for n in group.lengths]

    @property
    def advantages(self):
        """(N,) the advantage of each token's completion."""
        return torch.cat([group.advantages for group in self.rollouts]).to(self.completion.device)[self.completion]

    def to(self, device):
        """On the device, but for the pixels: the policy moves those of one forward at a time."""
        tensors = {name: v for name, v in vars(self).items() if isinstance(v, torch.Tensor) and name != "pixels"}
        return replace(self, **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})


def pack(prompts, completions, spec):
    """Returns the row `[p_1 | c_11 ... c_1G | p_2 | ...]` as a `MicroBatch`.

    prompts: B `video.prompt.Prompt`; completions: B lists of (C,) int64 tensors; an empty list packs the prompt alone.
    The positions of every completion start right after the last position of its prompt, as they did in sampling.

    A text prompt [p q] with completions [a b] and [c] is the row

        input_ids [p q a b c]   position_ids [0 1 2 3 2]   predict [1 2 1]   targets [a b c]   groups [(2, (2, 1))]
    """
    ids, positions, firsts, predict, groups, starts, end = [], [], [], [], [], [], 0
    for prompt, group in zip(prompts, completions, strict=True):
        own, first = prompt_positions(prompt, spec)
        lengths = tuple(len(tokens) for tokens in group)
        groups.append((own.shape[1], lengths))
        starts.append(end)
        firsts.append(first)
        ids += [prompt.input_ids, *group]
        positions += [own, *((first + torch.arange(count)).expand(3, -1) for count in lengths)]
        end += own.shape[1]
        last = end - 1
        for count in lengths:
            # The prompt's last token predicts the first token of every completion.
            predict += [last, *range(end, end + count - 1)]
            end += count
    targets = [tokens for group in completions for tokens in group]
    return MicroBatch(
        input_ids=torch.cat(ids)[None],
        position_ids=torch.cat(positions, dim=1)[:, None],
        next_position=torch.tensor(firsts),
        predict=torch.tensor(predict, dtype=torch.long),
        targets=torch.cat(targets) if targets else torch.zeros(0, dtype=torch.long),
        groups=groups,
        **_pack_media(prompts, starts, spec),
    )


def _pack_media(prompts, starts, spec):
    """{"placeholders", "encoders", "pixels", "grids"} of all images and videos, {} if there are none. A rank that
    encodes none of them has no pixels.

    The row of prompt b begins at starts[b].
    """
    placeholders, encoded, pixels, grids = [], [], [], []
    for prompt, start in zip(prompts, starts):
        media, at = {True: prompt.pixel_values, False: prompt.pixel_values_videos}, {True: 0, False: 0}
        whole = prompt.share == WHOLE_PROMPT  # of which this rank's share is cut here
        spans = media_spans(prompt, spec)
        for span, ranks in zip(spans, encoders([span.grid for span in spans], sequence.size()) if spans else ()):
            steps, rows, columns = span.grid
            step, is_image = rows * columns, span.is_image
            placeholders += [torch.arange(start + first, start + stop) for first, stop, _ in span.runs]
            encoded.append(ranks.repeat_interleave(step // spec.merge_size**2))
            before, own = int((ranks < sequence.rank()).sum()), int((ranks == sequence.rank()).sum())
            if own:
                pixels.append(media[is_image][at[is_image] + whole * before * step :][: own * step])
                grids.append((own, rows, columns))
            at[is_image] += (steps if whole else own) * step
    if not placeholders:
        return {}
    own = {"pixels": torch.cat(pixels), "grids": torch.tensor(grids)} if grids else {}
    return {"placeholders": torch.cat(placeholders), "encoders": torch.cat(encoded), **own}


def pack_groups(groups, spec, frozen_vision=False):
    """The `MicroBatch` that trains on the groups; frozen_vision: on the vision features that sampling computed.

    Completions of 3, 2 and 1 tokens have the completion numbers [0 0 0 1 1 2].
    """
    batch = pack([g.prompt for g in groups], [g.tokens for g in groups], spec)
    batch.rollouts = groups
    batch.completion = torch.arange(len(batch.lengths)).repeat_interleave(torch.tensor(batch.lengths))
    batch.sampler_logprobs = torch.cat([row for g in groups for row in g.logprobs])
    batch.features = torch.cat([g.features for g in groups]) if frozen_vision else None
    return batch


def dummy(frozen_vision=False):
    """A micro-batch of one prompt token and one completion token that trains nothing: a rank without samples runs it,
    so that it takes part in every collective of a sharded model."""
    one, features = torch.zeros(1, dtype=torch.long), torch.zeros(0) if frozen_vision else None
    ids, positions = torch.zeros(1, 2, dtype=torch.long), torch.zeros(3, 1, 2, dtype=torch.long)
    return MicroBatch(ids, positions, one, one, one, [(1, (1,))], features=features)


def chunked(items, size):
    """[1 2 3], 2 -> [1 2] [3]"""
    return [items[i : i + size] for i in range(0, len(items), size)]
