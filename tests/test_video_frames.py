"""Frame choice, sizes and pixels against qwen-vl-utils; files that cannot be read."""

import numpy as np
import pytest
import torch
from PIL import Image
from video_helpers import blocks, encode, make_broken, make_video, rotated

import video.frames
from video.formats import Clip
from video.frames import (
    VideoError,
    VideoSettings,
    clip_range,
    frame_count,
    frame_files,
    frame_indices,
    frame_size,
    image_size,
    pick_frames,
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


@pytest.fixture
def by_decord(oracle, monkeypatch):
    """The oracle, reading by decord, on files of a sort that decord reads rightly."""
    pytest.importorskip("decord", reason="the oracle needs it, and it has no wheel here")
    monkeypatch.setattr(oracle, "get_video_reader_backend", lambda: "decord")
    return oracle


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
        else {"fps": settings.fps, "min_frames": settings.min_frames, "max_frames": settings.max_frames}
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
] + [
    (int(frames), 2 * int(height), 2 * int(width), int(rate), {})
    for frames, height, width, rate in np.random.default_rng(0).integers((4, 16, 37, 1), (60, 60, 80, 61), (22, 4))
]


@pytest.mark.parametrize("frames,height,width,fps,options", VIDEOS)
def test_read_video_equals_qwen_vl_utils(by_decord, tmp_path, frames, height, width, fps, options):
    """Same frames, same size, same pixels: a whole fetch_video against read_video."""
    path = make_video(tmp_path / "v.mp4", frames, height, width, fps)
    settings = VideoSettings(**(LOW | options))
    element = {"video": path, "min_pixels": settings.min_pixels, "max_pixels": settings.max_pixels}
    if settings.nframes:
        element["nframes"] = settings.nframes
    else:
        element |= {"fps": settings.fps, "min_frames": settings.min_frames, "max_frames": settings.max_frames}
    if settings.total_pixels:
        element["total_pixels"] = settings.total_pixels
    ours = check_against(by_decord, element, settings)
    # metadata alone gives the same shape
    total, rate, high, wide = probe(path)
    count = frame_count(total, rate, settings)
    assert (count, *frame_size(high, wide, count, settings, FACTOR)) == (*ours.shape[:1], *ours.shape[2:])


def check_against(oracle, element, settings):
    """Our frames of a video, or of a clip of it, after comparing them with those of a whole fetch_video."""
    (expected, told), expected_fps = oracle.fetch_video(
        element, return_video_sample_fps=True, return_video_metadata=True
    )
    clip = Clip(element.get("video_start"), element.get("video_end"))
    ours, picked = read_video(element["video"], settings, FACTOR, clip)
    assert ours.dtype == torch.uint8 and ours.shape == expected.shape
    assert picked.rate == pytest.approx(expected_fps, rel=1e-6)
    assert picked.numbers == told["frames_indices"] and picked.fps == pytest.approx(told["fps"], rel=1e-6)
    assert picked.times == [number / picked.fps for number in picked.numbers]
    assert (ours.float() - expected).abs().max() <= 1  # another FFmpeg converts colours
    return ours


@pytest.mark.parametrize("start,end", [(None, 3.0), (1.25, None), (1.26, 3.74), (0.0, 99.0), (3.5, 4.0)])
def test_clips_equal_qwen_vl_utils(by_decord, tmp_path, start, end):
    path = make_video(tmp_path / "v.mp4", frames=50, height=60, width=90, fps=12)
    times = {name: value for name, value in (("video_start", start), ("video_end", end)) if value is not None}
    settings = VideoSettings(**LOW, fps=4.0)
    element = {"video": path, "fps": 4.0, "min_frames": 4, "max_frames": 16} | LOW | times
    ours = check_against(by_decord, element, settings)
    total, rate, *_ = probe(path)
    assert len(pick_frames(total, rate, settings, Clip(start, end))[0]) == len(ours)  # the plan counts the same


def test_clip_range_against_literal_table_and_qwen_vl_utils(oracle):
    assert clip_range(100, 10.0, Clip()) == (0, 99)
    assert clip_range(100, 10.0, Clip(1.01, 2.09)) == (11, 20)  # inside the clip, not around it
    assert clip_range(100, 10.0, Clip(None, 50.0)) == (0, 99)
    for start, end in ((5.0, 5.05), (20.0, 30.0), (3.0, 2.0)):
        with pytest.raises(ValueError, match="has no two frames from"):
            clip_range(100, 10.0, Clip(start, end))
    generator = np.random.default_rng(0)
    for _ in range(500):
        start, end = generator.uniform(0, 12, 2).round(2).tolist()
        total, fps = int(generator.integers(2, 300)), float(generator.choice([7.0, 23.976, 30.0]))
        try:
            expected = oracle.calculate_video_frame_range({"video_start": start, "video_end": end}, total, fps)[:2]
        except ValueError:
            with pytest.raises(ValueError):
                clip_range(total, fps, Clip(start, end))
            continue
        assert clip_range(total, fps, Clip(start, end)) == expected


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_a_rotation_flag_is_followed_as_by_qwen_vl_utils(by_decord, tmp_path, degrees):
    path = tmp_path / "v.mp4"
    make_video(path, frames=8, height=60, width=120)
    path.write_bytes(rotated(path.read_bytes(), degrees))
    ours = check_against(by_decord, {"video": str(path), "nframes": 8} | LOW, VideoSettings(nframes=8, **LOW))
    assert (ours.shape[2] > ours.shape[3]) == (degrees != 180)


def test_a_variable_frame_rate_equals_qwen_vl_utils(by_decord, tmp_path):
    times = np.random.default_rng(0).integers(1, 40, 30).cumsum().tolist()
    path = encode(tmp_path / "v.mp4", blocks(30, 64, 64), times=times)
    check_against(by_decord, {"video": path, "fps": 2.0, "min_frames": 4, "max_frames": 16} | LOW, VideoSettings(**LOW))


@pytest.mark.parametrize("height,width", [(1, 64), (33, 65)])
def test_odd_sizes_equal_qwen_vl_utils(by_decord, tmp_path, height, width):
    path = encode(tmp_path / "v.mkv", blocks(8, height, width), codec="ffv1")
    check_against(by_decord, {"video": path, "nframes": 4} | LOW, VideoSettings(nframes=4, **LOW))


def make_folder(folder, count, size=(90, 60), suffix=".png"):
    folder.mkdir()
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"frame_{number}{suffix}")
    return str(folder)


def test_a_folder_of_frames_equals_a_list_of_frames_in_qwen_vl_utils(oracle, tmp_path):
    """Of sizes that both leave as they are: it first resizes to multiples of 56, for it hands fetch_image the factor
    where that takes the patch size."""
    folder = make_folder(tmp_path / "frames", 12, size=(168, 112))  # frame_10 comes after frame_9
    (tmp_path / "frames/notes.txt").write_text("no frame")
    files = frame_files(folder)
    assert [file.rsplit("_")[-1] for file in files] == [f"{n}.png" for n in range(12)]
    expected, rate = oracle.fetch_video({"video": files} | LOW, return_video_sample_fps=True)
    ours, picked = read_video(folder, VideoSettings(**LOW), FACTOR)
    assert torch.equal(ours.float(), expected.float()) and picked.rate == rate == picked.fps == 2.0
    assert picked.numbers == list(range(12))
    assert probe(folder) == (12, 2.0, 112, 168)
    small = VideoSettings(min_pixels=784, max_pixels=4 * 784)
    resized = read_video(folder, small, FACTOR)[0]
    image = Image.open(files[3]).resize(frame_size(112, 168, 12, small, FACTOR)[::-1])
    assert torch.equal(resized[3], torch.from_numpy(np.array(image)).permute(2, 0, 1))


def test_a_folder_of_frames_is_sampled_and_clipped_like_a_video(tmp_path):
    folder = make_folder(tmp_path / "frames", 30)
    whole, _ = read_video(folder, VideoSettings(nframes=30, **LOW), FACTOR)
    ours, picked = read_video(folder, VideoSettings(nframes=4, **LOW), FACTOR, Clip(2.0, 5.0, fps=3.0))
    assert torch.equal(ours, whole[[6, 9, 12, 15]]) and picked.rate == pytest.approx(4 / 10 * 3)
    assert picked.numbers == [6, 9, 12, 15] and picked.times == [2.0, 3.0, 4.0, 5.0]
    odd, _ = read_video(make_folder(tmp_path / "odd", 7), VideoSettings(**LOW), FACTOR)
    assert len(odd) == 6  # none is repeated


def test_a_folder_that_is_no_video_says_why(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(VideoError, match="without frames"):
        read_video(str(tmp_path / "empty"), VideoSettings(), FACTOR)
    folder = make_folder(tmp_path / "mixed", 4)
    Image.new("RGB", (10, 10)).save(tmp_path / "mixed/frame_2.png")
    with pytest.raises(VideoError, match="frame_2.png is .10, 10., the first frame .90, 60."):
        read_video(folder, VideoSettings(**LOW), FACTOR)


def test_a_huge_frame_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    assert 7680 * 4320 < video.frames.MAX_FRAME_PIXELS < 10**8
    monkeypatch.setattr(video.frames, "MAX_FRAME_PIXELS", 64 * 96 - 1)
    path = make_video(tmp_path / "v.mp4", height=64, width=96)
    monkeypatch.setattr(video.frames, "_read_file", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(VideoError, match="frames of 96 x 64 pixels are above the limit of 6143"):
        read_video(path, VideoSettings(), FACTOR)


def test_a_frame_larger_than_its_header_says_is_not_decoded_either(tmp_path, monkeypatch):
    path = make_video(tmp_path / "v.mp4", height=64, width=96)
    probe(path)
    monkeypatch.setattr(video.frames, "MAX_FRAME_PIXELS", 64 * 96 - 1)
    with pytest.raises(VideoError, match="cannot be decoded: Invalid argument"):
        read_video(path, VideoSettings(), FACTOR)


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


def test_unreadable_files_raise_one_line_with_path(tmp_path):
    for name, path in make_broken(tmp_path).items():
        with pytest.raises(VideoError) as caught:
            read_video(path, VideoSettings(**LOW), FACTOR)
        assert caught.value.path == path and caught.value.reason, name
        assert "\n" not in str(caught.value) and path in str(caught.value), name


def test_a_file_cut_short_and_a_stream_of_no_known_kind_say_so(tmp_path):
    encode(tmp_path / "v.avi", blocks(30, 64, 64), codec="mpeg4")
    whole = (tmp_path / "v.avi").read_bytes()
    (tmp_path / "short.avi").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(VideoError, match="is cut short: holds 3 of the 30 frames that its header tells of"):
        read_video(str(tmp_path / "short.avi"), VideoSettings(**LOW), FACTOR)
    (tmp_path / "codec.avi").write_bytes(whole.replace(b"FMP4", b"Q?Z!"))
    with pytest.raises(VideoError, match="of a kind that no decoder here knows"):
        read_video(str(tmp_path / "codec.avi"), VideoSettings(**LOW), FACTOR)


def test_one_frame_and_a_strip_are_refused(tmp_path):
    with pytest.raises(VideoError, match="has 1 frames, 2 are needed$"):
        read_video(make_video(tmp_path / "one.mp4", frames=1), VideoSettings(**LOW), FACTOR)
    with pytest.raises(VideoError, match="has 3 frames, 8 are needed; lower --nframes$"):
        read_video(make_video(tmp_path / "three.mp4", frames=3), VideoSettings(nframes=8, **LOW), FACTOR)
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


def test_formats_that_are_not_wanted_are_not_opened(tmp_path):
    """PIL would hand EPS to Ghostscript, whatever the file is called."""
    Image.new("RGB", (40, 40)).save(tmp_path / "e.png", format="EPS")
    with pytest.raises(VideoError, match="cannot be opened as an image: cannot identify image file"):
        read_image(str(tmp_path / "e.png"), VideoSettings(), FACTOR)
    for name in ("JPEG", "PNG", "WEBP", "BMP", "GIF"):
        Image.new("RGB", (40, 40)).save(tmp_path / "i", format=name)
        assert read_image(str(tmp_path / "i"), VideoSettings(), FACTOR).shape[0] == 3
