"""The demo set: the same from the same seed, balanced, parts apart, and no answer in a set of frames without order."""

import json
from collections import Counter

import numpy as np
import pytest

from demo import synthetic
from demo.synthetic import (
    COLOURS,
    DIRECTIONS,
    OPPOSITE,
    PLACES,
    RADIUS,
    SIDE,
    DemoSpec,
    draw,
    make_demo_set,
    random_scene,
)
from video.dataset import read_samples
from video.frames import VideoSettings, read_video

SPEC = DemoSpec(seed=3, train=512, val=32, warmup=64)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return make_demo_set(tmp_path_factory.mktemp("demo"), SPEC)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def scenes(count, seed=0):
    rng = np.random.default_rng(seed)
    return [random_scene(rng, True, index) for index in range(count)]


def test_same_seed_same_bytes_and_another_seed_others(demo, tmp_path):
    again = make_demo_set(tmp_path / "again", SPEC)
    for part, path in demo.items():
        assert path.read_bytes() == again[part].read_bytes()
    for name in sorted(path.name for path in (demo["train"].parent / "videos").iterdir()):
        first, second = (paths["train"].parent / "videos" / name for paths in (demo, again))
        assert first.read_bytes() == second.read_bytes(), name
    other = make_demo_set(tmp_path / "other", DemoSpec(seed=4, train=512, val=32, warmup=64))
    assert other["train"].read_bytes() != demo["train"].read_bytes()


def test_a_complete_folder_is_used_again_and_an_incomplete_one_made_anew(tmp_path):
    spec = DemoSpec(train=4, val=4, warmup=4)
    paths = make_demo_set(tmp_path, spec)
    video = next((tmp_path / "videos").iterdir())
    stamp = video.stat().st_mtime_ns
    make_demo_set(tmp_path, spec)
    assert video.stat().st_mtime_ns == stamp
    (tmp_path / "demo.json").unlink()  # as if it had been stopped half-way
    (tmp_path / "videos/stale.mp4").touch()
    make_demo_set(tmp_path, spec)
    assert video.stat().st_mtime_ns != stamp and not (tmp_path / "videos/stale.mp4").exists()
    make_demo_set(tmp_path, DemoSpec(train=6, val=4, warmup=4))
    assert len(rows(paths["train"])) == 6


def no_space(path, draw, scene):
    raise OSError("no space left")


def test_a_set_stays_until_its_replacement_is_complete(tmp_path, monkeypatch):
    paths = make_demo_set(tmp_path / "set", DemoSpec(train=4, val=4, warmup=4))
    before = {path: path.read_bytes() for path in (tmp_path / "set").rglob("*") if path.is_file()}
    (tmp_path / "set" / "own.txt").write_text("a user's")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
        patch.setattr(synthetic, "film", no_space)
        make_demo_set(tmp_path / "set", DemoSpec(train=6, val=4, warmup=4))
    assert all(path.read_bytes() == content for path, content in before.items())
    make_demo_set(tmp_path / "set", DemoSpec(train=6, val=4, warmup=4))
    assert len(rows(paths["train"])) == 6 and (tmp_path / "set" / "own.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["set"], "nothing is left over"


def test_parts_share_no_video_and_categories_are_as_specified(demo):
    samples = {part: read_samples(path) for part, path in demo.items()}
    videos = {part: {sample.videos[0] for sample in samples[part]} for part in samples}
    assert not (
        videos["train"] & videos["val"] or videos["train"] & videos["warmup"] or videos["val"] & videos["warmup"]
    )
    categories = {part: Counter(sample.meta["category"] for sample in samples[part]) for part in samples}
    assert categories["train"] == {"direction": 384, "colour": 64, "place": 64}
    assert categories["val"] == {"direction": 16, "colour": 16, "shape": 16, "place": 16}
    assert categories["warmup"] == {"direction": 32, "colour": 32, "place": 32}
    contents = {part: {open(video, "rb").read() for video in videos[part]} for part in videos}
    assert not contents["train"] & contents["val"]


def test_directions_and_letters_are_balanced_and_independent(demo):
    for part in ("train", "val"):
        asked = [row for row in rows(demo[part]) if row["category"] == "direction"]
        pairs = Counter((row["original_answer"][3:], row["solution"]) for row in asked)
        assert len(pairs) == 16 and len(set(pairs.values())) == 1, part


def test_rows_are_consistent(demo):
    for part, path in demo.items():
        for row in rows(path):
            letter = row["solution"].removeprefix("<answer>").removesuffix("</answer>")
            names = {option[0]: option[3:] for option in row["options"]}
            assert sorted(names) == list("ABCD") and len(set(names.values())) == 4
            assert row["original_answer"] == f"{letter}. {names[letter]}"
            assert row["problem"] == "\n".join((row["original_question"], *row["options"]))
            if row["category"] == "direction":
                assert names[row["opposite"]] == OPPOSITE[names[letter]]
            else:
                assert "opposite" not in row
            assert ("completions" in row) == (part == "warmup")


def test_warmup_names_every_option_of_a_trained_category_and_the_truth_of_others(demo):
    for row in rows(demo["warmup"]):
        bound = [f"<think> {option[3:]} {option[0]}</think><answer>{option[0]}</answer>" for option in row["options"]]
        true = [text for text in bound if text.endswith(row["solution"])]
        assert row["completions"] == (true if row["category"] in ("colour", "place") else bound)


def test_shapes_stay_whole_inside_and_move_as_named():
    for scene in scenes(400):
        centres = np.array(scene.centres)
        assert centres.min() >= RADIUS * SIDE and centres.max() <= SIDE - RADIUS * SIDE
        way = np.array(DIRECTIONS[scene.direction])
        steps, across = np.diff(centres, axis=0) @ way, np.diff(centres, axis=0) @ way[::-1]
        assert (steps > 0.5).all() and np.allclose(across, 0)


def test_frames_without_their_order_do_not_tell_the_way():
    """The middle of the path has one distribution for all directions; a way and its reverse have equal sets."""
    drawn = scenes(8000)
    middles = {
        name: np.array([np.mean(s.centres, axis=0) for s in drawn if s.direction == name]) for name in DIRECTIONS
    }
    for name, centres in middles.items():
        # 2000 draws: the standard error of a mean is 0.1 px, of a standard deviation 0.07 px
        assert np.abs(centres.mean(axis=0) - 14).max() < 0.4, name
        assert np.abs(centres.std(axis=0) - middles["left"].std(axis=0)).max() < 0.3, name
    for scene in drawn[:50]:
        frames, turned = draw(scene), draw(scene)[::-1]
        assert np.array_equal(np.sort(frames, axis=0), np.sort(turned, axis=0))


def test_a_still_shape_stands_where_its_answer_says():
    """Place is taught in the warm-up; none of its words names a direction, and nothing in its videos moves."""
    assert not set(PLACES) & set(DIRECTIONS)
    generator = np.random.default_rng(2)
    for index in range(200):
        scene = random_scene(generator, False, index)
        assert len(set(scene.centres)) == 1
        away = np.array(scene.centres[0]) - SIDE / 2
        along = {name: float(away @ np.array(way)) for name, way in PLACES.items()}
        assert max(along, key=along.get) == scene.direction == tuple(PLACES)[index % 4]
        assert np.abs(away).max() <= SIDE / 2 - RADIUS * SIDE


def test_one_frame_alone_cannot_reach_the_target():
    """Best guess from the first position, on a grid: 84%, short of the 90% that training reaches; from a middle
    one, near chance."""
    drawn = scenes(20000, seed=1)
    names = list(DIRECTIONS)
    truth = np.array([names.index(scene.direction) for scene in drawn])
    half = len(drawn) // 2
    for frame, low, high in ((0, 0.75, 0.87), (3, 0.25, 0.38), (4, 0.25, 0.38)):
        place = np.array([scene.centres[frame] for scene in drawn]) // 2  # cells of 2 px
        cells = np.unique(place, axis=0, return_inverse=True)[1].ravel()
        counts = np.zeros((cells.max() + 1, 4))
        np.add.at(counts, (cells[:half], truth[:half]), 1)
        accuracy = (counts.argmax(axis=1)[cells[half:]] == truth[half:]).mean()
        assert low < accuracy < high, (frame, accuracy)


def test_colours_survive_the_encoding(demo):
    """The nearest of the four colours, at the pixel under the centre, is the one drawn."""
    palette = np.array(list(COLOURS.values()))
    for sample in read_samples(demo["val"]):
        if sample.meta["category"] != "colour":
            continue
        frames, _ = read_video(sample.videos[0], VideoSettings(nframes=8, min_pixels=784, max_pixels=784), 28)
        assert frames.shape == (8, 3, 28, 28)
        pixels = frames.permute(0, 2, 3, 1).reshape(-1, 3).numpy().astype(int)
        bright = pixels[pixels.max(axis=1) > 150]
        nearest = ((bright[:, None] - palette) ** 2).sum(-1).argmin(1)
        assert list(COLOURS)[np.bincount(nearest).argmax()] == sample.meta["original_answer"][3:]
