"""What the video tests share: small real videos, and encoders that misbehave inside a worker process."""

import os
import struct
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch

from demo.synthetic import write_video
from video.dataset import Sample
from video.frames import VideoSettings
from video.prompt import Prompt

PIXELS = {"ffv1": "bgr0", "gif": "rgb8", "mjpeg": "yuvj420p", "prores": "yuv422p10le"}  # of codecs without yuv420p
SMALL = VideoSettings(nframes=8, min_pixels=28 * 28, max_pixels=4 * 28 * 28)


def blocks(frames: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Frames (T, H, W, 3) of coloured blocks, all different, so that a wrong frame number shows in the pixels."""
    coarse = np.random.default_rng(seed).integers(0, 255, (frames, -(-height // 8), -(-width // 8), 3), dtype=np.uint8)
    return coarse.repeat(8, axis=1).repeat(8, axis=2)[:, :height, :width]


def make_video(path: Path, frames: int = 8, height: int = 28, width: int = 28, fps: int = 2, seed: int = 0) -> str:
    write_video(path, blocks(frames, height, width, seed), fps)
    return str(path)


def rotated(content: bytes, degrees: int) -> bytes:
    """An mp4 with its track header's matrix set to turn the picture clockwise by 90, 180 or 270 degrees."""
    at = content.index(b"tkhd") + 44  # version 0: the matrix follows 40 bytes of other fields
    a, b, c, d = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[degrees]
    matrix = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    return content[:at] + matrix + content[at + 36 :]


def encode(
    path: Path,
    frames,
    times: list[int] | None = None,
    codec: str = "libx264",
    rate: int = 10,
    options: dict | None = None,
) -> str:
    """A video of frames (H, W, 3), with any codec and, where given, a time for each frame in ticks of 1/100 s: a
    variable frame rate."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.pix_fmt = PIXELS.get(codec, "yuv420p")
        stream.options = options or ({"preset": "ultrafast"} if codec == "libx264" else {})
        if times:
            stream.codec_context.time_base = Fraction(1, 100)
        for number, pixels in enumerate(frames):
            if number == 0:
                stream.height, stream.width = pixels.shape[:2]
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            if times:
                frame.pts, frame.time_base = times[number], Fraction(1, 100)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return str(path)


def make_broken(folder: Path) -> dict[str, str]:
    """Files that cannot be read, by name: what happens to downloads."""
    whole = Path(make_video(folder / "whole.mp4", frames=40, height=64, width=96, fps=10)).read_bytes()
    contents = {
        "truncated": whole[: len(whole) // 2],
        "text": b"not a video\n" * 50,
        "zero_bytes": b"",
        "zeroed_span": whole[:2000] + bytes(len(whole) - 5000) + whole[-3000:],
    }
    paths = {}
    for name, content in contents.items():
        paths[name] = str(folder / f"{name}.mp4")
        Path(paths[name]).write_bytes(content)
    return paths | {"missing": str(folder / "missing.mp4"), "folder": str(folder)}


def assert_gone(pids):
    """A worker is another process's child, so no wait() tells: ask the system for a second."""
    for pid in pids:
        assert pid != os.getpid()
        for _ in range(20):
            try:
                os.kill(pid, 0)
                status = Path(f"/proc/{pid}/stat")
                if status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] == "Z":
                    break  # ended; it is for whoever adopted it to collect it
            except (ProcessLookupError, FileNotFoundError):
                break
            time.sleep(0.05)
        else:
            raise AssertionError(f"worker {pid} still runs")


class Misbehaving:
    """An encoder that obeys the sample's text: dies, sleeps, raises, or answers at once."""

    def __call__(self, sample: Sample, control: str | None) -> Prompt:
        if sample.problem == "die":
            os._exit(17)
        if sample.problem == "sleep":
            time.sleep(600)
        if sample.problem == "raise":
            raise RuntimeError("broken\nfor good")
        if sample.problem == "bad":
            raise ValueError("bad")
        if sample.problem == "slow":
            time.sleep(0.2)
        return Prompt(sample, torch.tensor([torch.get_num_threads(), os.getpid()]), None, None, None, None, [])


def numbered(count: int, side: int = 64) -> list[np.ndarray]:
    """Frames (side, side, 3) that have their number, below 1024, painted into them as 4 x 4 black and white blocks."""
    return [_paint([number >> bit & 1 for bit in range(10)], side) for number in range(count)]


def _paint(bits: list[int], side: int) -> np.ndarray:
    odd = sum(bits) % 2
    coarse = np.array([*bits, odd, 1 - odd, 1, 0, 1, 0], np.uint8).reshape(4, 4, 1).repeat(3, axis=2)
    return (20 + 215 * coarse).repeat(side // 4, axis=0).repeat(side // 4, axis=1)


def numbers(frames: torch.Tensor) -> list[int | None]:
    """The numbers painted into frames (T, 3, H, W) of `numbered`; None for a frame in which none can be read."""
    found = []
    for frame in frames.float().mean(1):
        height, width = frame.shape
        blocks = frame[height // 8 :: height // 4, width // 8 :: width // 4][:4, :4].flatten()
        bits = (blocks > 128).int().tolist()
        whole = bits[10] == sum(bits[:10]) % 2 and bits[11:] == [1 - bits[10], 1, 0, 1, 0]
        found.append(sum(bit << place for place, bit in enumerate(bits[:10])) if whole else None)
    return found


def remux(path: Path, source: Path, start: float | None = None, seconds: float = 1e9) -> str:
    """`source`, an mp4, without coding again; with `start`, as `ffmpeg -ss start -t seconds -i source -c copy` cuts it.

    Frames from the last key frame to `start` come along, with times below 0: mp4 and mov hide them by an edit list.
    """
    with av.open(str(source)) as given, av.open(str(path), "w") as container:
        stream, shift = given.streams.video[0], 0
        copy = container.add_stream_from_template(stream)
        if start is not None:
            shift = round(start / stream.time_base)
            given.seek(shift, stream=stream)
        for packet in given.demux(stream):
            if packet.size and packet.dts < shift + seconds / stream.time_base:
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, copy
                container.mux(packet)
    return str(path)
