"""A real-shaped row of every known format: what it becomes, and that conversion to the project's own form keeps it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from video_helpers import make_video

from grpo.run.data import hold_out
from rewards import check_sample
from video.convert import convert, main, to_row
from video.dataset import read_samples
from video.formats import Clip, DataError, guess_type, lettered

ABCD = ["A. Apples.", "B. Candles.", "C. Berries.", "D. Stars."]
# name -> (row, file that its video is, what the sample must be)
FORMATS = {
    "open_r1_video": (
        {"problem": "What?\nA. x\nB. y\n", "solution": "<answer>B.</answer>", "video": "/nas/set/clips/a.mp4",
         "original_question": "What?\nA. x\nB. y\nPlease answer.", "original_answer": "B. y"},
        "clips/a.mp4", {"problem": "What?\nA. x\nB. y\n", "answer": "B."},
    ),
    "llava_video": (
        {"query": "<video>\nWhat?\nA. x\nB. y\nPlease respond with only the letter. Please!", "response": "B. y",
         "videos": "academic_source/a.mp4"},
        "academic_source/a.mp4", {"problem": "\nWhat?\nA. x\nB. y\n", "answer": "B."},
    ),
    "video_r1": (
        {"problem_id": 7, "problem": "Where?", "data_type": "video", "problem_type": "multiple choice",
         "options": ["A) here", "B) there"], "solution": "<answer>A</answer>", "path": "./CLEVRER/v.mp4", "process": ""},
        "CLEVRER/v.mp4", {"problem": "Where?\nOptions:\nA) here\nB) there", "answer": "A", "options": ("A) here", "B) there")},
    ),
    "video_r1_cot": (
        {"problem_id": 9, "problem": "Is it red?", "data_type": "video", "problem_type": "free-form", "options": [],
         "process": "<think>I see red.</think>", "solution": "<answer>yes</answer>", "path": "v.mp4"},
        "v.mp4", {"answer": "yes", "problem_type": "free-form", "completions": ("<think>I see red.</think>\n<answer>yes</answer>",)},
    ),
    "video_r1_number": (
        {"problem_id": 8, "problem": "How many?", "data_type": "video", "problem_type": "numerical", "options": [],
         "solution": "<answer>12.5</answer>", "path": "v.mp4"},
        "v.mp4", {"problem": "How many?", "answer": "12.5", "problem_type": "numerical"},
    ),
    "longvideo_reason": (
        {"problem": "Why?\nA. x\nB. y", "reasoning": "...", "videos": "reason/v.mp4", "answer": "<answer>B</answer>"},
        "reason/v.mp4", {"answer": "B", "problem_type": "multiple choice"},
    ),
    "longvideo_reason_open": (
        {"problem": "Why?", "reasoning": "...", "videos": "v.mp4", "answer": "A man leaves the room"},
        "v.mp4", {"answer": "A man leaves the room", "problem_type": "free-form"},
    ),
    "easy_r1": (
        {"problem": "<video>How long is it?", "answer": "42", "videos": ["v.mp4"], "images": None},
        "v.mp4", {"answer": "42", "problem_type": "numerical"},
    ),
    "mvbench": (
        {"video": "ZS9XR.mp4", "question": "What happened after?", "candidates": ["Ate the medicine.", "Tidied up."],
         "answer": "Tidied up.", "start": 1.0, "end": 3.5, "accurate_start": 1.1},
        "video/star/Charades_v1_480/ZS9XR.mp4",
        {"problem": "What happened after?\nA. Ate the medicine.\nB. Tidied up.", "answer": "B",
         "clips": (Clip(1.0, 3.5),)},
    ),
    "video_mme": (
        {"video_id": "001", "duration": "short", "domain": "Knowledge", "sub_category": "History", "url": "u",
         "videoID": "fFjv93ACGo8", "question_id": "001-1", "task_type": "Counting", "question": "Which?",
         "options": ABCD, "answer": "C"},
        "data/fFjv93ACGo8.mp4", {"problem": "\n".join(("Which?", *ABCD)), "answer": "C", "options": tuple(ABCD)},
    ),
    "tempcompass": (
        {"video_id": "1021", "question": "What?\nA. running\nB. jumping", "answer": "B. jumping", "dim": "action"},
        "videos/1021.mp4", {"problem": "What?\nA. running\nB. jumping", "answer": "B"},
    ),
    "tempcompass_yes_no": (
        {"video_id": "1021", "question": "Is he running?", "answer": "no", "dim": "action"},
        "1021.mp4", {"problem": "Is he running?\nA. yes\nB. no", "answer": "B", "options": ("A. yes", "B. no")},
    ),
    "tempcompass_caption": (
        {"video_id": "7", "question": "Which fits?\nOption 1: He runs.\nOption 2: He jumps.", "answer": "Option 2: He jumps.",
         "dim": "order"},
        "7.mp4", {"answer": "2", "problem_type": "numerical"},
    ),
    "mmvu": (
        {"id": "validation_0", "video_path": "https://host.org/a/main/videos/Art/0.mp4", "question_type": "multiple-choice",
         "question": "Which?", "choices": {"A": "one", "B": "two", "C": "three", "D": "", "E": None}, "answer": "C"},
        "videos/Art/0.mp4", {"problem": "Which?\nA. one\nB. two\nC. three", "answer": "C"},
    ),
    "mmvu_open": (
        {"id": "validation_1", "video_path": "0.mp4", "question_type": "open-ended", "question": "Which?", "choices": None,
         "answer": "A stack"},
        "0.mp4", {"problem": "Which?", "answer": "A stack", "problem_type": "free-form"},
    ),
    "vsi_bench_number": (
        {"id": 0, "dataset": "arkitscenes", "scene_name": "41069025", "question_type": "object_counting",
         "question": "How many tables?", "ground_truth": "4", "options": None},
        "arkitscenes/41069025.mp4", {"answer": "4", "problem_type": "mra", "problem": "How many tables?"},
    ),
    "vsi_bench_choice": (
        {"id": 1, "dataset": "scannet", "scene_name": "s1", "question_type": "object_rel_distance", "question": "Closest?",
         "ground_truth": "B", "options": ["A. tv", "B. chair"]},
        "scannet/s1.mp4", {"problem": "Closest?\nA. tv\nB. chair", "answer": "B"},
    ),
    "longvideobench": (
        {"video_id": "86", "video_path": "86CxyhFV9MI.mp4", "question": "Who?", "option0": "a", "option1": "b", "option2": "c",
         "option3": "N/A", "option4": "N/A", "correct_choice": 2, "duration_group": 60, "question_category": "T3E"},
        "videos/86CxyhFV9MI.mp4", {"problem": "Who?\nA. a\nB. b\nC. c", "answer": "C"},
    ),
    "messages": (
        {"messages": [
            {"role": "system", "content": "You help."},
            {"role": "user", "content": [{"type": "video", "video": "file:///nas/v.mp4", "video_start": 0.5},
                                         {"type": "text", "text": "Which?\nA. x\nB. y"}]},
            {"role": "assistant", "content": "<think>t</think><answer>B</answer>"}]},
        "v.mp4", {"problem": "Which?\nA. x\nB. y", "answer": "B", "clips": (Clip(0.5),),
                  "completions": ("<think>t</think><answer>B</answer>",)},
    ),
    "messages_swift": (
        {"messages": [{"role": "user", "content": "<video>How many?"}, {"role": "assistant", "content": "3"}],
         "videos": ["v.mp4"]},
        "v.mp4", {"problem": "<video>How many?", "answer": "3", "problem_type": "numerical"},
    ),
    # Time-R1's train_2k5.json at 7f2b594; the file is cut from its source already
    "time_r1": (
        {"video": "./dataset/timer1/videos/timerft_data/4jujhM5qhEc_00:00:39:000_00:01:24:700.mp4", "duration": 45.7,
         "timestamp": [34.9, 41.9], "sentence": "the statue of a man on horseback", "qid": "my|internvid-vtime|4jujhM5qhEc",
         "video_start": 39.0, "video_end": 84.7, "difficulty": 41.04, "pred": [37.82, 44.84]},
        "timerft_data/4jujhM5qhEc_00:00:39:000_00:01:24:700.mp4",
        {"problem": 'When does this happen in the video: "the statue of a man on horseback"?', "answer": "34.9 to 41.9",
         "problem_type": "temporal grounding",
         "meta": {"duration": 45.7, "qid": "my|internvid-vtime|4jujhM5qhEc", "difficulty": 41.04, "pred": [37.82, 44.84]}},
    ),
    "time_r1_whole_path": (
        {"video": "./dataset/timer1/videos/timerft_data/a.mp4", "duration": 9.0, "timestamp": [1.0, 4.0], "sentence": "It falls.",
         "qid": "q", "video_start": None, "video_end": None, "difficulty": 50.0, "pred": [0.0, 3.0]},
        "dataset/timer1/videos/timerft_data/a.mp4",
        {"problem": 'When does this happen in the video: "It falls"?', "answer": "1.0 to 4.0", "problem_type": "temporal grounding"},
    ),
    "tvgbench": (
        {"path": "./dataset/timer1/videos/tvgbench_data/aHDGMOQgHUE.mp4", "question": "check the gas",
         "answer": "9.944375536211354-45.94437553621135", "start": 53.05562446378865, "end": 152.42562446378867, "duration": 99.37,
         "question_type": "video temporal grounding", "source": "./dataset/x.json", "dataset_name": "hirest",
         "qsemtype": "Object Transition", "bins": {"videolen": 4}},
        "videos/tvgbench_data/aHDGMOQgHUE.mp4",
        {"problem": 'When does this happen in the video: "check the gas"?', "answer": "9.944375536211354 to 45.94437553621135",
         "problem_type": "temporal grounding"},
    ),
    "charades_sta_of_the_hub": (
        {"video": "3MSZA.mp4", "caption": "person turn a light on.", "timestamp": [24.3, 30.4]},
        "Charades_v1_480/3MSZA.mp4",
        {"problem": 'When does this happen in the video: "person turn a light on"?', "answer": "24.3 to 30.4",
         "problem_type": "temporal grounding"},
    ),
    # OneThinker at 768b20f: rows as EasyR1/verl/utils/dataset.py and Evaluation/Eval/eval_bench.py read them
    "one_thinker_time": (
        {"problem_id": 1, "problem": "<video>When does he jump?", "data_type": "video", "problem_type": "temporal grounding",
         "options": [], "answer": '<answer>{"time": [3.2, 7.5]}</answer>', "videos": ["v.mp4"], "images": []},
        "v.mp4", {"answer": '{"time": [3.2, 7.5]}', "problem_type": "temporal grounding"},
    ),
    "one_thinker_time_as_an_object": (
        {"problem": "When does he jump?", "problem_type": "temporal grounding", "answer": {"time": [3.2, 7.5]}, "videos": ["v.mp4"]},
        "v.mp4", {"answer": '{"time": [3.2, 7.5]}', "problem_type": "temporal grounding"},
    ),
    "one_thinker_tube": (
        {"problem_id": 2, "problem": "Where and when?", "data_type": "video", "problem_type": "spatial-temporal grounding",
         "options": [], "solution": '<answer>{"time": [8.1, 10.4], "boxes": {"9": [317, 422, 582, 997]}}</answer>', "path": "./v.mp4"},
        "v.mp4", {"problem": "Where and when?", "answer": '{"time": [8.1, 10.4], "boxes": {"9": [317, 422, 582, 997]}}',
                  "problem_type": "spatial-temporal grounding"},
    ),
    "one_thinker_tracking": (
        {"problem_id": 3, "problem": "Track it.", "data_type": "video", "problem_type": "tracking", "options": [],
         "solution": '<answer>{"boxes": {"1": [405, 230, 654, 463], "2": [435, 223, 678, 446]}}</answer>', "path": "./v.mp4"},
        "v.mp4", {"answer": '{"boxes": {"1": [405, 230, 654, 463], "2": [435, 223, 678, 446]}}', "problem_type": "tracking"},
    ),
    "one_thinker_open": (
        {"problem_id": 4, "problem": "Why?", "data_type": "video", "problem_type": "open-ended", "options": [],
         "solution": "<answer>He is tired.</answer>", "path": "./v.mp4"},
        "v.mp4", {"answer": "He is tired.", "problem_type": "open-ended"},
    ),
    "boxes_in_pixels": (
        {"problem": "Where is it?", "solution": '{"boxes": [32, 48, 320, 240]}', "problem_type": "spatial grounding", "video": "v.mp4",
         "box_size": [640, 480]},
        "v.mp4", {"answer": '{"boxes": [50.0, 100.0, 500.0, 500.0]}', "problem_type": "spatial grounding"},
    ),
    # VideoChat-R1 at 73b2ea9, Annotations/
    "got": (
        {"path": "/mnt/share/GOT-10k/val/GOT-10k_Val_000010", "object": "sloth", "gt": [[0.093, 0.0, 0.8, 0.797], [0.095, 0.0, 0.8, 0.79]]},
        "val/GOT-10k_Val_000010",
        {"problem": "Track the sloth. Its box in the first frame is [0.093, 0.0, 0.8, 0.797].", "problem_type": "tracking",
         "answer": "[[0.093, 0.0, 0.8, 0.797], [0.095, 0.0, 0.8, 0.79]]",
         "meta": {"answer_form": "a list of its 2 boxes [x1, y1, x2, y2] at even distances in time, with coordinates from 0 to 1"}},
    ),
    "next_gqa": (
        {"id": "2574374895_8", "video": "1101/2574374895.mp4", "question": "what did the baby do", "options": ["(A) clap", "(B) crawl"],
         "duration": 30, "glue": [[23.0, 27.7]], "type": "TN", "answer": "(B)"},
        "1101/2574374895.mp4",
        {"problem": "what did the baby do\n(A) clap\n(B) crawl", "answer": "B", "meta": {"id": "2574374895_8", "duration": 30,
         "glue": [[23.0, 27.7]], "type": "TN"}},
    ),
    # NExT-QA at f2dafbf, dataset/nextqa/val.csv: cells are text; a video lies in a folder that the row does not name
    "next_qa": (
        {"video": "4010069381", "frame_count": "369", "width": "640", "height": "480", "question": "how do the two man play",
         "answer": "2", "qid": "6", "type": "CH", "a0": "roll", "a1": "tap", "a2": "strum", "a3": "hit", "a4": "pat"},
        "NExTVideo/1164/4010069381.mp4",
        {"problem": "how do the two man play\nA. roll\nB. tap\nC. strum\nD. hit\nE. pat", "answer": "C",
         "meta": {"frame_count": "369", "width": "640", "height": "480", "qid": "6", "type": "CH"}},
    ),
    "next_gqa_csv": (
        {"video": "4010069381", "question": "how?", "answer": "hit", "qid": "6", "type": "CH", "a0": "roll", "a1": "tap",
         "a2": "strum", "a3": "hit", "a4": "pat"},
        "4010069381.mp4", {"answer": "D"},
    ),
}  # fmt: skip
FILE_NAMES = {"mvbench": "action_sequence.json"}


def write(folder: Path, name: str) -> tuple[Path, Path]:
    """(data file, video) of one format, in an array where the file is a .json."""
    row, video, _ = FORMATS[name]
    (folder / video).parent.mkdir(parents=True, exist_ok=True)
    (folder / video).touch()
    path = folder / FILE_NAMES.get(name, f"{name}.jsonl")
    path.write_text(json.dumps([row] if path.suffix == ".json" else row))
    return path, folder / video


@pytest.mark.parametrize("name", FORMATS)
def test_row_of_every_format(name, tmp_path):
    path, video = write(tmp_path, name)
    (sample,) = read_samples(path)
    assert sample.videos == (str(video),) and sample.images == ()
    expected = {"problem_type": "multiple choice", "clips": ()} | FORMATS[name][2]
    assert {field: getattr(sample, field) for field in expected} == expected
    check_sample(sample)  # the reward can score it


@pytest.mark.parametrize("name", FORMATS)
def test_conversion_reads_back_as_the_same_sample(name, tmp_path):
    path, _ = write(tmp_path, name)
    assert convert(path, tmp_path / "out.jsonl") == (1, [])
    (before,), (after,) = read_samples(path), read_samples(tmp_path / "out.jsonl")
    assert to_row(after) == json.loads((tmp_path / "out.jsonl").read_text()), "converting twice changes nothing"
    for field in ("problem", "videos", "images", "problem_type", "options", "completions", "clips"):
        assert getattr(after, field) == getattr(before, field), field
    assert after.answer.rstrip(".)") == before.answer.rstrip(".)")


@pytest.mark.parametrize("tag", ["<video>\n", "<image>", "<video>"])
def test_llava_rows_are_written_as_they_were_published(tag, tmp_path):
    """The published script's rules: tags dropped and nothing stripped, cut at the first "Please", answer[:2], the root
    joined, rows without their file left out, five fields in this order, letters outside ASCII kept."""
    rows = [
        {"query": f"{tag}Où?\nA. ici\nB. là\nPlease answer. Please", "response": "B. là", "videos": "a.mp4", "id": 3},
        {"query": "No instruction\nA. x", "response": "A", "videos": ["sub/b.mp4"]},
        {"query": "gone Please", "response": "A. x", "videos": "missing.mp4"},
    ]
    (tmp_path / "root/sub").mkdir(parents=True)
    for name in ("a.mp4", "sub/b.mp4"):
        (tmp_path / "root" / name).touch()
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert (
        main([str(tmp_path / "train.jsonl"), str(tmp_path / "out.jsonl"), "--video_root", str(tmp_path / "root")]) == 0
    )
    question = tag.replace("<video>", "").replace("<image>", "") + "Où?\nA. ici\nB. là\n"
    expected = [
        {"problem": question, "solution": "<answer>B.</answer>", "video": f"{tmp_path}/root/a.mp4",
         "original_question": question + "Please answer. Please", "original_answer": "B. là"},
        {"problem": "No instruction\nA. x", "solution": "<answer>A</answer>", "video": f"{tmp_path}/root/sub/b.mp4",
         "original_question": "No instruction\nA. x", "original_answer": "A"},
    ]  # fmt: skip
    lines = (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
    assert lines == [json.dumps(row, ensure_ascii=False) for row in expected]


def test_conversion_without_any_file_says_what_to_do(tmp_path, capsys):
    path, video = write(tmp_path, "video_mme")
    video.unlink()
    assert main([str(path), str(tmp_path / "out.jsonl")]) == 2
    message = capsys.readouterr().err
    assert "give --video_root" in message and "fFjv93ACGo8.mp4" in message and not (tmp_path / "out.jsonl").exists()
    assert main([str(path), str(tmp_path / "out.jsonl"), "--keep_missing"]) == 0


def test_conversion_starts_as_a_module():
    run = subprocess.run(
        [sys.executable, "-m", "video.convert", "--help"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        check=False,
    )
    assert run.returncode == 0 and "--video_root" in run.stdout


def test_mvbench_frames_are_a_folder_at_three_a_second(tmp_path):
    row = {"video": "friends_s01", "question": "Who?", "candidates": ["a", "b"], "answer": "b", "start": 0, "end": 9.5}
    (tmp_path / "video/tvqa/frames_fps3_hq/friends_s01").mkdir(parents=True)
    (tmp_path / "episodic_reasoning.json").write_text(json.dumps([row]))
    (sample,) = read_samples(tmp_path / "episodic_reasoning.json")
    assert sample.videos == (str(tmp_path / "video/tvqa/frames_fps3_hq/friends_s01"),)
    assert sample.clips == (Clip(0, 9.5, 3.0),)


def test_formats_mix_row_by_row_with_images_and_text(tmp_path):
    rows = [row for row, _, _ in FORMATS.values()] + [
        {"problem": "<image><image>Same?", "answer": "A", "images": ["a.png", "b.png"], "videos": []},
        {"problem": "1/2 + 1/2?", "answer": "\\frac{2}{2}"},
        {
            "problem": "Which?",
            "solution": "B",
            "options": ["red", "blue"],
            "videos": ["a.mp4", "b.mp4"],
            "video_start": [0, 1],
            "video_end": 5,
        },
    ]
    (tmp_path / "all.jsonl").write_text("\n".join(map(json.dumps, rows)))
    samples = read_samples(tmp_path / "all.jsonl")
    assert [sample.key for sample in samples] == [f"all.jsonl:{n}" for n in range(1, len(rows) + 1)]
    images, text, two = samples[-3:]
    assert images.images == (str(tmp_path / "a.png"), str(tmp_path / "b.png")) and images.videos == ()
    assert text.videos == text.images == () and text.problem_type == "math"
    assert two.problem == "Which?\nA. red\nB. blue" and two.clips == (Clip(0, 5), Clip(1, 5))


@pytest.mark.parametrize(
    "row,message",
    [
        ({"video": "a", "question": "q", "candidates": ["x", "y"], "answer": "z"}, "the answer 'z' is none of the options"),
        ({"video_path": "a", "question": "q", "option0": "x", "option1": "N/A", "correct_choice": 1}, "index of one of its 1"),
        ({"videoID": "a", "question": "q", "options": ["x"], "answer": "B"}, "none of the options"),
        ({"problem": "p", "solution": "A", "video": "v", "video_start": "0:10"}, "must be numbers of 0 or more, got '0:10'"),
        ({"problem": "p", "solution": "A", "videos": ["v", "w"], "video_end": [1]}, "has 1 numbers for 2 videos"),
        ({"messages": [{"role": "user", "content": "q"}]}, "has no answer"),
        ({"messages": [{"role": "user", "content": "q"}] * 2}, "has 2 user turns"),
        ({"messages": [{"role": "tool", "content": "q"}]}, "role user, assistant or system"),
        ({"messages": [{"role": "user", "content": [{"type": "video", "video": ["f"]}]}, {"role": "assistant", "content": "A"}]},
         "give frames as a folder"),
        ({"problem": "p", "answer": "A", "images": [{"bytes": "x"}]}, "field 'images' must be a text or a list of texts"),
        ({"video": "v", "sentence": "s", "timestamp": [1]}, r"field 'timestamp' must be \[start, end\] in seconds, got \[1\]"),
        ({"video": "v", "sentence": "s", "timestamp": [1, "2"]}, "must be numbers of 0 or more, got '2'"),
        ({"path": "v", "question": "q", "answer": "soon", "qsemtype": "t"}, "the answer 'soon' must be START-END in seconds"),
        ({"path": "v", "object": "o", "gt": {"1": [0, 0, 1, 1]}}, "field 'gt' must be a list of boxes"),
        ({"problem": "p", "solution": '{"boxes": [1, 2, 3, 4]}', "problem_type": "tracking", "video": "v", "box_size": [640]},
         r"box_size \[640\] must be \[width, height\] of boxes in pixels"),
        ({"problem": "p", "solution": "[1, 2, 3, 4]", "problem_type": "tracking", "video": "v", "box_size": {}}, "box_size {} must be"),
        ({"video": None, "caption": "s", "timestamp": [1, 2]}, "field 'video' must be a text that is not empty, got None"),
        ({"video": "v", "question": "q", "candidates": [], "answer": "A"}, "the answer 'A' is none of the options"),
        ({"problem": "p", "solution": "left", "problem_type": "tracking", "video": "v", "box_size": [4, 4]}, "box_size .* not of 'left'"),
        ({"video": "v", "question": "q", "answer": "7", **{f"a{n}": "x" for n in range(5)}}, "the answer '7' is none of the options"),
    ],
)  # fmt: skip
def test_bad_rows_name_the_line(row, message, tmp_path):
    (tmp_path / "d.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match=message) as caught:
        read_samples(tmp_path / "d.jsonl")
    assert str(caught.value).startswith("d.jsonl:1: ") and "\n" not in str(caught.value)


def test_options_are_lettered_once():
    assert lettered(("red", "blue")) == ("A. red", "B. blue")
    for given in (("A. red", "B. blue"), ("A) red", "B) blue"), ("(A) red", "(B) blue")):
        assert lettered(given) == given
    assert lettered(("B. red", "A. blue")) == ("A. B. red", "B. A. blue")  # labels of another order are text


def test_types_of_answers_that_name_none():
    types = {"multiple choice": ("B", "B.", "(C)", "D) x", "A. a man"), "numerical": ("3", "-1,200.5", ".5"),
             "math": ("\\frac{1}{2}", "x=3", "1/2", "2^8"), "free-form": ("A man", "yes", "I am", "A.M.", "")}  # fmt: skip
    for kind, answers in types.items():
        assert [guess_type(answer) for answer in answers] == [kind] * len(answers)


def test_parquet_rows(tmp_path, monkeypatch):
    path = tmp_path / "d.parquet"
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path.write_bytes(b"")
    with pytest.raises(DataError, match="pip install pyarrow"):
        read_samples(path)
    monkeypatch.undo()
    parquet = pytest.importorskip("pyarrow.parquet")
    with pytest.raises(DataError, match="is not a parquet file"):
        read_samples(path)
    import pyarrow

    rows = [FORMATS[name][0] for name in ("vsi_bench_number", "vsi_bench_choice")]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    number, choice = read_samples(path)
    assert (number.key, number.answer, choice.answer) == ("d.parquet:1", "4", "B")
    assert choice.problem == "Closest?\nA. tv\nB. chair" and number.options == ()


def picture(path, colour):
    Image.new("RGB", (56, 56), colour).save(path)
    return path.read_bytes()


def test_images_that_are_bytes_in_a_parquet_file(tmp_path):
    """As `datasets` stores them: a {bytes, path} each, path of no use; EasyR1 also takes bare bytes."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    red, blue = (picture(tmp_path / f"{colour}.png", colour) for colour in ("red", "blue"))
    struct = lambda content, path=None: {"bytes": content, "path": path}
    rows = [
        {"images": [struct(red, "gone.jpg"), struct(blue)], "problem": "<image><image>Sum?", "answer": "3"},
        {"images": [struct(red)], "problem": "<image>Which?", "answer": "A"},
        {"images": [struct(None, "blue.png")], "problem": "<image>Which?", "answer": "A"},
        {"images": None, "problem": "Text?", "answer": "A"},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows * 40), tmp_path / "d.parquet")  # more than are read at a time
    samples = read_samples(tmp_path / "d.parquet")
    assert [s.key for s in samples] == [f"d.parquet:{n}" for n in range(1, 161)]
    two, one, kept, text = samples[:4]
    assert [Path(path).read_bytes() for path in (*two.images, *one.images, *kept.images)] == [red, blue, red, blue]
    assert kept.images == (str(tmp_path / "blue.png"),) and text.images == () and two.meta == {}
    assert two.images[0] == one.images[0], "one image, one file: hold_out sees that two rows share it"
    train, held = hold_out(samples[:3], 1, seed=0)
    assert not {path for s in train for path in s.images} & {path for s in held for path in s.images}
    files = list((tmp_path / "d.parquet.media").iterdir())
    modes = {file.stat().st_mode for file in (*files, tmp_path / "red.png")}
    assert len(files) == 2 and len(modes) == 1, "as readable for others as any file"

    times = [file.stat().st_mtime_ns for file in files]
    assert read_samples(tmp_path / "d.parquet") == samples and [f.stat().st_mtime_ns for f in files] == times
    bare = [{"image": red, "problem": "Which?", "answer": "A"}]
    parquet.write_table(pyarrow.Table.from_pylist(bare), tmp_path / "bare.parquet")
    assert Path(read_samples(tmp_path / "bare.parquet")[0].images[0]).read_bytes() == red
    odd = [
        {"images": [red, b"blue.png"], "problem": b"Which?", "answer": b"A", "thumb": red}
    ]  # text as bytes; a column nobody reads
    parquet.write_table(pyarrow.Table.from_pylist(odd), tmp_path / "odd.parquet")
    sample = read_samples(tmp_path / "odd.parquet")[0]
    assert (sample.problem, sample.answer, sample.images[1]) == ("Which?", "A", str(tmp_path / "blue.png"))
    assert [path.name for path in (tmp_path / "odd.parquet.media").iterdir()] == [Path(sample.images[0]).name]
    (tmp_path / "shut.parquet.media").write_text("a file where the folder would be")
    parquet.write_table(pyarrow.Table.from_pylist(bare), tmp_path / "shut.parquet")
    with pytest.raises(DataError, match=r"shut.parquet.media: images that are bytes .* copy the parquet file"):
        read_samples(tmp_path / "shut.parquet")


def test_reading_does_not_import_pyarrow(tmp_path):
    make_video(tmp_path / "v.mp4")
    code = "import sys, video.dataset, video.frames, video.loader; sys.exit('pyarrow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, check=False).returncode == 0
