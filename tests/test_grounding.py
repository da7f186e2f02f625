"""Grounded answers: what is read, and scores worked out by hand."""

import json
import time

import pytest

from eval import ask
from grpo.config import parse_config
from grpo.engine.evaluate import recalls
from grpo.run.data import read_questions
from rewards import REWARDS, accuracy, check_sample, score_prediction
from rewards.grounding import overlaps, read_boxes, read_span
from video.formats import DataError, Sample

TIME, PLACE, BOTH, TRACK = "temporal grounding", "spatial grounding", "spatial-temporal grounding", "tracking"
SPAN, BOX = "2 to 6", '{"boxes": [0, 0, 100, 100]}'
TUBE = '{"time": [2, 6], "boxes": {"3": [0, 0, 100, 100], "4": [0, 0, 100, 100]}}'
TRACKS = '{"boxes": {"1": [0, 0, 10, 10], "2": [10, 0, 20, 10]}}'
LIST = "[[0.0, 0.0, 0.5, 0.5], [0.5, 0.0, 1.0, 0.5]]"

CASES = [  # type, answer, prediction, score
    # one stretch of time against 2 to 6
    (TIME, SPAN, "2 to 6", 1.0),
    (TIME, SPAN, "2.0 to 6.00", 1.0),
    (TIME, SPAN, "4 to 8", 1 / 3),  # 2 s of the 6 s from 2 to 8
    (TIME, SPAN, "3 to 5", 1 / 2),
    (TIME, SPAN, "0 to 8", 1 / 2),
    (TIME, SPAN, "1 to 4", 2 / 5),
    (TIME, SPAN, "6 to 9", 0.0),  # they touch
    (TIME, SPAN, "7 to 9", 0.0),
    (TIME, SPAN, "6 to 2", 0.0),  # the end before the start
    (TIME, SPAN, "4 to 4", 0.0),
    (TIME, SPAN, "4", 0.0),
    (TIME, SPAN, "", 0.0),
    (TIME, SPAN, "at the beginning", 0.0),
    # ways to write it
    (TIME, SPAN, "The event happens from 2 to 6 seconds.", 1.0),
    (TIME, SPAN, "2s to 6s", 1.0),
    (TIME, SPAN, "2 and 6", 1.0),
    (TIME, SPAN, "- 2 to 6, or so", 1.0),
    (TIME, SPAN, "-2 to 6", 0.0),  # not 2 to 6
    (TIME, SPAN, "1,2 to 6,5", 0.0),  # not 2 to 6
    (TIME, SPAN, "2-6", 1.0),
    (TIME, SPAN, "2.0 – 6.0", 1.0),
    (TIME, SPAN, "2 secs TO\n6 seconds", 1.0),
    (TIME, SPAN, "2. to 6.", 1.0),
    (TIME, SPAN, "0 to 1, or rather 2 to 6", 1.0),  # the last counts
    (TIME, SPAN, "2 to 6, or rather 0 to 1", 0.0),
    (TIME, SPAN, "00:02 to 00:06", 0.0),  # a clock is not read
    (TIME, SPAN, "2 to 6:30", 0.0),
    (TIME, SPAN, "2 to 1e400", 0.0),  # from 2 to 1
    (TIME, SPAN, "2 to " + "9" * 400, 0.0),  # infinite as a float
    # JSON
    (TIME, SPAN, '{"time": [2, 6]}', 1.0),
    (TIME, SPAN, '```json\n{"time": [3, 5]}\n```', 1 / 2),
    (TIME, SPAN, 'It is {"time": [4.0, 8.0]}.', 1 / 3),
    (TIME, SPAN, "[2, 6]", 1.0),
    (TIME, SPAN, '{"time": [6, 2]}', 0.0),
    (TIME, SPAN, '{"time": [2, 6, 7]}', 0.0),
    (TIME, SPAN, '{"time": ["2", "6"]}', 0.0),
    (TIME, SPAN, '{"time": [true, 6]}', 0.0),
    (TIME, SPAN, '{"time": [NaN, 6]}', 0.0),
    (TIME, SPAN, '{"time": [0, Infinity]}', 0.0),
    (TIME, SPAN, '{"time": [2, 6', 0.0),
    (TIME, SPAN, "[" * 100000, 0.0),
    # truths
    (TIME, '{"time": [2, 6]}', "3 to 5", 1 / 2),
    (TIME, "13.4-28.1", "13.4 to 28.1", 1.0),
    (TIME, "12.0 to 20.9", "12 to 20.9", 1.0),
    (TIME, "20.9 to 12.0", "20.9 to 12.0", 0.0),  # a broken row of Charades-STA: nothing is right, as in the sources
    # one box against the square of 100 x 100
    (PLACE, BOX, '{"boxes": [0, 0, 100, 100]}', 1.0),
    (PLACE, BOX, "[0, 0, 100, 50]", 1 / 2),
    (PLACE, BOX, "[[0, 0, 50, 50]]", 1 / 4),
    (PLACE, BOX, '[{"bbox_2d": [50, 0, 150, 100], "label": "dog"}]', 1 / 3),  # 5000 of 15000
    (PLACE, BOX, '{"boxes": [50, 50, 150, 150]}', 1 / 7),  # 2500 of 17500
    (PLACE, BOX, '{"boxes": [100, 0, 200, 100]}', 0.0),
    (PLACE, BOX, '{"boxes": [100, 100, 0, 0]}', 0.0),  # corners exchanged: no area
    (PLACE, BOX, '{"boxes": [0, 0, 100]}', 0.0),
    (PLACE, BOX, '{"boxes": {"1": [0, 0, 100, 100]}}', 0.0),
    (PLACE, BOX, "0, 0, 100, 100", 0.0),
    # half for the time, half for the mean over the moments in common
    (BOTH, TUBE, TUBE, 1.0),
    (BOTH, TUBE, '{"time": [4, 8], "boxes": {"3": [0, 0, 100, 50], "4": [0, 0, 100, 100]}}', 1 / 6 + 3 / 8),
    (BOTH, TUBE, '{"time": [2, 6], "boxes": {"3": [0, 0, 100, 100]}}', 1.0),  # leaving a moment out costs nothing
    (BOTH, TUBE, '{"time": [2, 6], "boxes": {"5": [0, 0, 100, 100]}}', 1 / 2),
    (BOTH, TUBE, '{"time": [2, 6]}', 1 / 2),
    (BOTH, TUBE, '{"boxes": {"3": [0, 0, 100, 50]}}', 1 / 4),
    (BOTH, TUBE, '{"time": [2, 6], "boxes": {"3": [0, 0, 100, 100], "4": "here"}}', 3 / 4),
    (BOTH, TUBE, "2 to 6", 1 / 2),
    # the mean over the moments of the truth
    (TRACK, TRACKS, TRACKS, 1.0),
    (TRACK, TRACKS, '{"boxes": {"1": [0, 0, 10, 10]}}', 1 / 2),
    (TRACK, TRACKS, '{"boxes": {"1": [0, 0, 10, 5], "2": [10, 0, 20, 10], "3": [0, 0, 1, 1]}}', 3 / 4),
    (TRACK, TRACKS, "[[0, 0, 10, 10], [10, 0, 20, 10]]", 0.0),  # a list names no seconds
    (TRACK, LIST, LIST, 1.0),
    (TRACK, LIST, "[[0, 0, 0.5, 0.25], [0.5, 0, 1, 0.5]]", 3 / 4),
    (TRACK, LIST, "[[0.0, 0.0, 0.5, 0.5]]", 0.0),  # one box for two moments
    (TRACK, LIST, "[[0, 0, 0.5, 0.5], [0.5, 0, 1]]", 1 / 2),
]


def sample(problem_type, answer, **meta):
    return Sample("rows.jsonl:1", "When?", answer, ("v.mp4",), problem_type=problem_type, meta=meta)


def test_the_table_is_as_large_as_promised():
    assert len({case[:3] for case in CASES}) >= 60


@pytest.mark.parametrize(("problem_type", "answer", "prediction", "score"), CASES)
def test_scores_by_hand(problem_type, answer, prediction, score):
    assert score_prediction(prediction, sample(problem_type, answer)) == pytest.approx(score, abs=1e-12)
    assert accuracy(f"<think>t</think><answer>{prediction}</answer>", sample(problem_type, answer)) == pytest.approx(
        score
    )


@pytest.mark.parametrize("problem_type", [TIME, PLACE, BOTH, TRACK])
def test_a_truth_of_another_form_is_named(problem_type):
    for answer in ("B", '{"time": [2]}', '{"boxes": [1, 2, 3]}', '{"time": [1, 2], "boxes": {"3": [1, 2]}}', "[]"):
        if (problem_type, answer[:12]) != (TIME, '{"time": [1,'):
            with pytest.raises(
                ValueError, match=r"sample 'rows.jsonl:1': the answer .* names no (two times|boxes), as"
            ):
                check_sample(sample(problem_type, answer))


def test_parts_are_kept_apart():
    parts = overlaps('{"time": [4, 8], "boxes": {"4": [0, 0, 100, 50]}}', sample(BOTH, TUBE))
    assert parts == {"tIoU": pytest.approx(1 / 3), "box IoU": pytest.approx(1 / 2)}
    assert overlaps("3 to 5", sample(TIME, SPAN)) == {"tIoU": 0.5}


def test_what_is_read():
    assert read_span("between 1 and 2, or 3.2 to 7.5") == (3.2, 7.5)
    assert read_span("between the two") is None
    for unit in (" minutes", "-minute", " min.", " h", " hrs", " hours"):
        assert read_span(f"3.2 to 7.5{unit}") is None
    assert read_span("3 to 7 minor cuts") == read_span("3 to 7. Minutes later") == (3.0, 7.0)
    assert read_boxes('{"boxes": {"4": [1, 2, 3, 4], "5": [1]}}') == {"4": (1.0, 2.0, 3.0, 4.0), "5": None}
    assert read_boxes("[[1, 2, 3, 4], [5, 6, 7, 8]]") == {(0, 2): (1, 2, 3, 4), (1, 2): (5, 6, 7, 8)}
    assert read_boxes("a dog") == {}


@pytest.mark.parametrize("unit", ["1", "1 ", "1 to ", "1.", "[", "{", "[1,", '{"a":', "to ", "s ", "-"])
def test_time_is_linear_in_the_length(unit):
    def seconds(length):
        text, began = unit * (length // len(unit)), time.process_time()
        for problem_type, answer in ((TIME, SPAN), (TRACK, TRACKS)):
            score_prediction(text, sample(problem_type, answer))
        return time.process_time() - began

    seconds(1000)
    assert seconds(200_000) < 0.5


# github.com/xiaomi-research/time-r1 at 7f2b594, main.py, iou_timestamp_reward_v2, worked out by hand: duration 10 s
TIMESTAMPS = [  # prediction against 2 to 6, reward
    ("2 to 6", 1.0),
    ("3 to 5", 1 / 2 * 0.9 * 0.9),
    ("4 to 8", 1 / 3 * 0.8 * 0.8),
    ("2 to 26", 4 / 24 * 1.0 * -1.0),
    ("7 to 9", 0.0),
    ("soon", 0.0),
]


@pytest.mark.parametrize(("prediction", "reward"), TIMESTAMPS)
def test_time_r1_s_reward_also_counts_the_distance_of_both_ends(prediction, reward):
    row = sample(TIME, SPAN, duration=10.0)
    assert REWARDS["timestamp_iou"](f"<answer>{prediction}</answer>", row) == pytest.approx(reward, abs=1e-12)
    assert REWARDS["timestamp_iou"](prediction, row) == 0.0  # no answer tag


@pytest.mark.parametrize("duration", [None, 0, float("nan"), float("inf")])
def test_time_r1_s_reward_needs_the_duration(duration):
    with pytest.raises(ValueError, match="sample 'rows.jsonl:1': timestamp_iou needs the field `duration`"):
        REWARDS["timestamp_iou"]("<answer>2 to 6</answer>", sample(TIME, SPAN, duration=duration))


def test_a_run_that_needs_the_duration_says_so_before_it_starts(tmp_path):
    row = {"problem": "When?", "solution": "1 to 2", "video": "v.mp4", "problem_type": TIME}
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row | more) + "\n" for more in ({"duration": 3}, {}, {})))
    config = parse_config(["--data", str(tmp_path / "d.jsonl"), "--eval_samples", "0", "--reward", "timestamp_iou:1"])
    with pytest.raises(DataError, match=r"2 of 3 rows cannot be used: .*d.jsonl:2.* needs the field `duration`"):
        read_questions(config, print)


def test_recalls_count_overlaps_from_the_threshold_on():
    values = [0.0, 0.3, 0.49, 0.5, 0.7, 1.0]
    assert recalls([{"overlaps": {"temporal grounding: tIoU": v}} for v in values] + [{"score": 1.0}]) == {
        "temporal grounding: tIoU": {"mIoU": pytest.approx(2.99 / 6), "R@0.3": 5 / 6, "R@0.5": 3 / 6, "R@0.7": 2 / 6}
    }
    assert recalls([{"score": 1.0}]) == {}


def test_the_answer_alone_is_asked_for_in_the_form_of_its_type():
    asked = [s.problem for s in ask([sample(TIME, SPAN), sample(TRACK, LIST, answer_form="8 boxes")], "direct")]
    assert asked == [
        "When?\nAnswer only with the start and the end in seconds, such as 12.5 to 17.8.",
        "When?\nAnswer only with 8 boxes.",
    ]


def test_box_json_survives_a_round_trip():
    boxes = {"time": [1.5, 2.5], "boxes": {"2": [1, 2, 3, 4]}}
    assert score_prediction(json.dumps(boxes, indent=1), sample(BOTH, json.dumps(boxes))) == 1.0
