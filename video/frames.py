"""Frames and images, picked and resized as qwen-vl-utils 0.0.14 does, which is how the published weights saw them.

Departures, each with its reason:
- One sampling stage. Open-R1-Video samples at 2 fps and then spreads 16 frames over the result, which rounds twice and
  repeats frames of short clips. Here `fps` and `max_frames` act together, once, on the original frame numbers.
- `smart_resize` never returns a side of 0 (qwen-vl-utils can, for a picture 30 high and 6000 wide, and then fails).
- PyAV decodes, and a frame is what its decoder shows. qwen-vl-utils reads by decord, which counts and shows frames that
  an edit list hides, and takes wrong ones, without a word, from AVI, MPEG-2, WMV, HEVC, open GOPs and joined clips.
- A file that cannot be read raises; qwen-vl-utils tries another reader.
- A folder of frames is a video like any other: its frames are sampled too, no frame is repeated to make their number
  even, and they are resized once (qwen-vl-utils takes all, repeats the last, and first resizes to multiples of 56).
- Above MAX_FRAME_PIXELS nothing is decoded: a file of a few kB can claim a frame of many GB.
- Frames stay uint8. qwen-vl-utils resizes in uint8 as well, so its float frames hold the same integers.

As in qwen-vl-utils, the time of a frame is its number / the average rate. So clips (`video_start`) of a file whose
frame rate varies can show other seconds than those asked for.
"""

import math
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from itertools import accumulate, chain
from typing import NamedTuple

import av
import numpy as np
import torch
from av.video.frame import PictureType
from av.video.reformatter import VideoReformatter
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resize

from video.formats import WHOLE, Clip
from video.settings import VideoSettings

FRAME_FACTOR = 2  # frames come in pairs: the vision tower's temporal patch
MAX_RATIO = 200  # a longer strip than this is refused, as the model's own processor does
VIDEO_MAX_TOKENS = 768  # per frame, qwen-vl-utils' ceiling whatever max_pixels says
FOLDER_FPS = 2.0  # of a folder of frames whose row has no sample_fps, as in qwen-vl-utils
FRAME_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF")  # PIL knows more, and hands one of them (EPS) to Ghostscript
MAX_FRAME_PIXELS = 64 * 2**20  # 8K has 33 million
CUT_FRAMES = 4  # at the end of a clip cut without coding again, among which some are left out
WHOLE_SHARE = 0.9  # of the frames that a header counts; a file with fewer is taken for a broken download
SEEK_CONTAINERS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")  # each packet has the time at which it is shown
SEEK_CODECS = ("h264", "hevc", "vp8", "vp9", "libdav1d")  # a decoder may begin at any of their key frames
SKIP_CODECS = ("h264", "hevc")  # frames that no other is predicted from can be left out, as late as at decoding
ALL = slice(None)  # of the frames that are picked of a video
CONTEXT_TOKENS = 128_000  # qwen-vl-utils' budget of a whole video is 90% of this, in merged patches

Numbered = Iterator[tuple[int | None, av.VideoFrame]]  # frames as they are decoded, each after its number if known


class Picked(NamedTuple):
    """Which frames of a video are taken."""

    numbers: list[int]  # of each frame in the video, from 0
    rate: float  # how many are taken of a second of video
    fps: float  # how many the video has

    @property
    def times(self) -> list[float]:
        """The seconds at which the frames are shown, counted from the start of the video, not of the clip."""
        return [number / self.fps for number in self.numbers]


class SampleError(ValueError):
    """A sample that cannot be used. `path` is the file at fault, "" if the text is; `reason` is one line."""

    def __init__(self, path: str, reason: str):
        super().__init__(path, reason)  # both in args, so that it survives pickling between processes
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class VideoError(SampleError):
    """A video or image file that cannot be read."""


@contextmanager
def blamed(path: str, what: str = "") -> Iterator[None]:
    """Turns an error of its block into a VideoError of `path`: `what` and the first line of the error.

    Decoders raise errors of many types on damaged files, so the block does nothing but read. The name of the type comes
    first if the text alone may say little: "IndexError: 3".
    """
    try:
        yield
    except VideoError:
        raise
    except Exception as error:
        text = getattr(error, "strerror", None) or str(error).strip()
        name = "" if text and isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
        raise VideoError(path, what + f"{name}{text.splitlines()[0] if text else ''}"[:200]) from error


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
    """How many frames to take of a video: even, between 2 and `total_frames`. Raises ValueError if no number fits.

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
    """The numbers of the first and last frame between clip.start and clip.end. Raises ValueError if there are not two.

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


def pick_frames(total_frames: int, video_fps: float, settings: VideoSettings, clip: Clip = WHOLE) -> Picked:
    """The frames to take. Raises ValueError if no frames fit.

    in: 90 frames at 30 per second, settings of 2 fps; out: Picked([0, 18, 36, 53, 71, 89], rate=2.0, fps=30.0)
    """
    if not (total_frames > 0 and 0 < video_fps < math.inf):
        raise ValueError(f"its header gives {total_frames} frames at {video_fps} per second")
    first, last = clip_range(total_frames, video_fps, clip)
    count = frame_count(last - first + 1, video_fps, settings)
    return Picked(frame_indices(first, last, count), count / (last - first + 1) * video_fps, video_fps)


def frame_indices(first: int, last: int, count: int) -> list[int]:
    """`count` frame numbers spread evenly from `first` to `last`, both included, rounded, never truncated.

    in: 0, 7, 4; out: [0, 2, 5, 7]
    """
    return torch.linspace(first, last, count).round().long().tolist()


def frame_size(height: int, width: int, count: int, settings: VideoSettings, factor: int) -> tuple[int, int]:
    """The (height, width) of each of `count` frames after resizing, in pixels. See `frame_limit`."""
    return smart_resize(height, width, factor, settings.min_pixels, frame_limit(count, settings, factor))


def frame_limit(count: int, settings: VideoSettings, factor: int) -> float:
    """The most pixels of each of `count` frames after resizing.

    The frames share the budget of the whole video, but never below 1.05 x min_pixels.
    Source: qwen_vl_utils.vision_process.fetch_video.
    """
    total = CONTEXT_TOKENS * factor * factor * 0.9 if settings.total_pixels is None else settings.total_pixels
    limit = max(min(VIDEO_MAX_TOKENS * factor**2, total / count * FRAME_FACTOR), int(settings.min_pixels * 1.05))
    return min(settings.max_pixels, limit)


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

    Height and width are as stored: a rotation flag may swap them, which changes no count of tokens. The last 65,536
    answers are kept, so that planning, decoding and later epochs open a video once. Raises VideoError.
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
    with _opened(path, "cannot be opened as a video: ") as (container, stream):
        height, width = stream.height, stream.width
        if height * width > MAX_FRAME_PIXELS:
            raise VideoError(path, f"its frames of {width} x {height} pixels are above the limit of {MAX_FRAME_PIXELS}")
        frames, fps = stream.frames, _rate(stream)
        index = stream.index_entries  # complete in mp4 and AVI: there no packet is read
        if not frames or len(index) != frames or any(entry.is_discard for entry in index):
            packets = _Packets(container, stream)
            frames, fps = packets.count, packets.fps
    if not (frames and fps and height and width):
        raise VideoError(path, "its header gives no frames, rate or size")
    return frames, fps, height, width


def plan_frames(path: str, settings: VideoSettings, factor: int, clip: Clip = WHOLE) -> tuple[Picked, tuple[int, int]]:
    """(the frames that `read_video` takes, their height and width), from the metadata alone. A header may be wrong
    about the number of frames. Raises VideoError."""
    total, fps, height, width = probe(path, clip)
    with blamed(path):
        picked = pick_frames(total, fps, settings, clip)
        return picked, frame_size(height, width, len(picked.numbers), settings, factor)


def frame_files(folder: str) -> list[str]:
    """The images of a folder of frames, in the order of the numbers in their names. Raises VideoError."""
    names = [name for name in os.listdir(folder) if name.lower().endswith(FRAME_SUFFIXES) and not name.startswith(".")]
    if not names:
        raise VideoError(folder, "is a folder without frames (.jpg, .png, .webp or .bmp)")
    parts = {name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)] for name in names}
    return [os.path.join(folder, name) for name in sorted(names, key=parts.get)]


def read_video(
    path: str, settings: VideoSettings, factor: int, clip: Clip = WHOLE, part: slice = ALL
) -> tuple[torch.Tensor, Picked]:
    """(frames, uint8 (T, 3, H, W) resized; which frames of the video all picked ones are, whatever the part).

    `factor` is the model's patch size x merge size: H and W are multiples of it. part: which of the picked frames are
    read. Raises VideoError.
    """
    probe(path, clip)  # refuses frames that are too large
    reader = _read_folder if os.path.isdir(path) else _read_file
    with blamed(path):
        return reader(path, settings, factor, clip, part)


def image_size(path: str, settings: VideoSettings, factor: int) -> tuple[int, int]:
    """The (height, width) that `read_image` would return, from the image's header alone. Raises VideoError."""
    with _open_image(path) as image, blamed(path):
        return smart_resize(image.height, image.width, factor, settings.image_min_pixels, settings.image_max_pixels)


def read_image(path: str, settings: VideoSettings, factor: int) -> torch.Tensor:
    """An image, uint8 (3, H, W), on white if transparent, resized by PIL as in qwen-vl-utils. Raises VideoError."""
    size = image_size(path, settings, factor)
    with _open_image(path) as image:
        return _pixels(path, image, size)


def _pixels(path: str, image: Image.Image, size: tuple[int, int]) -> torch.Tensor:
    with blamed(path, "cannot be decoded: "):
        if image.mode == "RGBA":
            opaque = Image.new("RGB", image.size, (255, 255, 255))
            opaque.paste(image, mask=image.split()[3])
        else:
            opaque = image.convert("RGB")
        pixels = np.array(opaque.resize(size[::-1]))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _open_image(path: str) -> Image.Image:
    check_file(path)
    with blamed(path, "cannot be opened as an image: "), warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return Image.open(path, formats=IMAGE_FORMATS)


class _Packets:
    """What the packets of a video tell, in the order of decoding: reads the container to its end, decodes nothing.

    - count: how many frames are shown. A packet that its container hides, as an edit list does, is no frame. Nor is a
      packet that is shown before the first key frame: no decoder can predict it from anything.
    - fps: frames shown a second
    - told: how many frames the header says there are; 0 or less if it does not say
    - numbers: time -> number of the frame shown then; None if times cannot be relied on
    - times, keys: of each packet, when its frame is shown and whether it is a key frame
    """

    def __init__(self, container, stream):
        packets = (item for item in container.demux(stream) if item.size)
        found = [(item.pts, item.is_keyframe, item.is_discard, item.dts) for item in packets]
        self.times, self.keys = [time for time, *_ in found], [key for _, key, *_ in found]
        shown, self.numbers = [time for time, _, hidden, _ in found if not hidden], None
        hidden = len(found) - len(shown)
        self.told, self.fps = stream.frames - hidden, _rate(stream)
        clock = [ticks for *_, ticks in found if ticks is not None]
        if container.format.name == "avi" and len(clock) > 1 and clock[-1] - clock[0] >= len(clock):
            ticks = (clock[-1] - clock[0]) / (len(clock) - 1)  # of a frame: it may last several; the header counts them
            self.told, self.fps = round(self.told / ticks), float(1 / (ticks * stream.time_base))
        decoder, timed = stream.codec_context, container.format.name in SEEK_CONTAINERS
        if timed and decoder.name in SEEK_CODECS and self._in_order(decoder.has_b_frames):
            shown = sorted(time for time in shown if time >= self.times[0])
            self.numbers = {time: number for number, time in enumerate(shown)}
            evenly = shown[:-CUT_FRAMES]
            if hidden and len(evenly) > 1:  # average_rate may count hidden frames
                self.fps = float((len(evenly) - 1) / ((evenly[-1] - evenly[0]) * stream.time_base))
        self.count = len(shown)

    def _in_order(self, reordered: bool) -> bool:
        """Whether the times can be relied on: the first packet is a key frame, and all frames decoded before a key
        frame are shown before all frames decoded from it on.

        If frames are `reordered`, times that only rise are times of decoding, as of a raw stream copied into an mp4.
        """
        if None in self.times or len(set(self.times)) < len(self.times) or not any(self.keys[:1]):
            return False
        latest = list(accumulate(self.times, max))
        if reordered and latest == self.times:
            return False
        earliest = list(accumulate(reversed(self.times), min))[::-1]
        return all(latest[at - 1] < earliest[at] for at, key in enumerate(self.keys) if key and at)

    def needed(self, wanted: list[int]) -> bytearray:
        """1 for each packet that has to be decoded to show the frames `wanted`, else 0; and a 0 after the last packet.

        in: packets of 6 frames in the order they are shown, key frames 0 and 3, wanted [4]; out: 0 0 0 1 1 0 0
        """
        needed, key, before = bytearray(len(self.times) + 1), 0, 0  # the last key frame, and the one before it
        wanted = set(wanted)
        for at, time in enumerate(self.times):
            if self.keys[at]:
                key, before = at, key
            if self.numbers.get(time) in wanted:
                begin = key if time >= self.times[key] else before  # open GOP: shown before the key frame it follows
                needed[begin : at + 1] = b"\1" * (at + 1 - begin)
        return needed


def _read_file(path: str, settings: VideoSettings, factor: int, clip: Clip, part: slice) -> tuple[torch.Tensor, Picked]:
    """As `read_video`. Decodes what the frames need, or all up to the last picked one if that is not known for sure."""
    with _opened(path, "cannot be decoded: ") as (container, stream):
        packets = _Packets(container, stream)
    _check_whole(path, packets.count, packets.told)
    picked, found = pick_frames(packets.count, packets.fps, settings, clip), {}
    size_of = lambda height, width: frame_size(height, width, len(picked.numbers), settings, factor)
    indices, last = picked.numbers[part], picked.numbers[-1]
    if packets.numbers:
        with suppress(VideoError):  # damaged, or not as its packets say: then all is decoded, which decides
            found, _ = _take(_decode_needed(path, packets, indices), indices, indices[-1], size_of)
    if len(found) < len(indices):
        to_end = last == packets.count - 1
        found, count = _take(_decode_all(path), indices, math.inf if to_end else last, size_of)
        if count <= last or to_end and count != packets.count:  # a packet need not be a frame in every codec
            _check_whole(path, count, packets.told)
            picked = pick_frames(count, packets.fps, settings, clip)
            indices = picked.numbers[part]
            found, _ = _take(_decode_all(path), indices, indices[-1], size_of)
    if missing := len(indices) - len(found):
        raise VideoError(path, f"cannot be decoded: {missing} of the {len(indices)} frames chosen are damaged")
    return torch.cat([found[index] for index in indices]), picked


def _decode_all(path: str) -> Numbered:
    """Yields (number, frame) of every frame."""
    with _opened(path, "cannot be decoded: ") as (container, stream):
        yield from enumerate(container.decode(stream))


def _decode_needed(path: str, packets: _Packets, wanted: list[int]) -> Numbered:
    """Yields (number, frame) of the frames `wanted` and of some more, decoding little else.

    If decoding begins within the file, the numbers are None unless the first frame is intra-coded: with x264's
    intra-refresh a "key frame" is a damaged picture, complete only a second later. Raises VideoError if frames do not
    come in the order of their times.
    """
    needed, wanted, decoding, latest = packets.needed(wanted), set(wanted), 0, -math.inf
    with _opened(path, "cannot be decoded: ") as (container, stream):
        decoder = stream.codec_context
        found = (packet for packet in container.demux(stream) if packet.size)
        for position, (packet, decode) in enumerate(zip(chain(found, (None,)), needed)):
            frames = []
            if decode:
                if not decoding:
                    begin, whole = packet.pts, position == 0
                if decoder.name in SKIP_CODECS:
                    decoder.skip_frame = "DEFAULT" if packets.numbers.get(packet.pts) in wanted else "NONREF"
                frames = decoder.decode(packet)
            elif decoding:  # a gap: get what the decoder still holds, and make it ready for the next key frame
                frames = decoder.decode(None)
                decoder.flush_buffers()
            decoding = decode
            for frame in frames:
                if frame.pts <= latest:
                    raise VideoError(path, "its frames are shown in another order than the times of its packets say")
                latest = frame.pts
                whole = whole or frame.pts == begin and frame.pict_type == PictureType.I
                yield packets.numbers.get(frame.pts) if whole else None, frame


def _take(frames: Numbered, wanted: list[int], last: float, size_of: Callable) -> tuple[dict[int, torch.Tensor], int]:
    """({number: frame (1, 3, H, W), resized} of the frames `wanted` that are not damaged, how many frames came).

    It stops at the frame `last`; math.inf: at the end, to count all. size_of: see `frame_size`.
    """
    converter, found, seen = VideoReformatter(), {}, 0
    for seen, (number, frame) in enumerate(frames, 1):
        if number in wanted and not frame.is_corrupt:
            if not found:
                width, height = frame.width, frame.height  # of all frames: they may change within a file
            image = converter.reformat(frame, width, height, "rgb24", interpolation="BICUBIC", threads=1)
            upright = np.ascontiguousarray(np.rot90(image.to_ndarray(), frame.rotation // 90 % 4))
            tensor, size = torch.from_numpy(upright).permute(2, 0, 1)[None], size_of(*upright.shape[:2])
            found[number] = resize(tensor, list(size), interpolation=InterpolationMode.BICUBIC, antialias=True)
        if number == last:
            break
    return found, seen


def _read_folder(
    path: str, settings: VideoSettings, factor: int, clip: Clip, part: slice
) -> tuple[torch.Tensor, Picked]:
    """As `read_video`, of a folder of frames; PIL resizes them as it does images, as qwen-vl-utils does with a list."""
    picked, size = plan_frames(path, settings, factor, clip)
    files, frames, (*_, height, width) = frame_files(path), [], probe(path, clip)
    for file in (files[number] for number in picked.numbers[part]):
        with _open_image(file) as image:
            if image.size != (width, height):
                raise VideoError(path, f"{os.path.basename(file)} is {image.size}, the first frame {(width, height)}")
            frames.append(_pixels(file, image, size))
    return torch.stack(frames), picked


@contextmanager
def _opened(path: str, what: str) -> Iterator[tuple]:
    """Gives (container, video stream) of a file; an error in reading it becomes a VideoError, after `what`."""
    with blamed(path, what), av.open(path, metadata_errors="replace") as container:
        stream = container.streams.best("video")
        if stream is None:
            raise VideoError(path, "has no video stream")
        if stream.codec_context is None:
            raise VideoError(path, "its video stream is of a kind that no decoder here knows")
        stream.codec_context.thread_count = 1  # processes, not threads, decode in parallel
        stream.codec_context.options = {"max_pixels": str(MAX_FRAME_PIXELS)}  # of any frame: the header may say less
        yield container, stream


def _rate(stream) -> float:
    return float(stream.average_rate or stream.guessed_rate or 0)


def _check_whole(path: str, count: int, told: int) -> None:
    if count < WHOLE_SHARE * told:  # else the frames would be those of another, shorter stretch of time
        raise VideoError(path, f"is cut short: holds {count} of the {told} frames that its header tells of")
