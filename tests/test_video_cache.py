"""Frames kept on disk: what makes an entry another, what damage does, and many processes at once."""

import multiprocessing
import os
import struct
import time

import pytest
import torch
from PIL import Image
from video_helpers import SMALL, make_video

import video.cache
from grpo.families import load_family
from video.cache import FrameCache
from video.formats import Clip, Sample
from video.frames import VideoError, VideoSettings, read_video
from video.prompt import PromptEncoder

FACTOR = 28


@pytest.fixture
def decoded(monkeypatch):
    """The paths that were decoded, in order."""
    paths, plain = [], read_video
    monkeypatch.setattr(video.cache.frames, "read_video", lambda path, *rest: paths.append(path) or plain(path, *rest))
    return paths


def test_a_second_reading_gives_the_same_frames_without_decoding(tmp_path, decoded):
    path, cache = make_video(tmp_path / "v.mp4", frames=20, height=60, width=90), FrameCache(tmp_path / "cache")
    first, second = cache.read(path, SMALL, FACTOR), FrameCache(tmp_path / "cache").read(path, SMALL, FACTOR)
    assert decoded == [path]
    plain, picked = read_video(path, SMALL, FACTOR)
    for frames, told in (first, second):
        assert torch.equal(frames, plain) and frames.dtype == torch.uint8 and told == picked
    second[0][0] = 0  # the caller may write into it
    assert torch.equal(cache.read(path, SMALL, FACTOR)[0], plain)


def test_another_file_setting_clip_or_factor_is_another_entry(tmp_path, decoded):
    path, cache = make_video(tmp_path / "v.mp4", frames=20, height=60, width=90), FrameCache(tmp_path / "cache")
    calls = [
        (path, SMALL, FACTOR), (path, VideoSettings(nframes=6, min_pixels=784, max_pixels=3136), FACTOR),
        (path, SMALL, 32), (path, SMALL, FACTOR, Clip(1.0)), (path, SMALL, FACTOR, Clip(None, 5.0)),
        (make_video(tmp_path / "w.mp4", frames=20, height=60, width=90), SMALL, FACTOR),
    ]  # fmt: skip
    for call in calls * 2:
        cache.read(*call)
    assert len(decoded) == len(calls)
    os.utime(path, (1, 1))  # written anew
    cache.read(path, SMALL, FACTOR)
    assert len(decoded) == len(calls) + 1
    os.symlink(path, tmp_path / "link.mp4")  # the same file by another name
    cache.read(str(tmp_path / "link.mp4"), SMALL, FACTOR)
    assert len(decoded) == len(calls) + 1


def test_a_changed_frame_of_a_folder_is_seen(tmp_path, decoded):
    (tmp_path / "f").mkdir()
    for number in range(4):
        Image.new("RGB", (40, 40), (number, 0, 0)).save(tmp_path / f"f/{number}.png")
    cache, folder = FrameCache(tmp_path / "cache"), str(tmp_path / "f")
    cache.read(folder, SMALL.__class__(nframes=4), FACTOR)
    Image.new("RGB", (40, 40), (99, 0, 0)).save(tmp_path / "f/2.png")
    os.utime(tmp_path / "f/2.png", (5, 5))
    assert (cache.read(folder, SMALL.__class__(nframes=4), FACTOR)[0][2, 0] == 99).all() and len(decoded) == 2


def flipped(whole, place):
    """One bit of the byte at `place` turned over."""
    return whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]


DAMAGE = {
    "cut": lambda whole: whole[: len(whole) // 2],
    "length of the header": lambda whole: flipped(whole, 0),
    "a name": lambda whole: flipped(whole, whole.index(b"rates")),
    "a type": lambda whole: whole.replace(b'"F64"', b'"I64"'),
    "the rate": lambda whole: flipped(whole, whole.index(struct.pack("<d", 2.0)) + 7),
    "the numbers": lambda whole: flipped(whole, whole.index(struct.pack("<3q", 5, 6, 7))),
    "a pixel": lambda whole: flipped(whole, len(whole) // 2),
    "the checksum": lambda whole: flipped(whole, len(whole) - 1),
    "zeros": lambda whole: bytes(4),
    "empty": lambda whole: b"",
    "text": lambda whole: b"no frames",
}


@pytest.mark.parametrize("damage", [*DAMAGE, "folder"])
def test_a_damaged_entry_is_a_miss(tmp_path, decoded, damage):
    path, cache = make_video(tmp_path / "v.mp4"), FrameCache(tmp_path / "cache")
    plain, picked = cache.read(path, SMALL, FACTOR)
    entry = cache.entry(path, SMALL, FACTOR, Clip())
    whole = entry.read_bytes()
    if damage == "folder":
        entry.unlink()
        entry.mkdir()
    else:
        entry.write_bytes(DAMAGE[damage](whole))
        assert entry.read_bytes() != whole
    for _ in range(2 if damage != "folder" else 1):
        if damage == "folder":
            with pytest.warns(UserWarning, match="frames are not kept"):
                again, told = cache.read(path, SMALL, FACTOR)
        else:
            again, told = cache.read(path, SMALL, FACTOR)
        assert torch.equal(again, plain) and told == picked
    assert len(decoded) == 2  # and replaced by the new reading


def test_errors_are_those_of_the_reader_and_leave_nothing(tmp_path):
    cache = FrameCache(tmp_path / "cache")
    (tmp_path / "bad.mp4").write_bytes(b"no video" * 50)
    for name, reason in (("bad.mp4", "cannot be opened"), ("gone.mp4", "no such file")):
        with pytest.raises(VideoError, match=reason):
            cache.read(str(tmp_path / name), SMALL, FACTOR)
    assert list((tmp_path / "cache").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="--frame_cache .*cannot be written to"):
        FrameCache(tmp_path / "file")


def used(folder):
    return sum(item.stat().st_size for item in folder.iterdir())


def test_the_limit_holds_and_the_longest_unused_go_first(tmp_path, decoded):
    paths = [make_video(tmp_path / f"{n}.mp4", seed=n) for n in range(6)]
    sample = FrameCache(tmp_path / "one")
    sample.read(paths[0], SMALL, FACTOR)
    size = used(tmp_path / "one")
    folder = tmp_path / "cache"
    cache = FrameCache(folder, 4.5 * size / 1e9)
    foreign = folder / "model.safetensors"
    foreign.write_bytes(bytes(5 * size))
    os.utime(foreign, (0, 0))
    for number, path in enumerate(paths[:4]):
        cache.read(path, SMALL, FACTOR)
        os.utime(cache.entry(path, SMALL, FACTOR, Clip()), (number, number))
    cache.read(paths[0], SMALL, FACTOR)  # a hit: used last now
    cache.read(paths[4], SMALL, FACTOR)
    assert used(folder) - 5 * size <= 4.5 * size and len(decoded) == 6
    assert foreign.exists(), "files that are not ours are neither counted nor removed"
    cache.read(paths[0], SMALL, FACTOR)
    assert len(decoded) == 6
    cache.read(paths[1], SMALL, FACTOR)
    assert len(decoded) == 7


def test_leftovers_of_dead_processes_are_removed(tmp_path):
    cache = FrameCache(tmp_path / "cache")
    for name, age in (("old.tmp", 10_000), ("new.tmp", 1)):
        (tmp_path / "cache" / name).write_bytes(b"x")
        os.utime(tmp_path / "cache" / name, (time.time() - age,) * 2)
    (tmp_path / "cache/notes.txt").write_text("not ours")
    os.utime(tmp_path / "cache/notes.txt", (1, 1))
    cache.read(make_video(tmp_path / "v.mp4"), SMALL, FACTOR)
    names = {item.name for item in (tmp_path / "cache").iterdir()}
    assert "old.tmp" not in names and {"new.tmp", "notes.txt"} < names


def hammer(folder, paths, gigabytes, results):
    cache = FrameCache(folder, gigabytes)
    for turn in range(60):
        frames, _ = cache.read(paths[(turn * 7 + os.getpid()) % len(paths)], SMALL, FACTOR)
        results.put((turn * 7 + os.getpid()) % len(paths) if frames.shape[0] == 8 else -1)


@pytest.mark.timeout(120)
def test_processes_that_share_a_small_cache_all_read_what_they_should(tmp_path):
    paths = [make_video(tmp_path / f"{n}.mp4", seed=n) for n in range(6)]
    FrameCache(tmp_path / "one").read(paths[0], SMALL, FACTOR)
    limit = 3.5 * used(tmp_path / "one")
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    processes = [
        context.Process(target=hammer, args=(tmp_path / "cache", paths, limit / 1e9, results)) for _ in range(3)
    ]
    for process in processes:
        process.start()
    got = [results.get() for _ in range(180)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0] and -1 not in got and set(got) == set(range(6))
    assert used(tmp_path / "cache") <= limit * (1 + 3 / 256) + used(tmp_path / "one") * 2
    for path in paths:  # whatever is there is right
        cached, _ = FrameCache(tmp_path / "cache", limit / 1e9).read(path, SMALL, FACTOR)
        assert torch.equal(cached, read_video(path, SMALL, FACTOR)[0])


def test_prompts_are_the_same_with_a_cache(checkpoints, tmp_path, decoded):
    """Of the family whose prompts tell the times of frames."""
    folder, family = str(checkpoints["qwen3_vl"]), load_family("qwen3_vl")
    videos = (make_video(tmp_path / "a.mp4"), make_video(tmp_path / "b.mp4", frames=40, height=64, width=96, fps=10))
    sample = Sample("d:1", "What?", "A", videos=videos, clips=(Clip(), Clip(1.0, 3.0)))
    plain = PromptEncoder(folder, SMALL, video_text=family)(sample)
    encoder = PromptEncoder(folder, SMALL, cache=FrameCache(tmp_path / "cache"), video_text=family)
    encoder(sample)
    count = len(decoded)
    for control in (None, "reversed"):
        prompt = encoder(sample, control)
        same = torch.equal(prompt.pixel_values_videos, plain.pixel_values_videos)
        assert same == (control is None) and prompt.seconds_per_grid == plain.seconds_per_grid
        assert prompt.frame_times == plain.frame_times and torch.equal(prompt.input_ids, plain.input_ids)
    assert count == 2 == len(decoded)
