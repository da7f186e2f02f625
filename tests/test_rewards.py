"""Every reward against literal numbers, and what the loop relies on: weights, named parts, failures counted."""

import importlib.util
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from video_helpers import assert_gone

import rewards
import video.formats
from rewards import ACCURACY, REWARDS, Group, accuracy, check_sample, parse_rewards, score_groups, score_prediction
from rewards.diagnostics import answer_stats, pass_at_k
from rewards.problem_types import parse_number
from rewards.temporal import temporal_bonus
from rewards.user import form_of


@dataclass
class Sample:
    answer: str
    problem_type: str = "multiple choice"
    options: tuple = ()
    problem: str = "Which colour is the ball?"
    meta: dict = field(default_factory=dict)
    key: str = "balls.jsonl:7"


def score_group(rewards, completions, sample, lengths=None, **options):
    """(totals, parts, failures) of the completions of one prompt."""
    (scores,) = score_groups(rewards, [completions], [sample], lengths and [lengths], **options)
    return scores[:3]


COLOURS = ("A. red", "B. blue", "C. green", "D. white")
RIGHT, WRONG = "<think>t</think><answer>B</answer>", "<think>t</think><answer>C</answer>"

PREDICTIONS = [  # problem type, answer, prediction, score
    # multiple choice; of the first four Open-R1-Video pays two, Video-R1 refuses the others
    ("multiple choice", "A", "A or B", 0.0),
    ("multiple choice", "A", "Apple", 0.0),
    ("multiple choice", "A", "A.", 1.0),
    ("multiple choice", "A.", "A", 1.0),
    ("multiple choice", "B", "(b)", 1.0),
    ("multiple choice", "B", "A", 0.0),
    ("multiple choice", "B", "Based on", 0.0),
    ("multiple choice", "B", "blue", 1.0),
    ("multiple choice", "blue", "B", 1.0),
    ("multiple choice", "blue", "A", 0.0),
    ("multiple choice", "B. blue", "B", 1.0),
    ("multiple choice", "B", "", 0.0),
    ("multiple choice", "B", "E", 0.0),
    # numerical; the second and third would be wrong as letters
    ("numerical", "3", "3", 1.0),
    ("numerical", "3", "3.0", 1.0),
    ("numerical", "3.00", "3", 1.0),
    ("numerical", "3", "4", 0.0),
    ("numerical", "3", "3.004", 1.0),
    ("numerical", "3", "3.006", 0.0),
    ("numerical", "-3", "3", 0.0),
    ("numerical", "-3", "\u22123", 1.0),
    ("numerical", "1234.5", "1,234.5", 1.0),
    ("numerical", "3", "3 metres", 1.0),
    ("numerical", "3", "3 or 4", 0.0),
    ("numerical", "3", "three", 0.0),
    ("numerical", "3", "", 0.0),
    ("numerical", "0", "0.0", 1.0),
    ("numerical", "0.5", "1/2", 1.0),
    ("numerical", "3", "nan", 0.0),
    ("numerical", "3", "1e999", 0.0),
    ("numerical", "50%", "50", 1.0),
    # mean relative accuracy: how many of the ten thresholds hold
    ("mra", "10", "10", 1.0),
    ("mra", "10", "10.5", 1.0),
    ("mra", "10", "11", 0.9),
    ("mra", "10", "9", 0.9),
    ("mra", "10", "12.2", 0.6),
    ("mra", "10", "14.9", 0.1),
    ("mra", "10", "15", 0.1),
    ("mra", "10", "15.1", 0.0),
    ("mra", "10", "-10", 0.0),
    ("mra", "-10", "-11", 0.9),
    ("mra", "10", "ten", 0.0),
    ("mra", "0", "0", 1.0),
    ("mra", "0", "1", 0.0),
    ("mra", "10", "0", 0.0),
    # OCR: 1 - edits / words
    ("OCR", "one two three four", "one two three four", 1.0),
    ("OCR", "one two three four", "one two three", 0.75),
    ("OCR", "one two three four", "one two three five", 0.75),
    ("OCR", "one two", "one big two", 0.5),
    ("OCR", "one two", "two one", 0.0),
    ("OCR", "STOP", "stop", 0.0),
    ("OCR", "one", "a b c d", 0.0),
    ("OCR", "one", "", 0.0),
    ("OCR", "\u51fa\u53e3", "\u51fa\u53e3", 1.0),
    ("OCR", "one two three", "  one\ttwo\nthree ", 1.0),
    # free-form: (ROUGE-1 + ROUGE-2 + ROUGE-L) / 3
    ("free-form", "the cat sat", "The cat sat.", 1.0),
    ("free-form", "the cat sat", "dogs run", 0.0),
    ("free-form", "the cat sat", "the cat", (4 / 5 + 2 / 3 + 4 / 5) / 3),
    ("free-form", "a b c d", "d c b a", (1 + 0 + 1 / 4) / 3),
    ("free-form", "a a b", "a b b", (2 / 3 + 1 / 2 + 2 / 3) / 3),
    ("free-form", "cat", "cat", 1.0),
    ("free-form", "cat", "the cat", (2 / 3 + 0 + 2 / 3) / 3),
    ("free-form", "cat", "", 0.0),
    ("free-form", "cat", "?!", 0.0),
    ("free-form", "\u7ea2\u8272 \u7403", "\u7ea2\u8272 \u7403", 1.0),
    # regression: 1 - relative distance
    ("regression", "10", "10", 1.0),
    ("regression", "10", "9", 0.9),
    ("regression", "10", "11", 0.9),
    ("regression", "10", "25", 0.0),
    ("regression", "-4", "-5", 0.75),
    ("regression", "0", "0", 1.0),
    ("regression", "0", "1", 0.0),
    ("regression", "10", "none", 0.0),
    ("regression", "10", "", 0.0),
]

NUMBERS = [
    ("7", 7.0),
    ("+7", 7.0),
    ("-7.25", -7.25),
    (".5", 0.5),
    ("1,234,567", 1234567.0),
    ("$1,000.50", 1000.5),
    ("2e3", 2000.0),
    ("1/4", 0.25),
    ("-1/4", -0.25),
    ("1/0", None),
    ("7.", 7.0),
    ("about 7 m\u00b2", 7.0),
    ("25 m2", 25.0),
    ("x = 3, so 3", 3.0),
    ("3-4", None),
    ("10:30", None),
    ("1.2.3", None),
    ("3,5", None),
    ("12,34", None),
    ("1,2345", None),
    ("", None),
    ("seven", None),
    ("inf", None),
    ("NaN", None),
    ("5e99999", None),
    ("9" * 400, None),
    ("\uff15", 5.0),
]

FORMATS = [  # completion, format, tag_count; some with an "x" after the end
    ("<think>a</think><answer>B</answer>", 1.0, 1.0),
    ("<think>a</think>\n\n<answer>B</answer>", 1.0, 1.0),
    ("<think>a\nb</think> <answer>\nB\n</answer>", 1.0, 1.0),
    ("<think>\u7ea2</think><answer>\u7403</answer>", 1.0, 1.0),
    ("<think>a<b</think><answer>1 < 2</answer>", 1.0, 1.0),
    ("<think>a</think><answer>B</answer>x", 0.0, 1.0),
    ("<think>a</think><answer>B</answer>\n", 0.0, 1.0),
    (" <think>a</think><answer>B</answer>", 0.0, 1.0),
    ("x<think>a</think><answer>B</answer>", 0.0, 1.0),
    ("<think>a</think>x<answer>B</answer>", 0.0, 1.0),
    ("<answer>B</answer><think>a</think>", 0.0, 1.0),
    ("<think>a<answer>B</answer></think>", 0.0, 1.0),
    ("<think>a</think><answer></answer>", 0.0, 1.0),
    ("<think> </think><answer>B</answer>", 0.0, 1.0),
    ("<think>a</think><answer>B", 0.0, 0.75),
    ("<think>a<answer>B</answer>", 0.0, 0.75),
    ("<answer>B</answer>", 0.0, 0.5),
    ("<think>a</think><think>a</think><answer>B</answer>", 0.0, 0.5),
    ("<think>a</think><answer>B</answer><answer>B</answer>", 0.0, 0.5),
    ("<think><think>a</think></think><answer>B</answer>", 0.0, 0.5),
    ("<think>a", 0.0, 0.25),
    ("", 0.0, 0.0),
    ("B", 0.0, 0.0),
    ("<THINK>a</THINK><answer>B</answer>", 0.0, 0.5),
]

REPEATS = [
    ("", 0.0),
    ("a b", 0.0),
    ("a b c", 0.0),
    ("a b c d", 0.0),
    ("a a a a", -0.5),
    ("A a a", 0.0),
    ("a b c a b c", -0.25),
    (" ".join(["x"] * 102), -0.99),
]


def test_the_tables_are_as_large_as_promised():
    assert len(PREDICTIONS) + len(NUMBERS) + len(FORMATS) + len(REPEATS) >= 120


@pytest.mark.parametrize(("problem_type", "answer", "prediction", "score"), PREDICTIONS)
def test_accuracy_of_each_type(problem_type, answer, prediction, score):
    sample = Sample(answer, problem_type, COLOURS if problem_type == "multiple choice" else ())
    assert score_prediction(prediction, sample) == pytest.approx(score, abs=1e-8)
    assert accuracy(f"<think>t</think><answer>{prediction}</answer>", sample) == pytest.approx(score, abs=1e-8)


@pytest.mark.parametrize(("text", "number"), NUMBERS)
def test_parse_number(text, number):
    assert parse_number(text) == number


@pytest.mark.parametrize(("completion", "form", "tags"), FORMATS)
def test_format_and_tag_count(completion, form, tags):
    assert REWARDS["format"](completion, Sample("B")) == form
    assert REWARDS["tag_count"](completion, Sample("B")) == tags


@pytest.mark.parametrize(("completion", "penalty"), REPEATS)
def test_repetition(completion, penalty):
    assert REWARDS["repetition"](completion, Sample("B")) == pytest.approx(penalty)


def test_only_a_well_formed_answer_is_accurate():
    sample = Sample("B", options=COLOURS)
    for completion in (
        "B",
        "<answer>B",
        "<answer>B</answer><answer>C</answer>",
        "",
        "<think><answer>B</answer></think>",
    ):
        assert accuracy(completion, sample) == 0.0, completion
    assert accuracy("<answer>B</answer>", sample) == 1.0


def test_the_type_is_that_of_each_row_and_not_of_the_first():
    """By the first row's type, "3.0" would be compared as a letter."""
    rows = [(Sample("B", options=COLOURS), "B"), (Sample("3", "numerical"), "3.0"), (Sample("stop", "OCR"), "stop")]
    rewards = parse_rewards(["accuracy"])
    assert [score_group(rewards, [f"<answer>{p}</answer>"], s)[0] for s, p in rows] == [[1.0], [1.0], [1.0]]


def test_mean_relative_accuracy_equals_the_formula_of_the_benchmark():
    numpy = pytest.importorskip("numpy")
    thresholds = numpy.linspace(0.5, 0.95, 10)
    for prediction in [8 + i / 20 for i in range(140)]:
        expected = float((abs(prediction - 10) / 10 <= 1 - thresholds).mean())
        assert score_prediction(repr(prediction), Sample("10", "mra")) == pytest.approx(expected), prediction


def test_word_error_rate_and_rouge_equal_their_definitions():
    """By tables of lists, on texts of up to 80 words."""
    rng = random.Random(0)

    def edits(a, b):
        row = list(range(len(b) + 1))
        for i, x in enumerate(a, 1):
            previous, row = row, [i]
            for j, y in enumerate(b, 1):
                row.append(min(previous[j] + 1, row[-1] + 1, previous[j - 1] + (x != y)))
        return row[-1]

    def subsequence(a, b):
        row = [0] * (len(b) + 1)
        for x in a:
            previous, row = row, [0]
            for j, y in enumerate(b, 1):
                row.append(previous[j - 1] + 1 if x == y else max(previous[j], row[-1]))
        return row[-1]

    def common(a, b, n):
        a, b = ([tuple(words[i : i + n]) for i in range(len(words) - n + 1)] for words in (a, b))
        return sum(min(a.count(gram), b.count(gram)) for gram in set(a)), len(a), len(b)

    for _ in range(300):
        a, b = ([rng.choice("abc") for _ in range(rng.randrange(3, 80))] for _ in range(2))
        answer, prediction = " ".join(a), " ".join(b)
        word_error_rate = edits(a, b) / len(a)
        assert score_prediction(prediction, Sample(answer, "OCR")) == pytest.approx(max(0.0, 1 - word_error_rate))
        overlaps = [(subsequence(a, b), len(a), len(b)), common(a, b, 1), common(a, b, 2)]
        f_measures = [2 * hits / (m + n) for hits, m, n in overlaps]
        rouge = score_prediction(prediction, Sample(answer, "free-form"))
        assert rouge == pytest.approx(sum(f_measures) / 3), (answer, prediction)


@pytest.mark.parametrize("problem_type", sorted(set(ACCURACY) - {"math"}))
@pytest.mark.parametrize(
    "unit", ["word ", "1", "1,", "1,111,", "1/", "A or ", "<answer>", "<think>x</think><answer>", " ", "a\n", "e1"]
)
def test_time_grows_no_faster_than_the_text(problem_type, unit):
    """Ten times the characters may take 30 times as long; what backtracks takes 100 times as long, or for ever."""
    answers = {
        "multiple choice": "B", "OCR": "word word two", "free-form": "a word", "temporal grounding": "3 to 7",
        "spatial grounding": "[1, 2, 3, 4]", "tracking": "[1, 2, 3, 4]",
        "spatial-temporal grounding": '{"time": [3, 7], "boxes": {"4": [1, 2, 3, 4]}}',
    }  # fmt: skip
    sample = Sample(answers.get(problem_type, "3"), problem_type, meta={"duration": 9.0})
    short, long = ((unit * count)[:count] for count in (10_000, 100_000))
    rewards = [f for f in REWARDS.values() if form_of(f) == "each"]
    if problem_type != "temporal grounding":
        rewards.remove(REWARDS["timestamp_iou"])
    for function in (score_prediction, *rewards):
        least = min(seconds_of(function, short, sample) for _ in range(3))
        assert any(seconds_of(function, long, sample) < 30 * least + 0.005 for _ in range(10)), function


def seconds_of(function, *args):
    """CPU seconds: what else the machine does counts less."""
    start = time.thread_time()
    function(*args)
    return time.thread_time() - start


def test_a_bad_ground_truth_raises_and_names_the_sample():
    for sample in (
        Sample("B", "riddle"),
        Sample("E", options=COLOURS),
        Sample("A or B"),
        Sample("many", "numerical"),
        Sample("3 or 4", "mra"),
        Sample("", "OCR"),
        Sample("?", "free-form"),
        Sample("far", "regression"),
    ):
        with pytest.raises(ValueError, match="balls.jsonl:7"):
            check_sample(sample)
        with pytest.raises(ValueError, match="balls.jsonl:7"):
            accuracy(RIGHT, sample)
    with pytest.raises(ValueError, match="unknown problem_type 'riddle'; accuracy knows multiple choice, numerical"):
        check_sample(Sample("B", "riddle"))
    check_sample(Sample("B", options=COLOURS))


HAS_MATH = importlib.util.find_spec("math_verify") is not None


@pytest.mark.skipif(HAS_MATH, reason="math-verify is installed")
def test_mathematics_without_the_package_says_how_to_get_it():
    with pytest.raises(ImportError, match="pip install .math-verify"):
        accuracy(RIGHT, Sample("1/2", "math"))


@pytest.mark.skipif(not HAS_MATH, reason="needs math-verify")
def test_mathematics_off_the_main_thread_and_without_end():
    """math-verify's SIGALRM raises in any other thread; and 9^9^9^9 stops for no signal."""
    scores = []

    def work():
        cases = [
            ("1/2", "0.5"),
            ("\\frac{1}{2}", "$\\frac{2}{4}$"),
            ("x+1", "1+x"),
            ("1/2", "0.6"),
            ("3", ""),
            ("3", "9^{9^{9^{9}}}"),
            ("3", "3"),
        ]
        scores.extend(score_prediction(prediction, Sample(answer, "math")) for answer, prediction in cases)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(120)
    assert scores == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0]


def window(index, lengths, accuracies):
    return REWARDS["length_window"]("", None, Group([], index, lengths, accuracies))


def test_length_window():
    assert [window(i, [319, 320, 512, 513], [1.0] * 4) for i in range(4)] == [0.0, 1.0, 1.0, 0.0]
    assert [window(i, [400] * 3, [1.0, 0.1, 0.2]) for i in range(3)] == [1.0, 0.0, 1.0]
    assert window(0, [400] * 3, [1.0, 0.0, 0.1]) == 0.0, "the only right one of its group gets nothing"


@pytest.mark.parametrize(
    ("length", "accurate", "reward"),
    [
        (0, 1.0, 1.0),
        (500, 1.0, 0.75),
        (1000, 1.0, 0.5),
        (2000, 1.0, 0.5),
        (250, 1.0, 0.75 + 0.25 * math.sqrt(0.5)),
        (0, 0.0, -1.0),
        (500, 0.0, -0.75),
        (1000, 0.0, -0.5),
        (2000, 0.0, -0.5),
        (0, 0.5, -1.0),
        (0, 0.6, 1.0),
    ],
)
def test_length_cosine(length, accurate, reward):
    assert REWARDS["length_cosine"]("", None, Group([], 0, [length], [accurate])) == pytest.approx(reward)


@pytest.mark.parametrize(("length", "reward"), [(1, 0.0), (80, 0.0), (90, -0.5), (95, -0.75), (100, -1.0)])
def test_soft_overlong(length, reward):
    """DAPO, arXiv 2503.14476, eq. 13, with a limit of 100 and so a cache of 20."""
    assert REWARDS["soft_overlong"]("", None, Group([], 0, [length], [], 100)) == reward


def test_soft_overlong_is_given_the_limit_and_needs_no_accuracy():
    rewards = parse_rewards(["soft_overlong:2"])
    total, parts, _ = score_group(rewards, [RIGHT, WRONG], Sample("B"), lengths=[10, 90], max_new_tokens=100)
    assert parts == {"soft_overlong": [0.0, -0.5]} and total == [0.0, -1.0]
    with pytest.raises(ValueError, match="soft_overlong needs --max_new_tokens"):
        score_group(rewards, [RIGHT], Sample("B"), lengths=[10])


def test_temporal_bonus():
    assert temporal_bonus([1.0, 0.0, 0.1, 0.2], [0.0, 0.0]) == [0.3, 0.0, 0.0, 0.3]
    assert temporal_bonus([1.0, 0.0], [1.0, 1.0]) == [0.0, 0.0], "shuffled frames do better: time is not used"
    assert temporal_bonus([1.0, 1.0, 1.0, 1.0, 0.0], [1.0]) == [0.3, 0.3, 0.3, 0.3, 0.0], "0.8 >= 0.8 * 1"
    assert temporal_bonus([1.0, 1.0, 1.0, 1.0, 0.0], [1.0], threshold=1.0) == [0.0] * 5
    assert temporal_bonus([1.0], [0.0], bonus=0.5) == [0.5]
    with pytest.raises(ValueError):
        temporal_bonus([1.0], [])


def test_the_total_is_weighted_and_the_parts_are_raw():
    """A group is filtered by parts["accuracy"], which no weight and no other reward shapes."""
    rewards = parse_rewards(["format:0.5", "accuracy:2"])
    completions = [RIGHT, WRONG, "<answer>B</answer>", "B"]
    totals, parts, failures = score_group(rewards, completions, Sample("B", options=COLOURS))
    assert totals == [2.5, 0.5, 2.0, 0.0]
    assert parts == {"accuracy": [1.0, 0.0, 1.0, 0.0], "format": [1.0, 1.0, 0.0, 0.0]}
    assert failures == {}
    assert completions == [RIGHT, WRONG, "<answer>B</answer>", "B"]


def test_group_rewards_see_the_raw_accuracy_and_the_lengths():
    rewards = parse_rewards(["length_window:0.2", "accuracy:3"])
    totals, parts, _ = score_group(rewards, [RIGHT, RIGHT, WRONG], Sample("B"), lengths=[400, 20, 400])
    assert parts["length_window"] == [1.0, 0.0, 0.0]
    assert totals == pytest.approx([3.2, 3.0, 0.0])
    with pytest.raises(ValueError, match="length_window needs the length"):
        score_group(rewards, [RIGHT], Sample("B"))


MINE = """
import asyncio, os, re, threading, time
from beside import SHARE
limit, calls = asyncio.Semaphore(4), []
def words(completion, sample): return len(completion.split())
def rank(completion, sample, group):
    return group.index + sum(group.accuracy) + len(group.completions) + len(group.lengths)
async def judge(completion, sample):
    await asyncio.sleep(0.01)
    return completion == sample.answer
def raises(completion, sample): return 1 / completion.count("x")
def leaves(completion, sample): raise SystemExit(3)
def breaks(completion, sample): raise KeyboardInterrupt("now")
def infinite(completion, sample): return float("inf") if completion == "y" else -1e300  # whose square is infinite
def text(completion, sample): return "1"
def says(completion, sample):
    time.sleep(0.1 * (completion == "first"))
    if completion: raise ValueError(completion)
    return 1.0
def slow(completion, sample): time.sleep(0.2); return 1.0
def hangs(completion, sample): threading.Event().wait() if completion == "x" else None; return 1.0
def alone(completion): return 0.0
def held(completion, sample): return bool(re.match(r"(a+)+$", completion))
def ends(completion, sample): os._exit(3) if completion == "x" else time.sleep(0.1); return 1.0
async def leaves_loop(completion, sample): raise SystemExit(3)
async def limited(completion, sample):
    async with limit:
        await asyncio.sleep(0.1)
    return 1.0
def long(completion, sample): raise ValueError("\\x1b[31m" + completion + "line\\n" * 500)
def changes(completion, sample):
    sample.meta.setdefault("seen", []).append(completion)
    return len(sample.meta["seen"])
def neighbour(completion, sample): return SHARE
def count(completion, sample): calls.append(completion); return len(calls)
def pid(completion, sample): return os.getpid()
def forks(completion, sample):
    pid = os.fork()
    if not pid and completion == "leaves its session": os.setsid()
    if not pid: time.sleep(20); os._exit(0)
    with open(os.path.join(os.path.dirname(__file__), "forked"), "w") as file: file.write(str(pid))
    os.waitpid(pid, 0)
class Unreadable(Exception):
    def __str__(self): raise ValueError
def unreadable(completion, sample): raise Unreadable
class Item:  # as NumPy's bool and a tensor without dimensions: no numbers.Real
    def item(self): return True
def item(completion, sample): return Item()
number = 3
def whole(completions, samples): return [len(c) + (s.answer == "x") for c, s in zip(completions, samples)]
async def whole_async(completions, samples): await limit.acquire(); limit.release(); return whole(completions, samples)
def several(completions, samples):
    if completions[0] == "raises": raise ValueError("no")
    if completions[0] == "hangs": threading.Event().wait()
    return {"short": [1.0], "none": None, "one bad": [1.0, "x"]}[completions[0]]
def plural(completions, samples, groups): return 0.0
def logs(completion, sample): return len(completion), {"vowels": sum(c in "aeiou" for c in completion), "seen": True}
def logs_some(completions, samples): return [(1.0, {"long": 1}) if len(c) > 1 else 0.5 for c in completions]
def logs_rubbish(completion, sample): return 1.0, {"x": float("nan")} if completion else "x"
async def waits(completion, sample): await asyncio.sleep(0.3); return 1.0
def blocks(completion, sample): time.sleep(0.3); return 1.0
meeting, met, all_met = threading.Barrier(256), [], asyncio.Event()
def meets(completion, sample): meeting.wait(); return 1.0
async def meets_async(completion, sample):
    met.append(completion)
    if len(met) == 256: all_met.set()
    await all_met.wait()
    return 1.0
"""


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mine")
    (folder / "mine.py").write_text(MINE)
    (folder / "other.py").write_text("import time\ndef late(completion, sample): time.sleep(0.4); return 2.0\n")
    (folder / "beside.py").write_text("SHARE = 0.25")
    (folder / "broken.py").write_text("1 +")
    return f"{folder}/mine.py"


SAMPLE = video.formats.Sample("balls.jsonl:7", "Which?", "x")


def user(mine, name, completions, **options):
    """(values, messages of failed calls) of the reward `name`."""
    totals, parts, failures = score_group(parse_rewards([f"{mine}:{name}:2"]), completions, SAMPLE, **options)
    assert totals == [2 * value for value in parts[name]]
    assert list(parts) == [name] and list(failures) in ([], [name])
    return parts[name], failures.get(name, [])


def test_a_user_reward_is_called_for_each_completion(mine):
    assert user(mine, "words", ["a b", "", "c"]) == ([2.0, 0.0, 1.0], [])
    assert user(mine, "judge", ["y", "x"]) == ([0.0, 1.0], [])
    assert user(mine, "rank", ["y", "x"]) == ([2.0, 3.0], [])
    both = parse_rewards([f"{mine}:rank", "accuracy"])
    _, parts, _ = score_group(both, [RIGHT, RIGHT], replace(SAMPLE, answer="B"), lengths=[5, 6])
    assert parts["rank"] == [6.0, 7.0]


def test_a_failing_user_reward_costs_that_completion_and_is_counted(mine):
    assert user(mine, "raises", ["xx", "y", "x"]) == ([0.5, 0.0, 1.0], ["ZeroDivisionError: division by zero"])
    assert user(mine, "leaves", ["y"], reward_timeout=5) == ([0.0], ["SystemExit: 3"])
    assert user(mine, "breaks", ["y"], reward_timeout=5) == ([0.0], ["KeyboardInterrupt: now"])
    values, messages = user(mine, "infinite", ["y", "z"])
    assert values == [0.0, 0.0] and len(messages) == 2
    assert "returned '1', not a finite number" in user(mine, "text", ["y"])[1][0]


def test_messages_of_failed_calls_are_in_the_order_of_the_completions(mine):
    _, messages = user(mine, "says", ["first", "", "second"])
    assert messages == ["ValueError: first", "ValueError: second"]


def test_slow_user_rewards_run_together_and_late_ones_count_as_failed(mine):
    start = time.monotonic()
    assert user(mine, "slow", ["a"] * 8) == ([1.0] * 8, [])
    assert time.monotonic() - start < 1.2, "eight sleeps of .2 s, one after the other, take 1.6 s"
    start = time.monotonic()
    outcome = user(mine, "hangs", ["a", "x", "b"], reward_timeout=0.3)
    assert 0.2 < time.monotonic() - start < 2
    assert outcome == ([1.0, 0.0, 1.0], ["no result within 0.3 s"])


def test_a_user_reward_that_never_lets_go_of_the_interpreter_is_killed(mine):
    """In a thread of this process it would hold up every other thread, the time limit and the signals."""
    heard, began = [], time.monotonic()
    before = signal.signal(signal.SIGALRM, lambda *_: heard.append(time.monotonic() - began))
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    outcome = user(mine, "held", ["a" * 40 + "b"], reward_timeout=1.0)
    signal.signal(signal.SIGALRM, before)
    assert outcome == ([0.0], ["no result within 1 s"])
    assert heard and heard[0] < 0.9 and time.monotonic() - began < 5
    assert user(mine, "held", ["a", "ab"]) == ([1.0, 0.0], []), "the next group is scored as ever"


def test_a_user_reward_that_ends_its_process_costs_a_zero(mine):
    outcome = user(mine, "ends", ["a", "x"], reward_timeout=20)
    assert outcome == ([0.0, 0.0], ["its process ended with exit code 3"] * 2)
    assert user(mine, "ends", ["a", "b"]) == ([1.0, 1.0], [])
    assert user(mine, "leaves_loop", ["a", "b"]) == ([0.0, 0.0], ["SystemExit: 3"] * 2)
    assert user(mine, "judge", ["x"]) == ([1.0], []), "the event loop goes on"
    ((pid,), _) = user(mine, "pid", ["a"])
    os.kill(int(pid), signal.SIGKILL)
    time.sleep(0.1)
    assert user(mine, "words", ["a b"]) == ([2.0], []), "killed between two calls: it costs neither of them"


@pytest.mark.parametrize("completion", ["stays", "leaves its session"])
def test_a_user_reward_that_forks_is_killed_with_its_children(completion, mine):
    """They hold the other end of the pipe open, so the end of their parent alone is not seen."""
    assert user(mine, "words", ["a"]) == ([1.0], [])  # the process is there
    began = time.monotonic()
    outcome = user(mine, "forks", [completion], reward_timeout=0.5)
    assert time.monotonic() - began < 5
    assert outcome == ([0.0], ["no result within 0.5 s"])
    forked = int(Path(mine).with_name("forked").read_text())
    if completion == "stays":
        assert_gone([forked])
    else:
        os.kill(forked, signal.SIGKILL)
    assert user(mine, "words", ["a b"]) == ([2.0], []), "the next group is scored as ever"


def test_a_user_reward_may_return_what_holds_one_number(mine):
    assert user(mine, "item", ["a"]) == ([1.0], [])


def test_an_error_whose_own_text_raises_costs_one_call_at_once(mine):
    began = time.monotonic()
    _, (message,) = user(mine, "unreadable", ["a"], reward_timeout=20)
    assert message == "Unreadable: its message raises ValueError" and time.monotonic() - began < 10


def test_an_interrupted_call_leaves_no_answers_for_the_next_one(mine):
    assert user(mine, "words", ["a"]) == ([1.0], [])  # the process is there

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    with pytest.raises(KeyboardInterrupt):
        user(mine, "slow", ["a"] * 3)
    signal.signal(signal.SIGALRM, before)
    time.sleep(0.3)
    assert user(mine, "words", ["a b", "", "c"]) == ([2.0, 0.0, 1.0], [])


def test_a_user_file_keeps_its_state_and_its_neighbours(mine):
    assert user(mine, "neighbour", ["a"]) == ([0.25], [])
    ((first,), _) = user(mine, "count", ["a"])
    assert user(mine, "count", ["a"]) == ([first + 1], [])
    start = time.monotonic()
    for _ in range(2):  # a semaphore serves one event loop in its life
        assert user(mine, "limited", ["a"] * 8) == ([1.0] * 8, [])
    assert 0.4 <= time.monotonic() - start < 1.4, "four at a time"


def of_step(specs, groups, **options):
    """The `Scores` of the prompts of a step."""
    samples = [replace(SAMPLE, key=f"balls.jsonl:{n}", answer="yx"[n == 0]) for n in range(len(groups))]
    return score_groups(parse_rewards(specs), groups, samples, **options)


@pytest.mark.parametrize("name", ["whole", "whole_async"])
def test_a_reward_may_score_a_whole_step_at_once(name, mine):
    first, second = of_step([f"{mine}:{name}:2", f"{mine}:words"], [["abc", ""], ["b"]])
    assert first.parts == {name: [4.0, 1.0], "words": [1.0, 0.0]} and first.totals == [9.0, 2.0]
    assert second.parts == {name: [1.0], "words": [1.0]} and second.totals == [3.0]
    assert of_step([f"{mine}:{name}"], []) == []


@pytest.mark.parametrize(
    ("first", "parts", "messages"),
    [
        ("raises", [0.0, 0.0], ["ValueError: no"] * 2),
        ("hangs", [0.0, 0.0], ["no result within 0.5 s"] * 2),
        ("short", [0.0, 0.0], ["returned 1 values for 2 completions"] * 2),
        ("none", [0.0, 0.0], ["TypeError: 'NoneType' object is not iterable"] * 2),
        ("one bad", [1.0, 0.0], ["TypeError: returned 'x', not a finite number up to 1e+30"]),
    ],
)
def test_a_whole_step_that_fails_is_counted_completion_by_completion(first, parts, messages, mine):
    assert user(mine, "several", [first, "b"], reward_timeout=0.5) == (parts, messages)


def test_a_reward_may_log_numbers_of_its_own(mine):
    first, second = of_step(["format:0.5", f"{mine}:logs:0", f"{mine}:logs_some"], [["abe", "b"], ["c"]])
    assert first.logs == {"logs/vowels": [2.0, 0.0], "logs/seen": [1.0, 1.0], "logs_some/long": [1.0]}
    assert second.logs == {"logs/vowels": [0.0], "logs/seen": [1.0]}
    assert first.parts == {"format": [0.0, 0.0], "logs": [3.0, 1.0], "logs_some": [1.0, 0.5]}
    assert first.totals == [1.0, 0.5], "a weight of 0 logs alone"
    messages = ["TypeError: returned nan, not a finite number up to 1e+30"]
    messages += ["TypeError: returned 'x' to log, not a dict of numbers"]
    assert user(mine, "logs_rubbish", ["a", ""]) == ([0.0, 0.0], messages)


@pytest.mark.parametrize("name", ["meets", "meets_async"])
def test_all_groups_of_a_step_are_scored_at_once(name, mine):
    """No call of 32 x 8 returns before all have begun; group by group, a judge of 0.3 s took 9.9 s."""
    scores = of_step([f"{mine}:{name}"], [["a"] * 8] * 32, reward_timeout=60)
    assert [score.totals for score in scores] == [[1.0] * 8] * 32


@pytest.mark.slow  # a busy machine takes longer
@pytest.mark.parametrize("name", ["waits", "blocks"])
def test_a_step_of_calls_that_wait_takes_hardly_longer_than_one(name, mine):
    user(mine, name, ["a"])
    start = time.monotonic()
    of_step([f"{mine}:{name}"], [["a"] * 8] * 32)
    assert time.monotonic() - start < 1.5


def test_all_files_share_one_time_limit(mine):
    other = mine.replace("mine.py", "other.py")
    specs = [f"{mine}:blocks", f"{other}:late", f"{mine}:hangs"]
    of_step(specs, [["a"]])
    (scores,) = of_step(specs, [["a", "x"]], reward_timeout=3.0)
    assert scores.parts == {"blocks": [1.0, 1.0], "late": [2.0, 2.0], "hangs": [1.0, 0.0]}
    assert scores.failures == {"hangs": ["no result within 3 s"]}, "the others' results are kept"


def test_a_user_reward_gets_a_copy_of_the_sample(mine):
    assert user(mine, "changes", ["a", "b", "c"]) == ([1.0, 1.0, 1.0], [])
    assert SAMPLE.meta == {}


def test_a_message_of_a_user_reward_is_one_line_of_300_characters(mine):
    _, (message,) = user(mine, "long", ["\ud83d"])
    assert message.startswith(r"ValueError: \x1b[31m\ud83dline line ") and len(message) <= 310 and message.isprintable()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("while True: pass", "no result within 0.7 s"),
        ("import os; os._exit(4)", "its process ended with exit code 4"),
        ("raise SystemExit('no\\nkey')", "SystemExit: no key"),
    ],
)
def test_a_user_file_that_hangs_or_ends_at_import_is_one_line(text, reason, tmp_path, monkeypatch):
    monkeypatch.setattr(rewards.user, "IMPORT_SECONDS", 0.7 if "while" in text else 30)
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(ValueError) as error:
        parse_rewards([f"{tmp_path}/mine.py:f"])
    assert str(error.value) == f"--reward {tmp_path}/mine.py:f: {tmp_path}/mine.py cannot be imported: {reason}"


@pytest.mark.parametrize(
    "body",
    [
        "time.sleep(600)",
        "(child := os.fork()) or time.sleep(600); print(child); time.sleep(600)",
        pytest.param("re.match('(a+)+$', 'a' * 40 + 'b')", marks=pytest.mark.slow),
    ],
)
def test_no_process_of_a_user_reward_outlives_a_killed_trainer(body, tmp_path):
    (tmp_path / "mine.py").write_text(
        f"import os, re, time\ndef f(completion, sample): print(os.getpid()); {body}; return 1.0\n"
    )
    code = "from rewards import *; score_groups(parse_rewards(['mine.py:f']), [['a']], [None], reward_timeout=1)"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    trainer = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, env=environment)
    pids = [int(trainer.stdout.readline()) for _ in range(1 + body.count("print"))]
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()
    time.sleep(1 if "sleep" in body else 8)
    assert_gone(pids)


def test_a_built_in_error_is_raised_not_scored():
    with pytest.raises(ValueError, match="unknown problem_type"):
        score_group(parse_rewards(["accuracy"]), [RIGHT], Sample("B", "riddle"))


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([], "at least one"),
        (
            ["speed"],
            "no reward called 'speed' takes (completion, sample), (completion, sample, group) or (completions, "
            "samples); use one of accuracy",
        ),
        ([""], "no reward called ''"),
        (["accuracy:0", "format:0"], "every weight is 0"),
        (["accuracy:x"], "must be a finite number"),
        (["accuracy:nan"], "must be a finite number"),
        (["accuracy:inf"], "must be a finite number"),
        (["accuracy:1:2"], "must be a finite number"),
        (["accuracy", "accuracy:2"], "is taken"),
        (["format", "length_window:0.2"], "add accuracy:1"),
        (["length_cosine"], "add accuracy:1"),
        (["no.py:f"], "no.py cannot be imported: FileNotFoundError: [Errno 2] No such file"),
        (["MINE:none"], "no reward called 'none' takes (completion, sample), (completion, sample, group)"),
        (["MINE:number"], "no reward called 'number' takes (completion, sample), ("),
        (["MINE:plural"], "no reward called 'plural' takes (completion, sample), ("),
        (["MINE:alone"], "no reward called 'alone' takes (completion, sample), ("),
        (["BROKEN:f"], "cannot be imported: SyntaxError"),
        (["MINE:words", "MINE:words:2"], "is taken"),
    ],
)
def test_a_wrong_reward_flag_names_the_flag_and_the_fix(mine, specs, message):
    specs = [spec.replace("MINE", mine).replace("BROKEN", mine.replace("mine.py", "broken.py")) for spec in specs]
    with pytest.raises(ValueError, match="--reward") as error:
        parse_rewards(specs)
    assert message in str(error.value)


def test_specs(mine):
    rewards = parse_rewards(["format:.5", "repetition:-1", f"{mine}:words:1e-1", "accuracy"])
    assert [(r.name, r.weight, r.user) for r in rewards] == [
        ("accuracy", 1.0, False),
        ("format", 0.5, False),
        ("repetition", -1.0, False),
        ("words", 0.1, True),
    ]


@pytest.mark.parametrize("accuracies, k, expected", [
    ([0, 1, 0, 0], 1, 1 / 4),  # the mean
    ([0, 1, 0, 0], 2, 1 / 2),  # 1 - C(3, 2) / C(4, 2): three of six pairs have the right one
    ([1, 0, 0, 1, 0], 3, 9 / 10),  # 1 - C(3, 3) / C(5, 3)
    ([1, 1, 0, 1], 2, 1.0),  # one wrong: no pair is all wrong
    ([0, 0, 0], 2, 0.0),
    ([0, 0, 0, 0, 0, 0, 0, 1], 4, 1 / 2),  # 1 - C(7, 4) / C(8, 4) = 1 - 35 / 70
    ([1.0, 0.2, 0.5], 2, 2.5 / 3),  # the best of {.2 .5}, {.2 1}, {.5 1}
    ([0.25, 0.75], 2, 0.75),
])  # fmt: skip
def test_pass_at_k_by_hand(accuracies, k, expected):
    assert pass_at_k(accuracies, k) == pytest.approx(expected, abs=1e-15)


def test_answer_stats():
    completions = [
        "<answer>A</answer>",
        "<answer>(b)</answer>",
        "<answer>B</answer>",
        "B",
        "<answer>A or B</answer>",
        "<answer>A</answer><answer>B</answer>",
        "<answer>Based on</answer>",
        "<answer>A</answer>",
    ]
    samples = [Sample("B")] * 7 + [Sample("A", "OCR")]
    assert answer_stats(completions, samples) == {
        "letters": {"A": 1, "B": 2},
        "no_answer": 0.25,
        "several_answers": 0.25,
    }
    assert answer_stats([], []) == {"letters": {}, "no_answer": 0.0, "several_answers": 0.0}
    with pytest.raises(ValueError):
        answer_stats(["x"], [])


def test_torch_is_not_imported():
    subprocess.run([sys.executable, "-c", "import sys, rewards; assert 'torch' not in sys.modules"], check=True)
