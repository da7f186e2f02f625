"""Rows to samples, and the errors that name the line and the fix."""

import json

import pytest

from video.dataset import DataError, leave_out, read_mixture, read_samples, read_skip_list

ROW = {"problem": "What? \nA. x\nB. y", "solution": "<answer>B.</answer>", "video": "clips/a.mp4"}


def write(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_open_r1_video_row(tmp_path):
    row = ROW | {
        "original_question": "q",
        "original_answer": "B. y",
        "kind": "direction",
        "completions": ["c"],
        "options": ["A. x"],
    }
    (sample,) = read_samples(write(tmp_path / "train.jsonl", row))
    assert sample.key == "train.jsonl:1" and sample.problem == ROW["problem"] and sample.answer == "B."
    assert sample.videos == (str(tmp_path / "clips/a.mp4"),) and sample.images == ()
    assert sample.completions == ("c",) and sample.options == ("A. x",) and sample.problem_type == "multiple choice"
    assert sample.meta == {"original_question": "q", "original_answer": "B. y", "kind": "direction"}


def test_lists_images_text_only_and_blank_lines(tmp_path):
    bare = {"problem": "p", "solution": "C"}
    samples = read_samples(
        write(
            tmp_path / "d.jsonl",
            bare | {"videos": ["a", "b"]},
            "",
            bare | {"image": "i.png"},
            bare | {"video": None},
            bare | {"solution": "<answer> 4.5 </answer>", "problem_type": "numerical"},
        )
    )
    assert [sample.key for sample in samples] == ["d.jsonl:1", "d.jsonl:3", "d.jsonl:4", "d.jsonl:5"]
    assert samples[0].videos == (str(tmp_path / "a"), str(tmp_path / "b"))
    assert samples[1].images == (str(tmp_path / "i.png"),) and samples[2].videos == ()
    assert samples[3].answer == "4.5" and samples[3].problem_type == "numerical"


def test_absolute_paths_are_rerooted_by_the_longest_suffix(tmp_path):
    for name in ("set/clips/a.mp4", "clips/a.mp4", "a.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    there = str(tmp_path / "a.mp4")
    rows = [
        ROW | {"video": name}
        for name in ("/nas/bob/set/clips/a.mp4", "/nas/b/clips/a.mp4", "/nas/z.mp4", there, "a.mp4")
    ]
    (tmp_path / "rows").mkdir()
    samples = read_samples(write(tmp_path / "rows/d.jsonl", *rows), video_root=tmp_path)
    expected = [tmp_path / "set/clips/a.mp4", tmp_path / "clips/a.mp4", "/nas/z.mp4", there, there]
    assert [sample.videos[0] for sample in samples] == [str(path) for path in expected]


def test_video_r1_rows_of_a_json_array(tmp_path):
    row = {
        "problem_id": 7,
        "problem": "Where?",
        "data_type": "image",
        "problem_type": "multiple choice",
        "options": ["A) here", "B) there"],
        "solution": "<answer>A</answer>",
        "path": "./x/i.jpg",
    }
    (tmp_path / "v.json").write_text(json.dumps([row, row | {"data_type": "video", "options": [], "path": "v.mp4"}]))
    image, video = read_samples(tmp_path / "v.json")
    assert image.problem == "Where?\nOptions:\nA) here\nB) there" and image.images == (str(tmp_path / "x/i.jpg"),)
    assert image.videos == () and image.meta == {"problem_id": 7} and image.key == "v.json:1"
    assert video.videos == (str(tmp_path / "v.mp4"),) and video.problem == "Where?" and video.key == "v.json:2"


@pytest.mark.parametrize(
    "line,message",
    [
        ("{broken", r"d.jsonl:2: is not JSON"),
        ("[1]", r"d.jsonl:2: is a list, not an object"),
        (
            {"question": "q"},
            r"d.jsonl:2: has the fields \['question'\], of no known format; needed are: .*problem \+ solution",
        ),
        (ROW | {"problem": 3}, r"d.jsonl:2: field 'problem' must be a text"),
        (ROW | {"problem": " "}, r"d.jsonl:2: field 'problem' must be a text"),
        (ROW | {"solution": None}, r"d.jsonl:2: field 'solution' must be a text"),
        (ROW | {"video": 4}, r"d.jsonl:2: field 'video' must be a text or a list of texts, got 4"),
        (ROW | {"video": ["a", 1]}, r"d.jsonl:2: field 'video' must be"),
        (ROW | {"solution": "<answer>Blue</answer>"}, r"d.jsonl:2: solution 'Blue' has no option letter; write e.g."),
        (ROW | {"solution": "<answer></answer>"}, r"d.jsonl:2: solution '' has no option letter"),
    ],
)
def test_bad_rows_name_the_line_and_the_fix(tmp_path, line, message):
    with pytest.raises(DataError, match=message) as caught:
        read_samples(write(tmp_path / "d.jsonl", ROW, line))
    assert "\n" not in str(caught.value)


def test_bad_files_name_the_flag(tmp_path):
    with pytest.raises(DataError, match="--data .*nothing.jsonl: no such file"):
        read_samples(tmp_path / "nothing.jsonl")
    with pytest.raises(DataError, match="--data .*e.jsonl: is empty"):
        read_samples(write(tmp_path / "e.jsonl", "", ""))
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(DataError, match="b.jsonl:1: is not UTF-8"):
        read_samples(tmp_path / "b.jsonl")


def rows_of(folder, count):
    folder.mkdir(exist_ok=True)
    return write(folder / "train.jsonl", *[ROW | {"video": f"{folder.name}{n}.mp4"} for n in range(count)])


def test_weights_repeat_and_subsample_rows_the_same_way_every_time(tmp_path):
    a, b, c = (rows_of(tmp_path / name, count) for name, count in (("a", 4), ("b", 8), ("c", 2)))
    samples = read_mixture([f"{a}:2", f"{b}:0.25", f"{c}:1.5"])
    keys = [sample.key for sample in samples]
    assert keys[:8] == [f"a/train.jsonl:{n}" for n in (1, 2, 3, 4)] * 2
    assert len(keys) == 8 + 2 + 3 and keys[10:12] == ["c/train.jsonl:1", "c/train.jsonl:2"]
    quarter = keys[8:10]
    assert len(set(quarter)) == 2 and all(key.startswith("b/train.jsonl:") for key in quarter)
    assert [sample.key for sample in read_mixture([f"{a}:2", f"{b}:0.25", f"{c}:1.5"])] == keys
    assert read_mixture(str(a)) == read_samples(a) == read_mixture([str(a)])
    assert len(read_mixture([f"{a}:1e0"])) == 4


def test_names_take_only_the_folders_they_need(tmp_path):
    paths = [tmp_path / name for name in ("x/one/d.jsonl", "x/two/d.jsonl", "y/two/d.jsonl", "e.jsonl")]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, ROW)
    keys = [sample.key for sample in read_mixture(map(str, paths))]
    assert keys == ["one/d.jsonl:1", "x/two/d.jsonl:1", "y/two/d.jsonl:1", "e.jsonl:1"]


def test_a_colon_in_a_name_is_no_weight(tmp_path):
    assert len(read_mixture(str(write(tmp_path / "d:3", ROW)))) == 1
    with pytest.raises(DataError, match="--data .*gone.jsonl: no such file"):
        read_mixture(f"{tmp_path}/gone.jsonl:2")


@pytest.mark.parametrize(
    "specs,message",
    [(["{}:0"], "weight must be above 0"), (["{}:nan"], "weight must be above 0"), (["{}", "{}:2"], "is given twice"),
     (["{}:0.001"], "leave no row")],
)  # fmt: skip
def test_weights_that_cannot_be_name_the_flag(tmp_path, specs, message):
    path = rows_of(tmp_path / "a", 3)
    with pytest.raises(DataError, match=f"--data.*{message}"):
        read_mixture([spec.format(path) for spec in specs])


def test_a_skip_list_leaves_out_the_rows_of_its_files(tmp_path, monkeypatch):
    samples = read_samples(rows_of(tmp_path / "a", 3))
    bad = {"path": samples[1].videos[0], "reason": "is empty", "rows": ["x"]}
    listed = read_skip_list(write(tmp_path / "bad.jsonl", bad, ""))
    assert listed == {samples[1].videos[0]: "is empty"}
    assert leave_out(samples, listed) == ([samples[0], samples[2]], [samples[1]])
    monkeypatch.chdir(tmp_path)  # relative paths of either side mean the same files
    assert leave_out(read_samples("a/train.jsonl"), listed)[1][0].videos == ("a/a1.mp4",)
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe{")
    with pytest.raises(DataError, match="--skip_list b.jsonl:1: is not UTF-8"):
        read_skip_list(tmp_path / "b.jsonl")
    with pytest.raises(DataError, match="--skip_list .*: no such file; python -m video.scan"):
        read_skip_list(tmp_path / "none")
    with pytest.raises(DataError, match="--skip_list bad.jsonl:2: is not JSON"):
        read_skip_list(write(tmp_path / "bad.jsonl", bad, "{"))
    with pytest.raises(DataError, match="--skip_list bad.jsonl:1: must be"):
        read_skip_list(write(tmp_path / "bad.jsonl", "[]"))
