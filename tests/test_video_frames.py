"""Frame choice, sizes and pixels against qwen-vl-utils; files that cannot be read."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image
from video_helpers import make_broken, make_video

import video.frames
from video.frames import (
    VideoError,
    VideoSettings,
    frame_count,
    frame_indices,
    frame_size,
    image_size,
    probe,
    read_image,
    read_video,
    smart_resize,
)

FACTOR = 28
LOW = {"min_pixels": 4 * 28 * 28, "max_pixels": 60 * 28 * 28}  # sizes that a test can afford


@pytest.fixture(scope="module")
def oracle():
    return pytest.importorskip("qwen_vl_utils.vision_process")


@pytest.fixture(params=["decord", "pyav"])
def decoder(request, monkeypatch):
    if request.param == "pyav":
        monkeypatch.setattr(video.frames, "decord", None)
    elif video.frames.decord is None:
        pytest.skip("decord has no wheel here")


def test_frame_count_against_literal_table():
    """(frames, fps, settings) -> count. 16 of a long clip, all of a short one, even numbers only."""
    table = [
        (900, 30.0, VideoSettings(), 16),
        (60, 30.0, VideoSettings(), 4),  # 2 s at 2 fps
        (100, 20.0, VideoSettings(), 10),
        (7, 30.0, VideoSettings(), 4),
        (3, 30.0, VideoSettings(), 2),
        (110, 20.0, VideoSettings(), 10),  # 11 frames, rounded down to even
        (900, 30.0, VideoSettings(nframes=7), 8),
        (900, 30.0, VideoSettings(nframes=5), 4),  # Python's round(2.5) is 2
    ]
    for frames, fps, settings, expected in table:
        assert frame_count(frames, fps, settings) == expected, (frames, fps, settings)
    assert frame_indices(0, 9, 4) == [0, 3, 6, 9]
    assert frame_indices(0, 6, 4) == [0, 2, 4, 6]
    assert frame_indices(0, 7, 4) == [0, 2, 5, 7]  # 2.33 and 4.67 are rounded; truncating gives 4


@pytest.mark.parametrize(
    "options", [{}, {"fps": 1.0, "max_frames": 64}, {"fps": 30.0, "max_frames": 7}, {"nframes": 10}]
)
def test_frame_count_equals_qwen_vl_utils(oracle, options):
    settings = VideoSettings(**options)
    element = (
        {"nframes": settings.nframes}
        if settings.nframes
        else {
            "fps": settings.fps,
            "min_frames": settings.min_frames,
            "max_frames": settings.max_frames,
        }
    )
    for frames in range(1, 400, 3):
        for fps in (0.5, 7.0, 23.976, 30.0, 60.0):
            try:
                expected = oracle.smart_nframes(element, frames, fps)
            except ValueError:
                with pytest.raises(ValueError):
                    frame_count(frames, fps, settings)
                continue
            assert frame_count(frames, fps, settings) == expected, (frames, fps)
            literal = torch.linspace(0, frames - 1, expected).round().long().tolist()
            assert frame_indices(0, frames - 1, expected) == literal


def test_smart_resize_equals_qwen_vl_utils(oracle):
    generator = np.random.default_rng(0)
    for _ in range(2000):
        height, width = (int(side) for side in np.exp(generator.uniform(np.log(8), np.log(2200), 2)))
        low = int(generator.integers(1, 200)) * 784
        high = low + int(generator.integers(0, 400)) * 784
        try:
            expected = oracle.smart_resize(height, width, FACTOR, low, high)
        except ValueError:
            with pytest.raises(ValueError):
                smart_resize(height, width, FACTOR, low, high)
            continue
        if min(expected) > 0:
            assert smart_resize(height, width, FACTOR, low, high) == expected
    assert oracle.smart_resize(30, 6000, FACTOR, 784, 196 * 784)[0] == 0, "the departure in frames.py is obsolete"
    assert smart_resize(30, 6000, FACTOR, 784, 196 * 784)[0] == FACTOR


VIDEOS = [  # frames, height, width, fps, options
    (40, 120, 160, 10, {}),
    (9, 64, 64, 30, {}),
    (61, 90, 50, 25, {"fps": 4.0, "max_frames": 32}),
    (30, 48, 200, 5, {"nframes": 6}),
    (100, 130, 178, 12, {"max_frames": 8}),
    (24, 240, 320, 8, {"total_pixels": 40 * 28 * 28}),
    (8, 28, 28, 2, {"min_pixels": 784, "max_pixels": 784}),
    (5, 30, 62, 1, {"min_frames": 2}),
]


@pytest.mark.parametrize("frames,height,width,fps,options", VIDEOS)
def test_read_video_equals_qwen_vl_utils(oracle, decoder, tmp_path, frames, height, width, fps, options, monkeypatch):
    """Same frames, same size, same pixels: a whole fetch_video against read_video."""
    if video.frames.decord is None and "decord" not in sys.modules:
        pytest.skip("the oracle needs decord")
    monkeypatch.setattr(oracle, "get_video_reader_backend", lambda: "decord")
    path = make_video(tmp_path / "v.mp4", frames, height, width, fps)
    settings = VideoSettings(**(LOW | options))
    element = {"video": path, "min_pixels": settings.min_pixels, "max_pixels": settings.max_pixels}
    if settings.nframes:
        element["nframes"] = settings.nframes
    else:
        element |= {"fps": settings.fps, "min_frames": settings.min_frames, "max_frames": settings.max_frames}
    if settings.total_pixels:
        element["total_pixels"] = settings.total_pixels
    expected, expected_fps = oracle.fetch_video(element, return_video_sample_fps=True)
    ours, sample_fps = read_video(path, settings, FACTOR)
    assert ours.dtype == torch.uint8 and ours.shape == expected.shape
    assert sample_fps == pytest.approx(expected_fps, rel=1e-6)
    limit = 0 if video.frames.decord is not None else 1  # another FFmpeg converts colours
    assert (ours.float() - expected).abs().max() <= limit
    # metadata alone gives the same shape
    total, rate, high, wide = probe(path)
    count = frame_count(total, rate, settings)
    assert (count, *frame_size(high, wide, count, settings, FACTOR)) == (*ours.shape[:1], *ours.shape[2:])


@pytest.mark.parametrize("mode,size", [("RGB", (300, 200)), ("RGBA", (64, 90)), ("L", (500, 40)), ("P", (30, 30))])
def test_read_image_equals_qwen_vl_utils(oracle, tmp_path, mode, size):
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 4), dtype=np.uint8)
    path = str(tmp_path / "i.png")
    Image.fromarray(pixels, "RGBA").convert("RGB" if mode == "P" else mode).convert(mode).save(path)
    settings = VideoSettings(image_min_pixels=16 * 784, image_max_pixels=50 * 784)
    element = {"image": path, "min_pixels": settings.image_min_pixels, "max_pixels": settings.image_max_pixels}
    expected = torch.from_numpy(np.array(oracle.fetch_image(element))).permute(2, 0, 1)
    ours = read_image(path, settings, FACTOR)
    assert torch.equal(ours, expected)
    assert image_size(path, settings, FACTOR) == tuple(ours.shape[1:])


def test_unreadable_files_raise_one_line_with_path(decoder, tmp_path):
    for name, path in make_broken(tmp_path).items():
        with pytest.raises(VideoError) as caught:
            read_video(path, VideoSettings(**LOW), FACTOR)
        assert caught.value.path == path and caught.value.reason, name
        assert "\n" not in str(caught.value) and path in str(caught.value), name


def test_one_frame_and_a_strip_are_refused(decoder, tmp_path):
    with pytest.raises(VideoError, match="has 1 frames, 2 are needed"):
        read_video(make_video(tmp_path / "one.mp4", frames=1), VideoSettings(**LOW), FACTOR)
    with pytest.raises(VideoError, match="differ by more than 200"):
        read_video(make_video(tmp_path / "strip.mp4", height=4, width=1000), VideoSettings(**LOW), FACTOR)


def test_broken_images_raise(tmp_path):
    Image.fromarray(np.zeros((50, 50, 3), np.uint8)).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("no")
    for name in ("cut.png", "text.png", "missing.png"):
        with pytest.raises(VideoError, match=name):
            read_image(str(tmp_path / name), VideoSettings(), FACTOR)


@pytest.mark.parametrize(
    "options,flag",
    [
        ({"fps": 0}, "--fps"),
        ({"nframes": 1}, "--nframes"),
        ({"max_frames": 2}, "--max_frames"),
        ({"min_pixels": 10**9}, "--min_pixels"),
        ({"total_pixels": 0}, "--total_pixels"),
        ({"min_frames": 0}, "--min_frames"),
    ],
)
def test_settings_out_of_range_name_the_flag(options, flag):
    with pytest.raises(ValueError, match=flag):
        VideoSettings(**options)
