"""The pictures in a Prompt as the model saw them."""

import math

import torch
from transformers import ProcessorMixin

from video.prompt import Prompt, own_steps


def frames_of(prompt: Prompt, processor: ProcessorMixin) -> list[torch.Tensor]:
    """One uint8 tensor (T, 3, H, W) for each video of the prompt, then one with T = 1 for each image: the patches are
    put together again, and their normalisation is undone. Of the prompt's share, if processes share it."""
    of_images, of_videos = own_steps(prompt.image_grid_thw, prompt.video_grid_thw, prompt.share)
    media = (
        (prompt.pixel_values_videos, prompt.video_grid_thw, of_videos, processor.video_processor, 1),
        # an image is a frame shown twice
        (prompt.pixel_values, prompt.image_grid_thw, of_images, processor.image_processor, 2),
    )
    shown = []
    for pixels, grids, steps, cutter, every in media:
        own = [[len(taken), *grid[1:]] for grid, taken in zip([] if pixels is None else grids.tolist(), steps) if taken]
        patches = pixels.split([math.prod(grid) for grid in own]) if own else ()
        shown += [_unpatch(cut, grid, cutter)[::every] for cut, grid in zip(patches, own)]
    return shown


def _unpatch(patches: torch.Tensor, grid: list[int], cutter) -> torch.Tensor:
    """The frames of one video or image, from its patches; `cutter` is the processor that cut them.

    in:  patches (16, 1176), grid [4, 2, 2]: 4 time steps of 2 frames, 2 rows and 2 columns of 14 x 14 pixels
    out: (8, 3, 28, 28)
    """
    (time, rows, columns), size, merge, pair = grid, cutter.patch_size, cutter.merge_size, cutter.temporal_patch_size
    cut = patches.view(time, rows // merge, columns // merge, merge, merge, 3, pair, size, size)
    frames = cut.permute(0, 6, 5, 1, 3, 7, 2, 4, 8).reshape(time * pair, 3, rows * size, columns * size)
    mean, std = (torch.tensor(values)[:, None, None] for values in (cutter.image_mean, cutter.image_std))
    return ((frames * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def strip(frames: torch.Tensor) -> torch.Tensor:
    """Frames (T, 3, H, W) side by side: (3, H, T·W)."""
    return torch.cat(list(frames), dim=2)
