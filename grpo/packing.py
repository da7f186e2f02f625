"""Prompts and their completions laid out as one row without padding."""

import torch

from grpo.positions import media_spans, prompt_positions
from grpo.types import Packed


def pack(prompts, completions, spec):
    """Returns the `Packed` row `[p_1 | c_11 ... c_1G | p_2 | ...]`.

    prompts: B `video.prompt.Prompt`; completions: B lists of (C,) int64 tensors (an empty list: prompt alone).
    Every completion's positions start right after its prompt's last, as they did in sampling.
    """
    ids, positions, firsts, predict, targets, groups, starts, start = [], [], [], [], [], [], [], 0
    for prompt, group in zip(prompts, completions, strict=True):
        own, first = prompt_positions(prompt, spec)
        size = own.shape[1]
        starts.append(start)
        ids.append(prompt.input_ids)
        positions.append(own)
        firsts.append(first)
        last, start = start + size - 1, start + size
        for tokens in group:
            count = len(tokens)
            ids.append(tokens)
            positions.append((first + torch.arange(count)).expand(3, -1))
            # The prompt's last token predicts the first token of every completion.
            predict.append(torch.tensor([last, *range(start, start + count - 1)]))
            targets.append(tokens)
            start += count
        groups.append((size, tuple(len(tokens) for tokens in group)))
    empty = torch.zeros(0, dtype=torch.long)
    return Packed(
        input_ids=torch.cat(ids)[None],
        position_ids=torch.cat(positions, dim=1)[:, None],
        next_position=torch.tensor(firsts),
        predict=torch.cat(predict or [empty]),
        targets=torch.cat(targets or [empty]),
        groups=groups,
        **_vision(prompts, starts, spec),
    )


def _vision(prompts, starts, spec):
    """Placeholders, patches and grids of all images and videos; prompt b begins at starts[b] of the row."""
    placeholders, pixels, grids = [], [], []
    for prompt, start in zip(prompts, starts):
        videos = prompt.pixel_values_videos, prompt.video_grid_thw
        kinds = {True: (prompt.pixel_values, prompt.image_grid_thw), False: videos}
        split = {kind: p.split(g.prod(-1).tolist()) for kind, (p, g) in kinds.items() if p is not None}
        for span in media_spans(prompt, spec):
            placeholders.append(torch.arange(start + span.start, start + span.stop))
            pixels.append(split[span.is_image][span.index])
            grids.append(span.grid)
    if not grids:
        return {"placeholders": None, "pixels": None, "grids": None}
    return {"placeholders": torch.cat(placeholders), "pixels": torch.cat(pixels), "grids": torch.tensor(grids)}
