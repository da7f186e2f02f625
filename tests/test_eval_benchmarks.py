"""Each published benchmark from a folder in its own layout: made here, evaluated, and scored as worked out by hand."""

import json
import re

import pytest
from test_eval import run, script
from video_helpers import make_video

from demo.tiny import build_tiny_model
from evaluation.benchmarks import BENCHMARKS, benchmark_score

A, B, C, D = (f"<think>so</think><answer>{letter}</answer>" for letter in "ABCD")
OPTIONS = ["A. red", "B. green", "C. blue", "D. yellow"]


def video_mme(videos, name, answer, duration):
    return {
        "video_id": "001", "videoID": videos, "duration": duration, "domain": "Knowledge", "sub_category": "Geography",
        "task_type": "Counting Problem", "question_id": name, "question": "What?", "options": OPTIONS, "answer": answer,
    }  # fmt: skip


def mvbench(video, answer, **clip):
    return {"video": video, "question": "What?", "candidates": ["red", "green", "blue"], "answer": answer, **clip}


def vsi(number, kind, truth, options=None):
    return {
        "id": number, "dataset": "scannet", "scene_name": "scene0011_00", "question_type": kind, "question": "What?",
        "options": options, "ground_truth": truth,
    }  # fmt: skip


def long_video(name, choice, group, options):
    options = [*options, *["N/A"] * (5 - len(options))]
    return {
        "id": name, "video_id": "abc", "video_path": "abc.mp4", "question": "What?", "correct_choice": choice,
        "duration_group": group, "question_category": "S2E", **{f"option{i}": text for i, text in enumerate(options)},
    }  # fmt: skip


def mmmu(name, answer, options=("red", "green"), **more):
    return {"id": name, "question": "What?", "options": list(options), "answer": answer, **more}


def tvg(name, span, kind):
    return {
        "path": f"./dataset/timer1/videos/tvgbench_data/{name}.mp4", "question": "person sits down.", "answer": span,
        "start": 1.5, "end": 32.0, "duration": 30.5, "question_type": "video temporal grounding", "qsemtype": kind,
    }  # fmt: skip


# files: {annotation file: rows, or its text}, videos, {key of a sample: what the model says}, score of each category,
# the total
CASES = {
    "mvbench": (
        {
            "json/action_sequence.json": [
                mvbench("ZS9XR.mp4", "green", start=0.5, end=3.5),
                mvbench("ZS9XR.mp4", "red"),
            ],
            "json/moving_count.json": [mvbench("video_10009.mp4", "blue")] * 3,
        },
        ["video/star/Charades_v1_480/ZS9XR.mp4", "video/clevrer/video_validation/video_10009.mp4"],
        {
            "json/action_sequence.json:1": "<answer>green</answer>",  # the candidate's text instead of its letter
            "json/action_sequence.json:2": B,
            "json/moving_count.json:1": C,
            "json/moving_count.json:2": "(C) blue",
            "json/moving_count.json:3": "Based on the video, nothing",
        },
        {"action_sequence": 1 / 2, "moving_count": 2 / 3},
        (1 / 2 + 2 / 3) / 2,  # over subtasks, not over the five questions
    ),
    "videomme": (
        {
            "videomme/test.jsonl": [
                video_mme("fFjv93ACGo8", "001-1", "C", "short"),
                video_mme("fFjv93ACGo8", "001-2", "A", "short"),
                video_mme("N1cdUjctpG8", "002-1", "D", "long"),
            ]
        },
        ["data/fFjv93ACGo8.mp4", "data/N1cdUjctpG8.mp4"],
        {"videomme/test.jsonl:1": C, "videomme/test.jsonl:2": "B or C", "videomme/test.jsonl:3": "D. yellow"},
        {"short": 1 / 2, "long": 1.0},
        2 / 3,
    ),
    "tempcompass": (
        {
            "multi-choice/test.jsonl": [
                {
                    "video_id": "1021",
                    "question": "What?\nA. red\nB. green",
                    "answer": "B. green",
                    "dim": "attribute_change",
                },
                {"video_id": "1021", "question": "What?\nA. red\nB. green", "answer": "A. red", "dim": "speed"},
            ],
            "yes_no/test.jsonl": [{"video_id": "1021", "question": "Is it?", "answer": "no", "dim": "speed"}],
        },
        ["videos/1021.mp4"],
        {"multi-choice/test.jsonl:1": B, "multi-choice/test.jsonl:2": B, "yes_no/test.jsonl:1": "<answer>no</answer>"},
        {"attribute_change": 1.0, "speed": 1 / 2},
        2 / 3,
    ),
    "mmvu": (
        {
            "validation.json": [
                {
                    "id": "validation_0",
                    "video_path": "videos/Art/0.mp4",
                    "question_type": "multiple-choice",
                    "question": "What?",
                    "choices": dict(zip("ABCDE", ("v", "w", "x", "y", "z"))),
                    "answer": "E",
                },
                {
                    "id": "validation_1",
                    "video_path": "videos/Art/0.mp4",
                    "question_type": "open-ended",
                    "question": "Which?",
                    "choices": dict.fromkeys("ABCDE", ""),
                    "answer": "depth first search",
                },
            ]
        },
        ["videos/Art/0.mp4"],
        {"validation.json:1": "<answer>E</answer>", "validation.json:2": "<answer>depth first search</answer>"},
        {"multiple choice": 1.0, "free-form": 1.0},
        1.0,
    ),
    "vsibench": (
        {
            "test.jsonl": [
                vsi(1, "object_counting", "100"),
                vsi(2, "object_counting", "4"),
                vsi(3, "object_rel_direction_easy", "A", ["A. left", "B. right"]),
                vsi(4, "object_rel_direction_hard", "B", ["A. left", "B. right"]),
                vsi(5, "object_rel_direction_hard", "B", ["A. left", "B. right"]),
            ]
        },
        ["scannet/scene0011_00.mp4"],
        {
            "test.jsonl:1": "<answer>87</answer>",  # off by .13: within 1 - t for t = .5, .55, ... .85, 8 of 10
            "test.jsonl:2": "<answer>none</answer>",
            "test.jsonl:3": A,
            "test.jsonl:4": B,
            "test.jsonl:5": A,
        },
        {"object_counting": 0.4, "object_rel_direction_easy": 1.0, "object_rel_direction_hard": 0.5},
        (0.4 + (1.0 + 0.5) / 2) / 2,  # the difficulties of relative direction count as one type
    ),
    "longvideobench": (
        {
            "lvb_val.json": [
                long_video("abc_0", 3, 15, ["red", "green", "blue", "yellow"]),
                long_video("abc_1", 0, 15, ["red", "green"]),
                long_video("abc_2", 1, 600, ["red", "green", "blue", "yellow", "black"]),
            ]
        },
        ["videos/abc.mp4"],
        {"lvb_val.json:1": D, "lvb_val.json:2": C, "lvb_val.json:3": "<answer>B"},
        {"15": 1 / 2, "600": 1.0},
        2 / 3,
    ),
    "videommmu": (
        {
            "Perception/test.jsonl": [mmmu("dev_Art_1", "B")],
            "Comprehension/test.jsonl": [mmmu("dev_Art_1", "A"), mmmu("test_Math_2", "B")],
            "Adaptation/test.jsonl": [
                mmmu("test_Math_2", "7.25", (), question_type="open", image={"bytes": None, "path": "1.png"})
            ],
        },
        ["Art/dev_Art_1.mp4", "Science/test_Math_2.mp4"],
        {
            "Perception/test.jsonl:1": B,
            "Comprehension/test.jsonl:1": B,
            "Comprehension/test.jsonl:2": B,
            "Adaptation/test.jsonl:1": "<answer>7.25</answer>",
        },
        {"Perception": 1.0, "Comprehension": 1 / 2, "Adaptation": 1.0},
        3 / 4,
    ),
    "charades-sta": (
        {"charades_sta_test.txt": "3MSZA 24.0 30.0##a light on.\nAMT7R 4.0 12.0##a picture.\n"},
        ["Charades_v1/3MSZA.mp4", "Charades_v1_480/AMT7R.mp4"],
        {"charades_sta_test.txt:1": "<answer>24.00 to 30.00</answer>", "charades_sta_test.txt:2": "from 6 to 8 s"},
        {"temporal grounding": (1 + 1 / 4) / 2},
        (1 + 1 / 4) / 2,
    ),
    "activitynet-captions": (
        {
            "activitynet_annotation/test.json": {
                "v_one": {"duration": 20, "timestamps": [[0, 10], [5, 15]], "sentences": ["He runs.", " He sits. "]},
                "v_two": {"duration": 30.5, "timestamps": [[10.0, 30]], "sentences": ["She swims."]},
            }
        },
        ["videos/v_one.mkv", "v_two.mp4"],
        {
            "activitynet_annotation/test.json:1": '<answer>{"time": [0, 10]}</answer>',
            "activitynet_annotation/test.json:2": "<answer>0 to 10</answer>",
            "activitynet_annotation/test.json:3": "<answer>never</answer>",
        },
        {"temporal grounding": (1 + 1 / 3 + 0) / 3},
        (1 + 1 / 3 + 0) / 3,
    ),
    "tvgbench": (
        {"annotations/tvgbench.json": [tvg("a", "10.5-20.5", "Human Pose"), tvg("b", "0-4", "Object Counting")]},
        ["videos/tvgbench_data/a.mp4", "videos/tvgbench_data/b.mp4"],
        {"annotations/tvgbench.json:1": "<answer>10.5 to 20.5</answer>", "annotations/tvgbench.json:2": "1 to 4"},
        {"Human Pose": 1.0, "Object Counting": 3 / 4},
        (1 + 3 / 4) / 2,
    ),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_published_layout_scores_as_by_hand(tmp_path, monkeypatch, model, name):
    files, videos, completions, categories, total = CASES[name]
    for video in videos:
        (tmp_path / video).parent.mkdir(parents=True, exist_ok=True)
        make_video(tmp_path / video)
    for file, rows in files.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        lines = json.dumps(rows) if file.endswith(".json") else rows
        lines = lines if isinstance(lines, str) else "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / file).write_text(lines)
    script(monkeypatch, completions)
    code, result = run(model, tmp_path / "out", "--benchmark", name, "--benchmark_dir", str(tmp_path))
    assert code == 0
    summary = result["results"]["think"]
    assert (summary["count"], summary["skipped"]) == (len(completions), 0)
    assert summary["categories"] == pytest.approx(categories)
    assert result["score"]["think"] == pytest.approx(total)


def test_the_total_of_questions_and_that_of_groups():
    summary = {"overall": 0.9, "categories": {"a": 0.5, "b": 1.0}}
    assert benchmark_score("videomme", summary) == 0.9
    assert benchmark_score("mvbench", summary) == 0.75


def test_recalls_of_temporal_grounding_are_in_results_and_table(tmp_path, monkeypatch, model, capsys):
    files, videos, completions, *_ = CASES["charades-sta"]
    for video in videos:
        (tmp_path / video).parent.mkdir(parents=True)
        make_video(tmp_path / video)
    (tmp_path / "charades_sta_test.txt").write_text(files["charades_sta_test.txt"])
    script(monkeypatch, completions)
    code, result = run(model, tmp_path / "out", "--benchmark", "charades-sta", "--benchmark_dir", str(tmp_path))
    assert code == 0
    assert result["results"]["think"]["grounding"] == {
        "temporal grounding: tIoU": {"mIoU": 0.625, "R@0.3": 0.5, "R@0.5": 0.5, "R@0.7": 0.5}
    }
    shown = capsys.readouterr().out
    assert re.search(r"temporal grounding: tIoU\n +think\nmIoU +62.5%\nR@0.3 +50.0%\nR@0.5 +50.0%\n", shown), shown
    assert "R@0.7" in (tmp_path / "out" / "report.html").read_text()
