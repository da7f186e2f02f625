"""Frames and images, chosen and resized as qwen-vl-utils 0.0.14 does, which is how the published weights saw them.

Departures, each with its reason:
- One sampling stage. Open-R1-Video samples at 2 fps and then spreads 16 frames over the result, which rounds twice and
  repeats frames of short clips; here `fps` and `max_frames` act together, once, on the original frame numbers.
- `smart_resize` never returns a side of 0 (qwen-vl-utils can, for a picture 30 high and 6000 wide, and then fails).
- A file that cannot be read raises; qwen-vl-utils tries another reader.
- A folder of frames is a video like any other: its frames are sampled too, none is repeated to make their number even,
  and they are resized once (qwen-vl-utils takes all, repeats the last, and first resizes to multiples of 56).
- Above MAX_FRAME_PIXELS nothing is decoded: a file of a few kB can claim a frame of many GB.
- Frames stay uint8. qwen-vl-utils resizes in uint8 as well, so its float frames hold the same integers.
"""
import math
import os
import re
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial

import av
import numpy as np
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resize

from video.formats import WHOLE, Clip

try:
    import decord
except ImportError:  # no wheel on Arm and macOS: PyAV decodes there
    decord = None
else:
    decord.logging.set_level(decord.logging.QUIET)  # FFmpeg's complaints; what matters is in the error raised

FRAME_FACTOR = 2  # frames come in pairs: the vision tower's temporal patch
MAX_RATIO = 200  # a longer strip than this is refused, as the model's own processor does
VIDEO_MAX_TOKENS = 768  # per frame, qwen-vl-utils' ceiling whatever max_pixels says
FOLDER_FPS = 2.0  # of a folder of frames, where its row does not say; qwen-vl-utils' sample_fps
FRAME_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
MAX_FRAME_PIXELS = 64 * 2**20  # 8K has 33 million
WHOLE_SHARE = 0.9  # of the frames that a header tells of; a file with fewer is taken for a broken download
DECODE_CHUNK = 8  # frames held at full size at a time, so that memory does not grow with their number
CONTEXT_TOKENS = 128_000  # qwen-vl-utils' budget of a whole video is 90% of this, in merged patches


class SampleError(ValueError):
    """Why one sample cannot be used. `path` is the file at fault, `reason` one line."""

    def __init__(self, path: str, reason: str):
        super().__init__(path, reason)  # both in args, so that it survives pickling between processes
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class VideoError(SampleError):
    """A video or image file that cannot be read."""


@contextmanager
def blamed(path: str, what: str = "", errors: tuple[type[Exception], ...] = (ValueError,)):
    """Turns `errors` of its block, which name no file, into a VideoError of `path`: `what` and their first line."""
    try:
        yield
    except VideoError:  # a ValueError, that has its path
        raise
    except errors as error:
        raise VideoError(path, what + _one_line(error)) from error


@dataclass(frozen=True)
class VideoSettings:
    """How frames are chosen and sized. Pixels are counted per frame, after resizing."""

    fps: float = 2.0  # frames taken per second of video, within min_frames and max_frames
    nframes: int | None = None  # take exactly this many frames instead (rounded to even), whatever the length
    min_frames: int = 4  # at least so many frames, where the video has them (rounded up to even)
    max_frames: int = 16  # at most so many frames (rounded down to even)
    min_pixels: int = 128 * 28 * 28  # smaller frames are enlarged to this
    max_pixels: int = 196 * 28 * 28  # larger frames are reduced to this
    total_pixels: int | None = None  # bound on frames x pixels / 2 of one video; None: 115,200 tokens' worth
    image_min_pixels: int = 4 * 28 * 28  # smaller images are enlarged to this
    image_max_pixels: int = 1280 * 28 * 28  # larger images are reduced to this

    def __post_init__(self):
        rules = (
            (self.fps > 0, "--fps must be above 0"),
            (self.nframes is None or self.nframes >= FRAME_FACTOR, "--nframes must be 2 or more"),
            (self.min_frames >= 1, "--min_frames must be 1 or more"),
            (self.max_frames >= max(FRAME_FACTOR, self.min_frames), "--max_frames must be >= 2 and >= --min_frames"),
            (0 < self.min_pixels <= self.max_pixels, "--min_pixels must be above 0 and <= --max_pixels"),
            (self.total_pixels is None or self.total_pixels > 0, "--total_pixels must be above 0"),
            (0 < self.image_min_pixels <= self.image_max_pixels, "--image_min_pixels must be <= --image_max_pixels"),
        )
        for holds, message in rules:
            if not holds:
                raise ValueError(message)


def smart_resize(height: int, width: int, factor: int, min_pixels: float, max_pixels: float) -> tuple[int, int]:
    """The (height, width) nearest to the given shape with sides divisible by `factor` and area within the bounds.

    Raises ValueError for a side ratio above 200. Source: qwen_vl_utils.vision_process.smart_resize.
    """
    if min(height, width) < 1 or max(height, width) / min(height, width) > MAX_RATIO:
        raise ValueError(f"sides {height}x{width} differ by more than {MAX_RATIO} times")
    h = max(factor, round(height / factor) * factor)
    w = max(factor, round(width / factor) * factor)
    if h * w > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        h = max(factor, math.floor(height / shrink / factor) * factor)
        w = max(factor, math.floor(width / shrink / factor) * factor)
    elif h * w < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        h = math.ceil(height * grow / factor) * factor
        w = math.ceil(width * grow / factor) * factor
    return h, w


def frame_count(total_frames: int, video_fps: float, settings: VideoSettings) -> int:
    """How many frames to take of a video: even, between 2 and `total_frames`. Raises ValueError where none fits.

    Source: qwen_vl_utils.vision_process.smart_nframes.
    """
    if settings.nframes is not None:
        count = round(settings.nframes / FRAME_FACTOR) * FRAME_FACTOR
    else:
        low = math.ceil(settings.min_frames / FRAME_FACTOR) * FRAME_FACTOR
        high = math.floor(settings.max_frames / FRAME_FACTOR) * FRAME_FACTOR
        wanted = min(max(total_frames / video_fps * settings.fps, low), high, total_frames)
        count = math.floor(wanted / FRAME_FACTOR) * FRAME_FACTOR
    if not FRAME_FACTOR <= count <= total_frames:
        lower = "; lower --nframes" if settings.nframes and total_frames >= FRAME_FACTOR else ""
        raise ValueError(f"has {total_frames} frames, {max(count, FRAME_FACTOR)} are needed{lower}")
    return count


def clip_range(total_frames: int, video_fps: float, clip: Clip) -> tuple[int, int]:
    """The numbers of the first and last frame between clip.start and clip.end. Raises ValueError where there are none.

    Source: qwen_vl_utils.vision_process.calculate_video_frame_range.
    """
    length = total_frames / video_fps
    first, last = 0, total_frames - 1
    if clip.start is not None:
        first = math.ceil(min(clip.start, length) * video_fps)
    if clip.end is not None:
        last = min(math.floor(min(clip.end, length) * video_fps), last)
    if first >= last and (clip.start, clip.end) != (None, None):
        raise ValueError(f"has no two frames from {clip.start} to {clip.end} s; it lasts {length:.2f} s")
    return first, last


def choose(total_frames: int, video_fps: float, settings: VideoSettings, clip: Clip = WHOLE) -> tuple[list[int], float]:
    """(numbers of the frames to take, how many of them there are per second). Raises ValueError where none fit."""
    if not (total_frames > 0 and 0 < video_fps < math.inf):
        raise ValueError(f"its header gives {total_frames} frames at {video_fps} per second")
    first, last = clip_range(total_frames, video_fps, clip)
    count = frame_count(last - first + 1, video_fps, settings)
    return frame_indices(first, last, count), count / (last - first + 1) * video_fps


def frame_indices(first: int, last: int, count: int) -> list[int]:
    """`count` frame numbers spread evenly from `first` to `last`, both included, rounded (never truncated)."""
    return torch.linspace(first, last, count).round().long().tolist()


def frame_size(height: int, width: int, count: int, settings: VideoSettings, factor: int) -> tuple[int, int]:
    """The (height, width) of each of `count` frames after resizing, in pixels.

    The budget of the whole video is shared by its frames, but never below 1.05 x min_pixels.
    Source: qwen_vl_utils.vision_process.fetch_video.
    """
    total = CONTEXT_TOKENS * factor * factor * 0.9 if settings.total_pixels is None else settings.total_pixels
    limit = max(min(VIDEO_MAX_TOKENS * factor**2, total / count * FRAME_FACTOR), int(settings.min_pixels * 1.05))
    return smart_resize(height, width, factor, settings.min_pixels, min(settings.max_pixels, limit))


def check_file(path: str) -> None:
    """Raises VideoError unless `path` is a file with something in it."""
    if not os.path.exists(path):
        raise VideoError(path, "no such file; --video_root says where to look")
    if not os.path.isfile(path):
        raise VideoError(path, "is not a file")
    if os.path.getsize(path) == 0:
        raise VideoError(path, "is empty (0 bytes)")


def probe(path: str, clip: Clip = WHOLE) -> tuple[int, float, int, int]:
    """(frames, frames per second, height, width) of a video from its metadata; no frame is decoded.

    Height and width are those stored: a rotation flag may swap them, which changes no count of tokens. The last
    65,536 answers are kept: planning, decoding and later epochs open a video once. Raises VideoError.
    """
    if os.path.isdir(path):
        files = frame_files(path)
        with _open_image(files[0]) as image:
            width, height = image.size
        return len(files), clip.fps or FOLDER_FPS, height, width
    check_file(path)
    status = os.stat(path)
    return _probe(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=2**16)
def _probe(path: str, *_) -> tuple[int, float, int, int]:
    errors = (av.FFmpegError, OSError, ValueError)
    with blamed(path, "cannot be opened as a video: ", errors), av.open(path) as container:
        stream = _video_stream(container, path)
        fps, height, width = stream.average_rate, stream.height, stream.width
        if height * width > MAX_FRAME_PIXELS:
            raise VideoError(path, f"its frames of {width} x {height} pixels are above the limit of {MAX_FRAME_PIXELS}")
        frames = stream.frames or sum(packet.size > 0 for packet in container.demux(stream))
    if not (frames and fps and height and width):
        raise VideoError(path, "its header gives no frames, rate or size")
    return frames, float(fps), height, width


def frame_files(folder: str) -> list[str]:
    """The images of a folder of frames, in the order of the numbers in their names. Raises VideoError."""
    names = [name for name in os.listdir(folder) if name.lower().endswith(FRAME_SUFFIXES) and not name.startswith(".")]
    if not names:
        raise VideoError(folder, "is a folder without frames (.jpg, .png, .webp or .bmp)")
    parts = {name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)] for name in names}
    return [os.path.join(folder, name) for name in sorted(names, key=parts.get)]


def read_video(path: str, settings: VideoSettings, factor: int, clip: Clip = WHOLE) -> tuple[torch.Tensor, float]:
    """The chosen frames, uint8 (T, 3, H, W) resized, and how many of them there are per second of video.

    `factor` is the model's patch size x merge size: H and W are multiples of it. Raises VideoError.
    """
    probe(path, clip)  # for the limit of the frames' size
    reader = _read_folder if os.path.isdir(path) else _read_pyav if decord is None else _read_decord
    with blamed(path):
        return reader(path, settings, factor, clip)


def image_size(path: str, settings: VideoSettings, factor: int) -> tuple[int, int]:
    """The (height, width) that `read_image` would return, from the image's header alone. Raises VideoError."""
    with _open_image(path) as image, blamed(path):
        return smart_resize(image.height, image.width, factor, settings.image_min_pixels, settings.image_max_pixels)


def read_image(path: str, settings: VideoSettings, factor: int) -> torch.Tensor:
    """An image, uint8 (3, H, W), on white where transparent, resized by PIL as in qwen-vl-utils. Raises VideoError."""
    size = image_size(path, settings, factor)
    with _open_image(path) as image:
        return _pixels(path, image, size)


def _pixels(path: str, image: Image.Image, size: tuple[int, int]) -> torch.Tensor:
    with blamed(path, "cannot be decoded: ", (OSError, SyntaxError, ValueError)):  # what PIL raises on damaged data
        if image.mode == "RGBA":
            opaque = Image.new("RGB", image.size, (255, 255, 255))
            opaque.paste(image, mask=image.split()[3])
        else:
            opaque = image.convert("RGB")
        pixels = np.array(opaque.resize(size[::-1]))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _open_image(path: str) -> Image.Image:
    check_file(path)
    errors = (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning)
    with blamed(path, "cannot be opened as an image: ", errors), warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return Image.open(path)


def _read_decord(path: str, settings: VideoSettings, factor: int, clip: Clip) -> tuple[torch.Tensor, float]:
    try:
        reader = decord.VideoReader(path, num_threads=1)  # processes, not threads, decode in parallel
        told = probe(path)[0]
        if len(reader) < WHOLE_SHARE * told:  # else the frames would be those of another, shorter stretch of time
            raise VideoError(path, f"is cut short: holds {len(reader)} of the {told} frames that its header tells of")
        indices, rate = choose(len(reader), reader.get_avg_fps(), settings, clip)
        size = partial(frame_size, count=len(indices), settings=settings, factor=factor)
        frames = [
            _resize(reader.get_batch(indices[start : start + DECODE_CHUNK]).asnumpy(), size)
            for start in range(0, len(indices), DECODE_CHUNK)
        ]
    except (decord.DECORDError, RuntimeError, IndexError, OSError) as error:
        if "must exactly match" in str(error):  # decord 0.6 cannot copy frames 8 to 72 pixels wide, some of them
            return _read_pyav(path, settings, factor, clip)
        raise VideoError(path, f"cannot be decoded: {_one_line(error)}") from error
    return torch.cat(frames), rate


def _read_pyav(path: str, settings: VideoSettings, factor: int, clip: Clip) -> tuple[torch.Tensor, float]:
    """As `_read_decord`. Decodes from the start to the last frame wanted: measured faster than seeking."""
    total, fps, _, _ = probe(path)
    indices, rate = choose(total, fps, settings, clip)
    size = partial(frame_size, count=len(indices), settings=settings, factor=factor)
    wanted, found = set(indices), {}
    with blamed(path, "cannot be decoded: ", (av.FFmpegError, OSError)), av.open(path) as container:
        stream = _video_stream(container, path)
        stream.codec_context.thread_count = 1
        for number, frame in enumerate(container.decode(stream)):
            if number in wanted:
                upright = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90 % 4)  # decord turns too
                found[number] = _resize(np.ascontiguousarray(upright)[None], size)
            if number == indices[-1]:
                break
    if len(found) < len(wanted):
        raise VideoError(path, f"cannot be decoded: {len(wanted) - len(found)} of {len(wanted)} frames are missing")
    return torch.cat([found[i] for i in indices]), rate


def _read_folder(path: str, settings: VideoSettings, factor: int, clip: Clip) -> tuple[torch.Tensor, float]:
    """As `_read_decord`, of a folder of frames; resized by PIL as images are, as qwen-vl-utils does with a list."""
    files = frame_files(path)
    total, fps, height, width = probe(path, clip)
    indices, rate = choose(total, fps, settings, clip)
    size = frame_size(height, width, len(indices), settings, factor)
    frames = []
    for file in (files[i] for i in indices):
        with _open_image(file) as image:
            if image.size != (width, height):
                raise VideoError(path, f"{os.path.basename(file)} is {image.size}, the first frame {(width, height)}")
            frames.append(_pixels(file, image, size))
    return torch.stack(frames), rate


def _resize(frames: np.ndarray, size: Callable[[int, int], tuple[int, int]]) -> torch.Tensor:
    """Frames (T, H, W, 3) as (T, 3, *size(H, W)), both uint8."""
    tensor = torch.from_numpy(frames).permute(0, 3, 1, 2)
    return resize(tensor, list(size(*tensor.shape[2:])), interpolation=InterpolationMode.BICUBIC, antialias=True)


def _video_stream(container, path: str):
    if not container.streams.video:
        raise VideoError(path, "has no video stream")
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise VideoError(path, "its video stream is of a kind that no decoder here knows")
    return stream


def _one_line(error: BaseException) -> str:
    """An error's first line, without the time and place in its own source that decord puts before it."""
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return re.sub(r"\[[\d:]+\] \S+:\d+: ", "", text.splitlines()[0])[:200]
