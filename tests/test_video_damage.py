"""A set with 300 damaged files, made from real encodes, goes through the loader whole: also what no `try` catches."""

import collections
import multiprocessing
import os
import time
from pathlib import Path

import av
import numpy as np
import pytest
from video_helpers import assert_gone, blocks, encode, make_video, rotated

from demo.tiny import build_tiny_model
from video.formats import Sample
from video.frames import VideoError, VideoSettings, read_video
from video.loader import PromptLoader
from video.prompt import Prompt, PromptEncoder, Skipped

SETTINGS = VideoSettings(nframes=4, min_pixels=28 * 28, max_pixels=4 * 28 * 28)


class Encoder(PromptEncoder):
    """Hangs or dies on two samples, as a decoder may inside its C code."""

    def __call__(self, sample, control=None):
        if sample.problem == "sleep":
            time.sleep(600)
        if sample.problem == "die":
            os.kill(os.getpid(), 9)
        return super().__call__(sample, control)


def flip(content: bytes, rng, count: int) -> bytes:
    changed = bytearray(content)
    for at in rng.integers(0, len(content), count):
        changed[at] ^= int(rng.integers(1, 256))
    return bytes(changed)


def zero(content: bytes, rng) -> bytes:
    start = int(rng.integers(0, len(content) - 200))
    length = int(rng.integers(100, len(content) // 3))
    return content[:start] + bytes(len(content[start : start + length])) + content[start + length :]


def make_damaged(folder: Path) -> dict[str, list[str]]:
    """{kind: paths} of 300 files, and of 40 more that nothing is wrong with. What is only odd is "good"."""
    rng, kinds = np.random.default_rng(0), collections.defaultdict(list)
    sources = [
        Path(make_video(folder / "s0.mp4", 40, 64, 96, 10)),
        Path(make_video(folder / "s1.mkv", 60, 48, 64, 25, seed=1)),
        Path(encode(folder / "s2.avi", blocks(30, 64, 64, 2), codec="mpeg4")),
        Path(encode(folder / "s3.webm", blocks(12, 64, 64, 3), codec="libvpx-vp9")),
    ]  # fmt: skip
    whole = [(source.read_bytes(), source.suffix) for source in sources]

    def add(kind, name, content):
        path = folder / kind / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        kinds[kind].append(str(path))

    for n in range(60):
        content, suffix = whole[n % 4]
        add("truncated", f"{n}{suffix}", content[: int(rng.integers(1, len(content)))])
        add("zeroed span", f"{n}{suffix}", zero(content, rng))
        add("flipped bytes", f"{n}{suffix}", flip(content, rng, int(rng.integers(1, 200))))
    for n in range(10):
        add("good", f"wrong_extension_{n}.avi", whole[0][0])  # the content counts
        add("bad", f"text_{n}.mp4", b"<html>404 not found</html>" * (n + 1))
        add("bad", f"random_{n}.mp4", rng.bytes(5000))
        add("bad", f"zero_length_{n}.mp4", b"")
        add("bad", f"no_header_{n}.mp4", whole[0][0].replace(b"moov", b"junk"))
        add("good", f"rotated_{n}.mp4", rotated(whole[0][0], (90, 180, 270)[n % 3]))
        add("bad", f"one_frame_{n}.mp4", Path(make_video(folder / "one.mp4", frames=1, seed=n)).read_bytes())
    enormous = huge(folder / "t.mkv")
    for n in range(5):
        times = rng.integers(1, 40, 20).cumsum().tolist()
        add("good", f"variable_rate_{n}.mp4", Path(encode(folder / "t.mp4", blocks(20, 32, 32, n), times)).read_bytes())
        odd = blocks(6, 2 * n + 31, 33, n)
        add("good", f"odd_size_{n}.mkv", Path(encode(folder / "t.mkv", odd, codec="ffv1")).read_bytes())
        add(
            "good",
            f"one_pixel_high_{n}.mkv",
            Path(encode(folder / "t.mkv", blocks(6, 1, 60 + n), codec="ffv1")).read_bytes(),
        )
        add("bad", f"strip_{n}.mkv", Path(encode(folder / "t.mkv", blocks(6, 1, 400 + n), codec="ffv1")).read_bytes())
        add("bad", f"huge_{n}.mkv", enormous)
        add("bad", f"sound_{n}.mp4", sound(folder / "sound.mp4"))
        (folder / f"folder_{n}.mp4").mkdir()
        (folder / f"link_{n}.mp4").symlink_to(folder / "nowhere.mp4")
        os.mkfifo(folder / f"pipe_{n}.mp4")  # opening it would wait for ever
        denied = Path(make_video(folder / f"denied_{n}.mp4"))
        denied.chmod(0)
        kinds["good" if os.access(denied, os.R_OK) else "bad"].append(str(denied))  # root reads everything
        kinds["bad"] += [str(folder / f"{name}_{n}.mp4") for name in ("folder", "link", "pipe")]
    assert sum(map(len, kinds.values())) == 300
    for n in range(40):
        kinds["good"].append(make_video(folder / f"good_{n}.mp4", frames=8 + n, seed=n))
    return kinds


def huge(path: Path) -> bytes:
    """A few hundred kB that claim frames of 81 million pixels."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=1)
        stream.width = stream.height = 9000
        stream.pix_fmt = "yuvj420p"
        for _ in range(2):
            container.mux(stream.encode(av.VideoFrame(9000, 9000, "yuvj420p")))
        container.mux(stream.encode())
    return path.read_bytes()


def sound(path: Path) -> bytes:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path.read_bytes()


def resident(pid: int) -> float:
    """MB of memory that a process holds."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_a_set_of_300_damaged_files_costs_its_bad_samples_alone(tmp_path):
    (tmp_path / "files").mkdir()
    kinds = make_damaged(tmp_path / "files")
    verdict = {path: kind for kind, paths in kinds.items() for path in paths}
    samples = [Sample(f"d.jsonl:{n}", "What?", "A", videos=(path,)) for n, path in enumerate(verdict, 1)]
    np.random.default_rng(1).shuffle(samples)
    good = kinds["good"][-1]
    for place, act in ((100, "sleep"), (200, "die"), (300, "sleep")):
        samples.insert(place, Sample(f"d.jsonl:{act}{place}", act, "A", videos=(good,)))
    encoder = Encoder(str(build_tiny_model(tmp_path / "tiny")), SETTINGS)

    outcomes, memory, pids = [], [], set()
    with PromptLoader(encoder, workers=2, timeout=4.0) as loader:
        batches = [samples[start : start + 10] for start in range(0, len(samples), 10)]
        for batch in loader.batches(batches + [[Sample("last", "What?", "A", videos=(good,))] * 20] * 5):
            outcomes += batch
            now = {child.pid: resident(child.pid) for child in multiprocessing.active_children()}
            pids |= now.keys()
            memory.append((resident(os.getpid()), now))
    assert_gone(pids)
    assert multiprocessing.active_children() == []

    assert [item.sample.key if isinstance(item, Prompt) else item.key for item in outcomes[: len(samples)]] == [
        sample.key for sample in samples
    ], "every sample comes back once, in order"
    assert all(isinstance(item, Prompt) for item in outcomes[len(samples) :])
    unsure = {"truncated": 0, "zeroed span": 0, "flipped bytes": 0}
    for sample, item in zip(samples, outcomes):
        path, act = sample.videos[0], sample.problem
        if isinstance(item, Skipped):
            assert item.path == path and item.reason and "\n" not in item.reason
        if act == "sleep":
            assert item.reason == "took more than 4 s (--decode_timeout)"
        elif act == "die":
            assert item.reason == "its worker died (exit code -9)"
        elif verdict[path] in ("good", "bad"):
            assert isinstance(item, Prompt) == (verdict[path] == "good"), (path, item)
        else:  # some of the damaged are whole enough; what is used is what reading it alone gives
            unsure[verdict[path]] += isinstance(item, Prompt)
            if isinstance(item, Prompt) and unsure[verdict[path]] % 5 == 0:
                assert len(read_video(path, SETTINGS, 28)[0]) == 4, path
    assert all(0 < count < 60 for count in unsure.values()), unsure  # both happen

    third = len(memory) // 3
    assert max(main for main, _ in memory[third:]) < memory[third][0] + 60, "MB of the trainer"
    for pid, then in memory[third][1].items():
        for _, now in memory[third:]:
            assert now.get(pid, 0) < then + 60, "MB of a worker"


@pytest.mark.parametrize("count", [150, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_mutated_files_raise_nothing_but_the_error_that_is_counted(tmp_path, count):
    suffixes = {".mp4": "libx264", ".ts": "libx264", ".mkv": "libx264", ".avi": "mpeg4", ".webm": "libvpx-vp9",
                ".mpg": "mpeg2video", ".gif": "gif"}  # fmt: skip
    whole = {
        suffix: Path(encode(tmp_path / f"whole{suffix}", blocks(12, 64, 64), codec=codec, rate=25)).read_bytes()
        for suffix, codec in suffixes.items()
    }
    rng, refused = np.random.default_rng(0), 0
    for number in range(count):
        suffix = list(whole)[number % len(whole)]
        content = flip(whole[suffix], rng, int(rng.integers(1, 40)))
        if number % 3 == 0:
            content = content[: int(rng.integers(1, len(content)))]
        if number % 5 == 0:
            content = zero(content + bytes(400), rng)
        path = tmp_path / f"{number}{suffix}"
        path.write_bytes(content)
        try:
            assert read_video(str(path), SETTINGS, 28)[0].shape[1] == 3
        except VideoError as error:
            refused += 1
            assert error.path == str(path) and "\n" not in error.reason
        path.unlink()
    assert 0.1 * count < refused < 0.95 * count
