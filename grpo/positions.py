"""Multimodal rotary positions, by the rule that the families' weights were trained with.

Text counts up by one on all three axes (time, height, width). A run of placeholders (an image, a video, or with
Qwen3-VL one time step of a video) starts one after the largest position so far and lays its merged grid on the three
axes; the text after it starts one after the largest position of the *whole* grid, time included. transformers >= 5
instead continues from max(height, width), so that on a video with more time steps than merged rows or columns text
overlaps time; transformers <= 4.57 and vLLM follow the rule below.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch


def grid_positions(grid, seconds, spec):
    """Returns the (3, t·h·w / merge²) positions of one run of placeholders, counted from zero.

    grid: (t, h, w) in patches; seconds: between two of its time steps, 0 for an image.
    """
    t, h, w = grid[0], grid[1] // spec.merge_size, grid[2] // spec.merge_size
    time = spec.family.time_positions(t, seconds, spec.vision)
    return torch.cartesian_prod(time, torch.arange(h), torch.arange(w)).T


@dataclass(frozen=True)
class MediaSpan:
    """Where one image or video stands in a prompt: its runs of placeholders, each (start, stop, grid in patches), and
    its grid."""

    runs: tuple
    is_image: bool
    grid: tuple


def media_spans(prompt, spec):
    """The prompt's images and videos in order of appearance. Raises ValueError, naming the sample, where placeholder
    tokens and grids disagree."""
    grids = {spec.image_token_id: prompt.image_grid_thw, spec.video_token_id: prompt.video_grid_thw}
    left = {token: [] if grid is None else grid.tolist() for token, grid in grids.items()}  # not met yet
    ids, spans, stop = prompt.input_ids.tolist(), [], 0
    for at, token in enumerate(ids):
        if at < stop or token not in left:
            continue
        if not left[token]:
            raise ValueError(f"{prompt.sample.key}: more vision placeholders than images and videos")
        grid, is_image = tuple(left[token].pop(0)), token == spec.image_token_id
        runs = _runs(prompt, ids, at, [grid] if is_image else spec.family.span_grids(grid), spec)
        spans.append(MediaSpan(runs, is_image, grid))
        stop = runs[-1][1]
    if any(left.values()):
        raise ValueError(f"{prompt.sample.key}: fewer vision placeholders than images and videos")
    return spans


def _runs(prompt, ids, at, grids, spec):
    """((start, stop, grid), ...) of the runs of one image or video, whose first placeholder is at `at`."""
    runs, placeholder = [], ids[at]
    for grid in grids:
        start = next((place for place in range(at, len(ids)) if ids[place] == placeholder), len(ids))
        at = start + math.prod(grid) // spec.merge_size**2
        if ids[start:at] != [placeholder] * (at - start):
            raise ValueError(f"{prompt.sample.key}: grid {grid} needs {at - start} placeholders in a row")
        runs.append((start, at, grid))
    return tuple(runs)


def prompt_positions(prompt, spec):
    """Returns ((3, P) int64 positions, first position after the prompt) of one `video.prompt.Prompt`.

    spec: `grpo.engine.model.ModelSpec` (family, placeholder ids, merge size). Raises as `media_spans`.
    """
    runs, of_videos = [], iter(prompt.seconds_per_grid)
    for span in media_spans(prompt, spec):
        seconds = 0.0 if span.is_image else next(of_videos)
        runs += [(*run, seconds) for run in span.runs]
    return _positions(len(prompt.input_ids), tuple(runs), spec)


@lru_cache(maxsize=64)  # a step packs each prompt twice, and many prompts are laid out alike
def _positions(length, runs, spec):
    """`prompt_positions` of `length` tokens with these runs of placeholders, each (start, stop, grid, seconds)."""
    parts, at = [], 0  # each counted from 0
    for start, stop, grid, seconds in runs:
        parts += [torch.arange(start - at).expand(3, -1), grid_positions(grid, seconds, spec)]
        at = stop
    parts.append(torch.arange(length - at).expand(3, -1))
    placed, position = [], 0
    for part in parts:
        if part.shape[1]:
            placed.append(part + position)
            position = int(placed[-1].max()) + 1
    return torch.cat(placed, dim=1), position
