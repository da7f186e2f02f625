"""Kinds of video files (container x codec x GOP x interlacing x cut): a number painted into each frame tells which
frames are read. What decides is a plain decoding of everything, in order."""

import itertools
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from video_helpers import encode, make_video, numbered, numbers, remux

import video.frames
from video.formats import Clip
from video.frames import VideoError, VideoSettings, probe, read_video

FRAMES, RATE = 96, 25
BITS = {"qmin": "2", "qmax": "2"}
X264 = {"preset": "veryfast", "x264-params": "keyint=24:min-keyint=24:scenecut=0:bframes=3"}
X265 = {"preset": "ultrafast", "x265-params": "log-level=none:keyint=24:min-keyint=24:scenecut=0:bframes=3"}


def with_params(options: dict, more: str) -> dict:
    return {key: f"{value}:{more}" if key.endswith("params") else value for key, value in options.items()}


H264_OPEN, HEVC_OPEN = with_params(X264, "open-gop=1"), with_params(X265, "open-gop=1")
H264_CLOSED, HEVC_CLOSED = with_params(X264, "open-gop=0"), with_params(X265, "open-gop=0")
B2, FIELDS = BITS | {"bf": "2", "g": "12"}, BITS | {"bf": "2", "g": "12", "flags": "+ilme+ildct"}

ENCODED = {  # name of the file -> codec and its options
    "closed.mp4": ("libx264", H264_CLOSED), "open.mp4": ("libx264", H264_OPEN), "open.mkv": ("libx264", H264_OPEN),
    "default.mov": ("libx264", {}), "no_b.avi": ("libx264", {"preset": "ultrafast"}), "b.avi": ("libx264", H264_CLOSED),
    "open.flv": ("libx264", H264_OPEN), "closed.ts": ("libx264", H264_CLOSED), "open.ts": ("libx264", H264_OPEN),
    "b.mpg": ("libx264", H264_CLOSED), "raw.h264": ("libx264", H264_CLOSED),
    "interlaced.ts": ("libx264", with_params(X264, "tff=1")), "interlaced.mp4": ("libx264", with_params(X264, "tff=1")),
    "refresh.mp4": ("libx264", {"x264-params": "keyint=24:intra-refresh=1:bframes=0"}),
    "closed_265.mp4": ("libx265", HEVC_CLOSED), "open_265.mkv": ("libx265", HEVC_OPEN),
    "short_265.mp4": ("libx265", {"x265-params": "log-level=none:keyint=5:min-keyint=1"}),
    "layers_265.mp4": ("libx265", with_params(X265, "temporal-layers=1:b-adapt=0")),
    "open_265.ts": ("libx265", HEVC_OPEN),
    "b.mp4": ("mpeg4", B2), "b_4.avi": ("mpeg4", B2), "no_b_4.avi": ("mpeg4", BITS), "b_4.ts": ("mpeg4", B2),
    "b_2.mpg": ("mpeg2video", B2), "b_2.ts": ("mpeg2video", B2), "b_2.mkv": ("mpeg2video", B2),
    "fields_2.ts": ("mpeg2video", FIELDS), "fields_2.mpg": ("mpeg2video", FIELDS), "b_1.mpg": ("mpeg1video", B2),
    "w.wmv": ("wmv2", BITS), "w.asf": ("wmv1", BITS), "v.webm": ("libvpx-vp9", {"g": "24", "cpu-used": "8"}),
    "v8.webm": ("libvpx", {"g": "24", "auto-alt-ref": "1", "lag-in-frames": "16"}),
    "v.mp4": ("libvpx-vp9", {"g": "24", "cpu-used": "8"}), "a.mp4": ("libsvtav1", {"g": "24", "preset": "8"}),
    "a.webm": ("libsvtav1", {"g": "24", "preset": "8"}), "g.gif": ("gif", {}), "m.avi": ("mjpeg", BITS),
    "f.mkv": ("ffv1", {}), "p.mov": ("prores", {}), "f.flv": ("flv", BITS),
}  # fmt: skip
COMMON = {"closed.mp4", "open.mkv", "open_265.mkv", "b.avi", "open.ts", "b_2.mpg", "w.wmv", "v.webm", "a.mp4", "g.gif"}
"""Of ENCODED, what the fast tests make: some that are common, and some that other readers get wrong."""


def make(folder: Path, name: str) -> str:
    codec, options = ENCODED[name]
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    return encode(folder / name, numbered(FRAMES), codec=codec, rate=RATE, options=options)


def decoded(path: str) -> list[int]:
    """The numbers of all frames of a file, by a plain decoding of all."""
    with av.open(path) as container:
        images = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return numbers(torch.from_numpy(np.stack(images)).movedim(3, 1))


def read(path: str, count: int, clip: Clip = Clip()) -> list[int]:
    return read_and_told(path, count, clip)[0]


def read_and_told(path: str, count: int, clip: Clip = Clip()) -> tuple[list[int], list[int]]:
    """The numbers painted into the frames that are read, and those by which they were picked."""
    settings = VideoSettings(nframes=count, max_frames=768, min_pixels=56 * 56, max_pixels=64 * 64)
    frames, picked = read_video(path, settings, 28, clip)
    return numbers(frames), picked.numbers


def check(path: str) -> list[int]:
    """The numbers that plain decoding shows, after comparing some and all of them with what is read."""
    shown = decoded(path)
    assert None not in shown
    for count in (4, 10, len(shown) // 2 * 2):
        painted, told = read_and_told(path, count)
        assert painted == [shown[i] for i in torch.linspace(0, len(shown) - 1, count).round().long()], path
        assert painted == [shown[i] for i in told], path
    assert abs(probe(path)[0] - len(shown)) <= 3, "what is planned, without decoding"
    return shown


@pytest.mark.parametrize(
    "name", [name if name in COMMON else pytest.param(name, marks=pytest.mark.slow) for name in ENCODED]
)
def test_frames_of_every_kind_of_file_are_those_asked_for(tmp_path, name):
    path = make(tmp_path, name)
    assert check(path) == list(range(FRAMES))
    assert read(path, 4, Clip(1.0, 3.0)) == [25, 42, 58, 75]


@pytest.mark.parametrize("codec,options", [
    ("libx264", H264_CLOSED), ("libx264", H264_OPEN), ("libx265", HEVC_CLOSED), ("libx265", HEVC_OPEN),
])  # fmt: skip
def test_clips_cut_without_coding_again_show_what_was_asked_for(tmp_path, codec, options):
    """Of mp4 and mov from the time of the cut on; the others begin at the key frame before it."""
    whole = encode(tmp_path / "whole.mp4", numbered(FRAMES), codec=codec, rate=RATE, options=options)
    rng = np.random.default_rng(0)
    for number, suffix in zip(range(10), itertools.cycle((".mp4", ".mov", ".mp4", ".mkv"))):
        start, seconds = rng.uniform(0.1, 2.0), rng.uniform(0.8, 1.8)
        path = remux(tmp_path / f"{number}{suffix}", whole, start, seconds)
        shown = check(path)
        late = shown[0] - start * RATE  # seeking finds key frames by time of decoding, which is up to 4 frames earlier
        exact = suffix in (".mp4", ".mov") and 0 <= late < 1
        assert exact or shown[0] % 24 == 0 and late < 4, (suffix, start, shown[0])
        # a cut by packets leaves out a B-frame or two before its last frame
        assert shown[: len(shown) - 4] == list(range(shown[0], shown[0] + len(shown) - 4))
        assert shown == sorted(set(shown)) and shown[-1] - shown[0] - len(shown) < 4
        rate = probe(path)[1]
        asked = read(path, 8, Clip(0.2, 0.6))
        assert asked[0] == pytest.approx(shown[0] + 0.2 * rate, abs=1) == pytest.approx(shown[0] + 5, abs=1.5)
        assert asked[-1] == pytest.approx(shown[0] + 15, abs=1.5)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("codec,options", [("libx264", H264_CLOSED), ("libx265", HEVC_CLOSED)])
@pytest.mark.parametrize("swapped", [False, True], ids=["", "swapped"])
def test_times_that_are_those_of_decoding_are_not_relied_on(tmp_path, codec, options, suffix, swapped):
    """As after `ffmpeg -i x.h264 -c copy x.mp4`; with two of them swapped, they do not even rise."""
    raw = encode(tmp_path / ("x.h264" if codec == "libx264" else "x.hevc"), numbered(FRAMES), codec=codec, rate=RATE,
                 options=options)  # fmt: skip
    path = str(tmp_path / f"copied{suffix}")
    with av.open(raw) as given, av.open(path, "w") as container:
        stream = given.streams.video[0]
        copy = container.add_stream_from_template(stream)
        for number, packet in enumerate(packet for packet in given.demux(stream) if packet.size):
            shown = {4: 5, 5: 4}.get(number, number) if swapped else number
            ticks = 1 / (RATE * packet.time_base)
            packet.pts, packet.dts, packet.stream = round((shown + 1) * ticks), round(number * ticks), copy
            container.mux(packet)
    assert check(path) == list(range(FRAMES))


def test_joined_clips_are_read_in_the_order_of_decoding(tmp_path):
    """Times begin anew in the middle, as after `cat a.ts b.ts > c.ts`."""
    paths = [Path(make(tmp_path, name)) for name in ("closed.ts", "open.ts")]
    (tmp_path / "both.ts").write_bytes(b"".join(path.read_bytes() for path in paths))
    assert check(str(tmp_path / "both.ts")) == [*range(FRAMES)] * 2


def test_little_more_than_the_chosen_frames_is_decoded(tmp_path, monkeypatch):
    """1 of 4 key frames has to be decoded from, and frames that no other needs are left out."""
    path = make(tmp_path, "open.mp4")
    monkeypatch.setattr(video.frames, "_decode_all", lambda _: pytest.fail("all was decoded"))
    plain, seen = video.frames._decode_needed, []
    monkeypatch.setattr(
        video.frames, "_decode_needed", lambda *args: (seen.append(pair[0]) or pair for pair in plain(*args))
    )
    assert read(path, 2, Clip(2.0, 2.041)) == [50, 51]
    assert {50, 51} <= set(seen) and len(seen) < 8


def test_a_header_that_counts_a_few_frames_too_many_is_no_reason_to_refuse(tmp_path):
    path = Path(encode(tmp_path / "v.avi", numbered(40), codec="mpeg4", rate=RATE, options=BITS))
    content = bytearray(path.read_bytes())
    for count in (42, 60):
        for at in (content.index(b"avih") + 24, content.index(b"strh") + 40):
            assert content[at] in (40, 42)
            content[at] = count
        (tmp_path / f"{count}.avi").write_bytes(content)
    assert check(str(tmp_path / "42.avi")) == list(range(40))
    with pytest.raises(VideoError, match="is cut short: holds 40 of the 60 frames that its header tells of"):
        read(str(tmp_path / "60.avi"), 4)


def test_an_avi_whose_header_counts_ticks_is_read_whole(tmp_path):
    """As after `ffmpeg -i v.webm -c copy v.avi`: of its clock, a frame lasts 40 ticks."""
    path = encode(tmp_path / "v.webm", numbered(FRAMES), codec="libvpx", rate=RATE, options={"g": "24"})
    path = remux(tmp_path / "v.avi", path)
    assert check(path) == list(range(FRAMES))
    assert probe(path)[:2] == (FRAMES, pytest.approx(RATE))
    assert read(path, 4, Clip(1.0, 3.0)) == [25, 42, 58, 75]


def test_metadata_that_is_not_utf_8_is_no_reason_to_refuse(tmp_path):
    path = Path(make_video(tmp_path / "v.mp4"))
    path.write_bytes(path.read_bytes().replace(b"Lavf", b"\xff\xfe\xfd\xfc"))
    assert probe(str(path))[0] == 8
