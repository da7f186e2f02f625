"""Multimodal rotary positions, by the rule that Qwen2-VL's and Qwen2.5-VL's weights were trained with.

Text counts up by one on all three axes (time, height, width). A video or image starts one after the largest position so
far and lays its merged grid on the three axes; the text after it starts one after the largest position of the *whole*
grid, time included. transformers >= 5 instead continues from max(height, width), so that on a video with more time
steps than merged rows or columns text overlaps time; transformers <= 4.57 and vLLM follow the rule below.
"""

from dataclasses import dataclass

import torch


def vision_grid_positions(grid, merge_size, seconds_per_grid, tokens_per_second):
    """Returns the (3, t·h·w / merge²) positions of one image or video, counted from zero.

    grid: (t, h, w) in patches. Time steps are `int(step · seconds_per_grid · tokens_per_second)` apart for Qwen2.5-VL
    (both given; an image has 0 seconds) and 1 apart for Qwen2-VL (tokens_per_second None). transformers 4.57.1 cuts
    seconds_per_grid to an integer before it multiplies (0.5 becomes 0); transformers 5 and this function do not.
    """
    t, h, w = int(grid[0]), int(grid[1]) // merge_size, int(grid[2]) // merge_size
    time = torch.arange(t)
    if tokens_per_second is not None:
        time = (time * seconds_per_grid * tokens_per_second).long()
    axes = torch.meshgrid(time, torch.arange(h), torch.arange(w), indexing="ij")
    return torch.stack([axis.flatten() for axis in axes])


@dataclass(frozen=True)
class MediaSpan:
    """Where one image or video stands in a prompt: tokens start to stop, the index among its kind, grid in patches."""

    start: int
    stop: int
    is_image: bool
    index: int
    grid: tuple


def media_spans(prompt, spec):
    """The prompt's images and videos in order of appearance. Raises ValueError, naming the sample, where placeholder
    tokens and grids disagree."""
    grids = {True: prompt.image_grid_thw, False: prompt.video_grid_thw}
    counts = {kind: 0 if grid is None else len(grid) for kind, grid in grids.items()}
    seen, spans, at = {True: 0, False: 0}, [], 0
    ids = prompt.input_ids.tolist()
    while at < len(ids):
        if ids[at] not in (spec.image_token_id, spec.video_token_id):
            at += 1
            continue
        is_image = ids[at] == spec.image_token_id
        index = seen[is_image]
        if index == counts[is_image]:
            raise ValueError(f"{prompt.sample.key}: more vision placeholders than images and videos")
        grid = tuple(grids[is_image][index].tolist())
        stop = at + grid[0] * grid[1] * grid[2] // spec.merge_size**2
        if ids[at:stop] != [ids[at]] * (stop - at):
            raise ValueError(f"{prompt.sample.key}: grid {grid} needs {stop - at} placeholders in a row")
        spans.append(MediaSpan(at, stop, is_image, index, grid))
        seen[is_image], at = index + 1, stop
    if seen != counts:
        raise ValueError(f"{prompt.sample.key}: fewer vision placeholders than images and videos")
    return spans


def prompt_positions(prompt, spec):
    """Returns ((3, P) int64 positions, first position after the prompt) of one `video.prompt.Prompt`.

    spec: `grpo.engine.model.ModelSpec` (placeholder ids, merge size, tokens per second). Raises as `media_spans`.
    """
    parts, at, position = [], 0, 0

    def add(part):
        nonlocal position
        if part.shape[1]:
            parts.append(part + position)
            position = int(parts[-1].max()) + 1

    for span in media_spans(prompt, spec):
        add(torch.arange(span.start - at).expand(3, -1))
        seconds = 0.0 if span.is_image else prompt.seconds_per_grid[span.index]
        add(vision_grid_positions(span.grid, spec.merge_size, seconds, spec.tokens_per_second))
        at = span.stop
    add(torch.arange(len(prompt.input_ids) - at).expand(3, -1))
    return torch.cat(parts, dim=1), position
