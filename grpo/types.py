"""What passes between the parts of a step.

Shape letters used everywhere: B prompts, G completions of a group, P prompt tokens, C completion tokens, T frames,
V vocabulary, N all completion tokens of a forward. Completion tokens are kept flat, (N,), prompt by prompt and
completion by completion: nothing is padded, so no mask is needed and uneven lengths cost what they weigh.
"""

from dataclasses import dataclass, field, fields, replace

import torch


@dataclass
class Rollout:
    """G completions of one prompt. tokens[g] (C_g,) ends with its EOS unless cut at the length limit;
    logprobs[g] (C_g,) is what the sampler saw, over the whole vocabulary at the sampling temperature."""

    tokens: list
    logprobs: list
    texts: list
    finished: list
    rewards: list = field(default_factory=list)
    parts: dict = field(default_factory=dict)
    advantages: list = field(default_factory=list)
    failed: int = 0  # calls of the user's own rewards that scored 0 because they failed
    errors: dict = field(default_factory=dict)  # reward -> the first failure's message
    features: torch.Tensor | None = None  # of the prompt's media, while the vision tower is frozen

    @property
    def lengths(self):
        return [len(t) for t in self.tokens]


@dataclass
class Packed:
    """Rows `[prompt | c_1 | ... | c_G]` of several prompts, one after another, as one forward takes them.

    input_ids (1, L); position_ids (3, 1, L); next_position (B,) where each prompt's completions start; predict (N,)
    index of the hidden state that predicts each completion token; targets (N,); groups for `PackedLayout`. Of all
    images and videos in the order of their placeholders, or None: placeholders (merged tokens,) where they stand in
    the row, pixels (patches, 1176) and grids (n, 3).
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    next_position: torch.Tensor
    predict: torch.Tensor
    targets: torch.Tensor
    groups: list
    placeholders: torch.Tensor | None
    pixels: torch.Tensor | None
    grids: torch.Tensor | None

    def to(self, device):
        tensors = {f.name: v for f in fields(self) if isinstance(v := getattr(self, f.name), torch.Tensor)}
        return replace(self, **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})
