"""Multimodal rotary positions, by the rule that Qwen2-VL's and Qwen2.5-VL's weights were trained with.

Text counts up by one on all three axes (time, height, width). A video or image starts one after the largest position so
far and lays its merged grid on the three axes; the text after it starts one after the largest position of the *whole*
grid, time included. transformers >= 5 instead continues from max(height, width), so that on a video with more time
steps than merged rows or columns text overlaps time; transformers <= 4.57 and vLLM follow the rule below.
"""

import torch


def vision_grid_positions(grid, merge_size, seconds_per_grid, tokens_per_second):
    """Returns the (3, t·h·w / merge²) positions of one image or video, counted from zero.

    grid: (t, h, w) in patches. Time steps are `int(step · seconds_per_grid · tokens_per_second)` apart for Qwen2.5-VL
    (both given; an image has 0 seconds) and 1 apart for Qwen2-VL (tokens_per_second None).
    """
    t, h, w = int(grid[0]), int(grid[1]) // merge_size, int(grid[2]) // merge_size
    time = torch.arange(t)
    if tokens_per_second is not None:
        time = (time * seconds_per_grid * tokens_per_second).long()
    axes = torch.meshgrid(time, torch.arange(h), torch.arange(w), indexing="ij")
    return torch.stack([axis.flatten() for axis in axes])


def prompt_positions(prompt, spec):
    """Returns ((3, P) int64 positions, first position after the prompt) of one `video.prompt.Prompt`.

    spec: `grpo.model.ModelSpec` (placeholder ids, merge size, tokens per second).
    Raises ValueError where placeholders and grids disagree, naming the sample.
    """
    images = iter([] if prompt.image_grid_thw is None else prompt.image_grid_thw.tolist())
    videos = iter([] if prompt.video_grid_thw is None else prompt.video_grid_thw.tolist())
    seconds = iter(prompt.seconds_per_grid)
    ids = prompt.input_ids.tolist()
    parts, start, i = [], 0, 0
    while i < len(ids):
        if ids[i] in (spec.image_token_id, spec.video_token_id):
            is_image = ids[i] == spec.image_token_id
            grid = next(images if is_image else videos, None)
            if grid is None:
                raise ValueError(f"{prompt.sample.key}: more vision placeholders than images and videos")
            part = vision_grid_positions(grid, spec.merge_size, 0.0 if is_image else next(seconds), spec.tokens_per_second)
            if ids[i : i + part.shape[1]] != [ids[i]] * part.shape[1]:
                raise ValueError(f"{prompt.sample.key}: grid {grid} needs {part.shape[1]} placeholders in a row")
        else:
            end = i
            while end < len(ids) and ids[end] not in (spec.image_token_id, spec.video_token_id):
                end += 1
            part = torch.arange(end - i).expand(3, -1)
        parts.append(part + start)
        start = int(parts[-1].max()) + 1
        i += part.shape[1]
    if next(images, None) is not None or next(videos, None) is not None:
        raise ValueError(f"{prompt.sample.key}: fewer vision placeholders than images and videos")
    return torch.cat(parts, dim=1), start
