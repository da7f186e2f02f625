"""Rows to samples, and the errors that name the line and the fix."""

import csv
import gzip
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
        (
            {"question": "q", "solution": "<answer>A</answer>", "problem_type": "multiple choice"},
            r"d.jsonl:2: has the fields .*, of no known format; needed are: ",  # no "did you mean"
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


TABLE = [
    ["problem", "solution", "video", "options", "video_start", "note"],
    ["What?\nA. x, B. y", "<answer>B</answer>", "clips/a.mp4", "", "1.5", ""],
    ["Which?", "A", "b.mp4", '["red", "blue"]', "", '[laughs] a "quote"'],
]


@pytest.mark.parametrize("suffix,separator", [("csv", ","), ("tsv", "\t")])
def test_rows_of_a_table(tmp_path, suffix, separator):
    with open(tmp_path / f"t.{suffix}", "w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file, delimiter=separator).writerows(TABLE)
    first, second = read_samples(tmp_path / f"t.{suffix}")
    assert (first.key, second.key) == (f"t.{suffix}:2", f"t.{suffix}:4"), "the line where a row begins"
    assert first.problem == "What?\nA. x, B. y" and first.clips[0].start == 1.5 and first.options == ()
    assert second.options == ("A. red", "B. blue") and second.clips == ()
    assert second.videos == (str(tmp_path / "b.mp4"),) and second.meta == {"note": '[laughs] a "quote"'}


def test_a_jsonl_that_is_gzipped_has_the_same_rows(tmp_path):
    plain = write(tmp_path / "d.jsonl", ROW, "", ROW | {"video": "b.mp4"})
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    samples = read_samples(tmp_path / "d.jsonl.gz")
    assert [sample.key for sample in samples] == ["d.jsonl.gz:1", "d.jsonl.gz:3"]
    assert [(s.problem, s.videos) for s in samples] == [(s.problem, s.videos) for s in read_samples(plain)]
    assert read_mixture([f"{tmp_path}/d.jsonl.gz:2"])[2].key == "d.jsonl.gz:1"


def test_rows_of_moments_by_video(tmp_path):
    """ActivityNet-Captions, and Charades-STA as VideoChat-R1 and Time-R1 have it; and Charades-STA's own lines."""
    videos = {
        "v_uqiMw7tQ1Cc": {"duration": 55.15, "timestamps": [[0, 4.14], [33.36, 55.15]],
                          "sentences": ["Two men stand.", " One lifts. "]},
        "AMT7R": {"duration": 30.08, "timestamps": [[4.3, 12.5]], "sentences": ["a picture"], "phrases": [["x"]]},
    }  # fmt: skip
    (tmp_path / "val_2.json").write_text(json.dumps(videos))
    (tmp_path / "v_uqiMw7tQ1Cc.mkv").touch()
    lines = "3MSZA 24.3 30.4##person turn a light on.\nAMT7R 4.3 12.5##it's # odd.\n"
    (tmp_path / "charades_sta_test.txt").write_text(lines)
    one, two, three = read_samples(tmp_path / "val_2.json")
    assert (one.key, two.key, three.key) == ("val_2.json:1", "val_2.json:2", "val_2.json:3")
    assert one.videos == two.videos == (str(tmp_path / "v_uqiMw7tQ1Cc.mkv"),)
    assert (two.answer, two.meta, two.problem_type) == ("33.36 to 55.15", {"duration": 55.15}, "temporal grounding")
    assert two.problem == 'When does this happen in the video: "One lifts"?'
    light, odd = read_samples(tmp_path / "charades_sta_test.txt")
    assert (light.key, light.answer) == ("charades_sta_test.txt:1", "24.3 to 30.4")
    assert light.videos == (str(tmp_path / "3MSZA.mp4"),)
    assert odd.problem == 'When does this happen in the video: "it\'s # odd"?'


BAD_FILES = {  # name: (content, message)
    "d.txt": (b"3MSZA 24.3 30.4 person", r"d.txt:1: a line of a .txt file must be VIDEO START END##SENTENCE"),
    "e.txt": (b"3MSZA 1..2 3.0##a light on.", r"e.txt:1: a line of a .txt file must be VIDEO START END##SENTENCE"),
    "t.jsonl": (
        b'{"path": "a.mp4", "question": "a light on.", "answer": "1..2-3", "qsemtype": "x"}',
        "t.jsonl:1: the answer '1..2-3' must be",
    ),
    "v.json": (b'{"v": {"sentences": ["a"], "timestamps": []}}', "v.json: 'v' must have as many timestamps as"),
    "o.json": (b'{"v": {"a": 1}}', "o.json: holds no array"),
    "d.xlsx": (b"PK", "d.xlsx: unsupported file type; use one of .jsonl, .jsonl.gz, .json, .parquet, .csv, .tsv"),
    "a.csv": (b"problem,solution,video\nWhat, now?,A,v.mp4\n", "a.csv:2: has 4 cells for 3 columns; quote a cell"),
    "b.csv": (b"problem,solution,video\nWhat?,A\n", "b.csv:2: has 2 cells for 3 columns"),
    "c.csv": (b"problem,,video\nWhat?,A,v.mp4\n", "c.csv:1: the first row must name each column"),
    "d.csv": (b"problem,problem\nWhat?,A\n", "d.csv:1: the first row must name each column"),
    "e.csv": (b"problem,solution\n\xff\xfe,A\n", "e.csv:2: is not UTF-8"),
    "f.csv": (b"problem,solution,video\n", "f.csv: is empty"),
    "g.csv": (b"problem,solution,video\n,A,v.mp4\n", "g.csv:2: field 'problem' must be a text that is not empty"),
    "i.csv": (
        b'solution,problem\nA,"What?\nB,Why?\nB,Who?\n',
        r"i.csv:2: is no table \(unexpected end of data\); fix the quotes",
    ),
    "i.tsv": (b'solution\tproblem\nA\tWho?\nA\t"Why?" he asks\n', r"i.tsv:3: is no table \(.*; fix the quotes"),
    "h.csv": (b'problem,solution\n"' + b"a" * 200_000 + b'",A\n', r"h.csv:2: is no table \(field larger than"),
    "d.jsonl.gz": (b'{"problem": 1}', "d.jsonl.gz: cannot be read .*[Nn]ot a gzipped file"),
    "e.jsonl.gz": (gzip.compress(b'{"problem": 1}\n' * 999)[:-9], "e.jsonl.gz: is a damaged gzip file"),
    "f.jsonl.gz": (gzip.compress(b"{\n"), "f.jsonl.gz:1: is not JSON"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_of_each_type_is_named_with_the_fix(name, tmp_path):
    content, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_samples(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_all_bad_rows_of_a_table_are_named_at_once(tmp_path):
    (tmp_path / "t.csv").write_text("problem,solution,video\nWhat?,A,v.mp4,more\nWhat?,A,v.mp4\n,A,v.mp4\n")
    with pytest.raises(DataError, match="2 of 3 rows cannot be used: t.csv:2: has 4 cells .*; t.csv:4: field"):
        read_samples(tmp_path / "t.csv")
