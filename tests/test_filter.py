"""Which rows are worth training on: verdicts, data files that keep their form, a filter that is stopped, shortcuts."""

import gzip
import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import killed_while_saving

import evaluation.filter
import grpo.engine.evaluate
import train
from demo.synthetic import DemoSpec, make_demo_set
from demo.tiny import CHAT_WORDS, build_tiny_model
from evaluation.filter import chance_of, luck, rates_of
from video.dataset import Sample, copy_rows, read_samples

ROOT = Path(__file__).parent.parent
TINY = ("--nframes", "4", "--min_pixels", "784", "--max_pixels", "784", "--max_new_tokens", "8", "--threads", "1",
        "--device", "cpu", "--prompt_template", "{problem}", "--workers", "0", "--eval_batch", "8")  # fmt: skip
THRESHOLDS = SimpleNamespace(min_rate=0.0, max_rate=1.0, blind_p=0.01, open_chance=0.25)


def run(ckpt, data, output, *flags):
    """evaluation.filter in this process: its exit code."""
    given = ["--ckpt", ckpt, "--data", data, "--output", output, *TINY, *flags]
    return evaluation.filter.main([str(flag) for flag in given])


def rates(folder):
    return [json.loads(line) for line in (Path(folder) / "rates.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    return build_tiny_model(tmp_path_factory.mktemp("tiny") / "model", seed=3)


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """A data file of 160 questions about four videos; "shortcut" is the category of every other one. The last line has
    no line break, and one has spaces that JSON does not need."""
    folder = tmp_path_factory.mktemp("questions")
    made = make_demo_set(folder / "made", DemoSpec(train=4, val=4, warmup=4))["train"]
    videos = [f"made/{json.loads(line)['video']}" for line in made.read_text().splitlines()]
    rows = [
        {"problem": f"Number {n}?\nA. x\nB. y\nC. z\nD. w", "solution": "<answer>B</answer>", "video": videos[n // 40],
         "category": ("honest", "shortcut")[n % 2], "note": [1.0, None, "é"]}
        for n in range(160)
    ]  # fmt: skip
    lines = [json.dumps(row, separators=(", ", " : "), ensure_ascii=n % 3 > 0) for n, row in enumerate(rows)]
    (folder / "asked.jsonl").write_text("\n".join(lines))
    return folder / "asked.jsonl"


def scripted(monkeypatch):
    """The model knows every shortcut at 97% with the video or without. The answers to the other questions it knows in
    30% to 70% with the video, and guesses without."""

    def say(policy, prompts, group_size, settings, seeds, *_):
        return [SimpleNamespace(texts=[completion(p, random.Random(f"{s}/{n}")) for n in range(group_size)])
                for p, s in zip(prompts, seeds)]  # fmt: skip

    def completion(prompt, draw):
        known = random.Random(prompt.sample.key).uniform(0.3, 0.7)
        sees = prompt.pixel_values_videos is not None
        share = 0.97 if prompt.sample.meta["category"] == "shortcut" else known if sees else 0.25
        return f"<answer>{'B' if draw.random() < share else 'C'}</answer>"

    monkeypatch.setattr(grpo.engine.evaluate, "generate", say)


def test_luck_and_chance_against_literal_numbers():
    assert luck(2, 2, 0.25) == 1 / 16 and luck(0, 7, 0.3) == pytest.approx(1)
    assert luck(9, 16, 0.25) == pytest.approx(0.00747, abs=1e-5) and luck(8, 16, 0.25) == pytest.approx(
        0.02713, abs=1e-5
    )
    asked = lambda problem, kind="multiple choice", options=(): Sample(
        "k", problem, "A", options=options, problem_type=kind
    )
    assert chance_of(asked("Which?", options=("A. x", "B. y", "C. z")), 0.1) == 1 / 3
    assert chance_of(asked("Which? A. x B. y"), 0.1) == chance_of(asked("Which?\n(A) x\n(B) y"), 0.1) == 1 / 2
    assert chance_of(asked("Who is Mr. A. Smith?"), 0.1) == chance_of(asked("Which? B. y C. z"), 0.1) == 0.1
    assert chance_of(asked("How many? A. 1 B. 2", "numerical"), 0.1) == 0.1


@pytest.mark.parametrize(
    ("seen", "blind", "expected"),
    [
        ([1, 0] * 8, [1] * 8 + [0] * 8, "kept"),
        ([1, 0] * 8, [1] * 9 + [0] * 7, "right when blind"),
        ([1] * 16, [1] * 16, "right when blind"),
        ([1] * 16, [0] * 16, "always right"),
        ([0.5] * 16, [0] * 16, "always right"),
        ([0.49] * 16, [0] * 16, "always wrong"),
        ([0.5] + [0] * 15, [0] * 16, "kept"),
    ],
)
def test_verdicts(seen, blind, expected):
    sample = Sample("a.jsonl:1", "Which? A. x B. y C. z D. w", "A")
    record = lambda scores: {"key": sample.key, "category": "c", "scores": scores, "score": 0}
    row = rates_of(sample, record(seen), record(blind), THRESHOLDS)
    assert row["verdict"] == expected and row["chance"] == 0.25 and list(row)[:2] == ["key", "category"]
    skipped = {"key": sample.key, "skipped": "gone.mp4: no such file"}
    assert rates_of(sample, skipped, record(blind), THRESHOLDS) == {**skipped, "verdict": "unreadable"}


def test_kept_rows_have_the_form_of_the_file(tmp_path):
    """Each type of file: the rows of the copy are the rows that were asked for."""
    row = lambda n: {
        "problem": f'Q{n}, "so"?\nA. x\nB. y',
        "solution": "<answer>B</answer>",
        "video": f"{n}.mp4",
        "x": n,
    }
    rows, number = [row(n) for n in range(4)], {2, 4}
    table = lambda s: "".join(
        s.join(f'"{cell}"' for cell in line) + "\n"
        for line in [("problem", "solution", "video")] + [(f"Q{n}?\nA. x\nB. y", "B", f"{n}.mp4") for n in range(4)]
    )
    lines = "\n\n".join(json.dumps(row) for row in rows)  # blank lines count
    files = {
        "a.jsonl": (lines.encode(), {3, 7}), "b.jsonl.gz": (gzip.compress(lines.encode()), {3, 7}),
        "c": (lines.encode(), {3, 7}), "d.json": (json.dumps(rows).encode(), number),
        "e.csv": (table(",").encode(), {5, 11}), "f.tsv": (table("\t").encode(), {5, 11}),
        "g.txt": (b"AB 1.0 2.0##a.\nCD 1.0 3.0##b.\nEF 1.0 4.0##c.\nGH 1.0 5.0##d.", number),
    }  # fmt: skip
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "h.parquet")
    for name, (content, _) in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "kept").mkdir()
    for name, asked in {**{name: asked for name, (_, asked) in files.items()}, "h.parquet": number}.items():
        copy_rows(tmp_path / name, tmp_path / "kept" / name, asked)
        before = {s.key: s for s in read_samples(tmp_path / name)}
        after = read_samples(tmp_path / "kept" / name, video_root=tmp_path)
        plain = lambda s: (s.problem, s.answer, s.videos, s.options, s.problem_type, s.meta)
        assert [plain(s) for s in after] == [plain(before[f"{name}:{n}"]) for n in sorted(asked)], name
    assert (tmp_path / "kept/a.jsonl").read_text() == "".join(json.dumps(rows[n]) + "\n" for n in (1, 3))


def test_shortcuts_go_and_the_rest_stays(tmp_path, questions, tiny_folder, monkeypatch, capsys):
    scripted(monkeypatch)
    assert run(tiny_folder, questions, tmp_path / "out") == 0
    verdicts = Counter((row["category"], row["verdict"] == "kept") for row in rates(tmp_path / "out"))
    assert verdicts["honest", True] >= 0.95 * 80 and verdicts["shortcut", False] >= 0.95 * 80
    lines, kept = questions.read_text().split("\n"), (tmp_path / "out/kept/asked.jsonl").read_text()
    chosen = [lines[n] for n, row in enumerate(rates(tmp_path / "out")) if row["verdict"] == "kept"]
    assert kept == "".join(line + "\n" for line in chosen) and chosen
    out = capsys.readouterr().out
    dropped = f"{160 - len(chosen)} right when blind, 0 always right, 0 always wrong, 0 unreadable, 0 unjudged"
    assert f"kept {len(chosen)} of 160 rows; dropped: {dropped}; {tmp_path}/out/rates.jsonl has each" in out
    assert f"--data {tmp_path}/out/kept/asked.jsonl --video_root {questions.parent}" in out

    # Other thresholds sample nothing again
    monkeypatch.setattr(grpo.engine.evaluate, "generate", None)
    assert (
        run(tiny_folder, questions, tmp_path / "out", "--blind_p", "0", "--min_rate", "0.5", "--max_rate", "0.9") == 0
    )
    assert {row["verdict"] for row in rates(tmp_path / "out")} == {"kept", "always right", "always wrong"}
    assert run(tiny_folder, questions, tmp_path / "out", "--temperature", "0.5") == 2
    assert "holds answers under other settings (temperature was 1.0, is 0.5)" in capsys.readouterr().err


def test_stopped_twice_and_resumed_gives_the_same_bytes(tmp_path, questions, tiny_folder, monkeypatch):
    scripted(monkeypatch)
    assert run(tiny_folder, questions, tmp_path / "whole", "--samples", "40") == 0
    for left in (3, 4):
        with killed_while_saving(left):
            run(tiny_folder, questions, tmp_path / "parts", "--samples", "40")
    assert run(tiny_folder, questions, tmp_path / "parts", "--samples", "40") == 0
    for name in ("predictions.jsonl", "rates.jsonl", "kept/asked.jsonl"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_the_model_is_sampled_as_often_as_asked_and_bad_videos_are_counted(tmp_path, questions, tiny_folder, capsys):
    rows = [json.loads(line) for line in questions.read_text().splitlines()][:3]
    rows[1]["video"] = "gone.mp4"
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--video_root", questions.parent, "--group_size", "4")
    assert run(tiny_folder, tmp_path / "few.jsonl", tmp_path / "out", *flags) == 0
    made = [json.loads(line) for line in (tmp_path / "out/predictions.jsonl").read_text().splitlines()]
    sampled = Counter((row["control"], len(row["scores"])) for row in made if "scores" in row)
    assert sampled == {(None, 4): 2, ("no video", 4): 3}
    assert [row["verdict"] for row in rates(tmp_path / "out")] == ["always wrong", "unreadable", "always wrong"]
    assert (tmp_path / "out/kept/few.jsonl").read_text() == "", "random weights answer nothing"
    said = capsys.readouterr().out
    assert "kept 0 of 3 rows; dropped: 0 right when blind, 0 always right, 2 always wrong, 1 unreadable" in said
    assert "to train on them" not in said, "nobody trains on an empty file"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--group_size", "1"), "--group_size 1: must be at least 2"),
        (
            ("--group_size", "3"),
            "may all be right (p = 0.016), so no blind answer stands out; give at least 4, or raise",
        ),
        (("--min_rate", "0.8", "--max_rate", "0.8"), "--min_rate 0.8: must be below --max_rate 0.8"),
        (("--blind_p", "2"), "--blind_p 2.0: must be at most 1.0"),
        (("--temperature", "0"), "--temperature 0.0: must be above 0"),
        (("--data", "gone.jsonl"), "--data gone.jsonl: no such file"),
        (("--ckpt", "gone"), "--ckpt gone"),
        (("--output", "/proc/nowhere"), "--output /proc/nowhere: cannot be written to"),
    ],
)
def test_wrong_flags_give_one_line(tmp_path, questions, tiny_folder, capsys, flags, says):
    assert run(tiny_folder, questions, tmp_path / "out", *flags) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and error[0].startswith("evaluation.filter: error: ") and says in error[0]


@pytest.mark.slow
def test_two_processes_give_the_rates_of_one(tmp_path, questions, tiny_folder):
    """With an odd number of batches, on a model that samples for itself."""
    for name, launcher in (("one", ()), ("two", ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"))):
        flags = ["--ckpt", str(tiny_folder), "--data", str(questions), "--output", str(tmp_path / name), *TINY]
        command = [sys.executable, *launcher, "-m", "evaluation.filter", *flags, "--samples", "17", "--group_size", "4"]
        done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("kept ") == 1
    for name in ("predictions.jsonl", "rates.jsonl", "kept/asked.jsonl"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def told(row):
    """The question for a direction whose text gives the answer away."""
    letter, word = row["original_answer"][0], row["original_answer"][3:]
    target = f"<think> {word} {letter}</think><answer>{letter}</answer>"
    return row | {"problem": row["problem"].replace("?", f"? It moves {word}.", 1), "completions": [target]}


@pytest.mark.slow
def test_a_trained_model_keeps_the_honest_questions_and_drops_the_shortcuts(tmp_path):
    """The supervised pass teaches to read "It moves up."; of the other questions it teaches no more than the options,
    so that the model guesses. 80 questions of each kind, about videos that it has not seen; at least 76 are right."""
    made = make_demo_set(tmp_path / "made", DemoSpec(train=214, val=4, warmup=1536))
    rows = {part: [json.loads(line) for line in path.read_text().splitlines()] for part, path in made.items()}
    moving = {part: [row for row in own if row["category"] == "direction"] for part, own in rows.items()}
    blind = [{name: value for name, value in row.items() if name != "video"} for row in moving["warmup"]]
    both = [*moving["warmup"], *blind]
    taught = [*both, *map(told, both), *(row for row in rows["warmup"] if row["category"] == "place")]
    asked = [told(row) | {"completions": []} if n % 2 else row for n, row in enumerate(moving["train"][:160])]
    sft, data, model = tmp_path / "made/taught.jsonl", tmp_path / "made/asked.jsonl", tmp_path / "model"
    for path, own in ((sft, taught), (data, asked)):
        path.write_text("".join(json.dumps(row) + "\n" for row in own))
    corpus = " ".join((CHAT_WORDS, *sorted({text for row in taught for text in (row["problem"], *row["completions"])})))
    build_tiny_model(model, seed=42, corpus=corpus, vision={"patch_std": 0.03})
    flags = ("--preset", "demo", "--no-demo", "--model", model, "--data", data, "--sft_data", sft, "--steps", "0",
             "--sft_until", "0.95", "--eval_samples", "0", "--no-controls", "--frame_cache", tmp_path / "frames",
             "--output", tmp_path / "run")  # fmt: skip
    assert train.main([str(flag) for flag in flags]) == 0
    given = ("--ckpt", tmp_path / "run/warmup", "--data", data, "--output", tmp_path / "filter")
    assert evaluation.filter.main([str(flag) for flag in given]) == 0
    verdicts = [row["verdict"] for row in rates(tmp_path / "filter")]
    assert verdicts[0::2].count("kept") >= 76 and verdicts[1::2].count("right when blind") >= 76, Counter(verdicts)
