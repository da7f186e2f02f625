"""Prompts and their completions laid out as one row without padding."""

import torch

from grpo.positions import media_spans, prompt_positions
from grpo.types import Packed


def pack(prompts, completions, spec):
    """Returns the `Packed` row `[p_1 | c_11 ... c_1G | p_2 | ...]`.

    prompts: B `video.prompt.Prompt`; completions: B lists of (C,) int64 tensors (an empty list: prompt alone).
    Every completion's positions start right after its prompt's last, as they did in sampling.
    """
    ids, positions, firsts, predict, targets, groups, start = [], [], [], [], [], [], 0
    for prompt, group in zip(prompts, completions, strict=True):
        own, first = prompt_positions(prompt, spec)
        size = own.shape[1]
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
        **_vision(prompts, spec),
    )


def _vision(prompts, spec):
    """Patches and grids of all images and videos in the order of their placeholders, which is all the tower needs."""
    pixels, grids = [], []
    for prompt in prompts:
        videos = prompt.pixel_values_videos, prompt.video_grid_thw
        kinds = {True: (prompt.pixel_values, prompt.image_grid_thw), False: videos}
        split = {kind: p.split(g.prod(-1).tolist()) for kind, (p, g) in kinds.items() if p is not None}
        for span in media_spans(prompt, spec):
            pixels.append(split[span.is_image][span.index])
            grids.append(span.grid)
    if not grids:
        return {"pixels": None, "grids": None}
    return {"pixels": torch.cat(pixels), "grids": torch.tensor(grids)}
