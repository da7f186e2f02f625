"""What there is to look at: report.html in a browser, frames put together again, a step's completions, curves."""

import base64
import hashlib
import http.server
import json
import re
import shutil
import subprocess
import threading
from contextlib import closing
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from video_helpers import SMALL, make_video

from demo.tiny import build_tiny_model
from evaluation import plot
from evaluation.report import evaluation_table, summary_of, summary_table, verdict, write_report
from evaluation.significance import paired, with_intervals
from grpo.batch import RolloutGroup
from grpo.engine.evaluate import CONTROLS, NO_VIDEO, summarise, wilson
from grpo.run.log import RunLog, completions_table, describe_groups, describe_usage, rollout_rows
from video.dataset import Sample
from video.frames import read_image, read_video
from video.loader import PromptLoader
from video.pictures import frames_of, strip
from video.prompt import PromptEncoder

EVIL = "<script>document.title = 'broken'; fetch('/leak')</script><img src='/leak.png' onerror='fetch(`/leak2`)'>"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return PromptEncoder(build_tiny_model(tmp_path_factory.mktemp("tiny") / "model"), SMALL, "{problem}")


def record(key, category, completion, prediction, score):
    return {
        "key": key, "category": category, "completion": completion, "prediction": prediction, "score": score,
        "opposite": None,
    }  # fmt: skip


@pytest.fixture(scope="module")
def report(tmp_path_factory, encoder):
    """report.html of six questions about two videos, a missing one among them, with markup in everything a model or a
    row can hold; and of two columns."""
    folder = tmp_path_factory.mktemp("report")
    videos = [make_video(folder / f"{i}.mp4", seed=i) for i in range(2)] + [str(folder / "gone.mp4")]
    categories = ("colour", "colour", "shape", "shape", 'a "kind" & <b>', "colour")
    samples = [
        Sample(f"rows.jsonl:{i}", f"What? {EVIL}", "B", (videos[i // 2],), options=(f"A. {EVIL}", "B. red"))
        for i in range(6)
    ]
    rows = [
        record("rows.jsonl:0", categories[0], "<think>so</think><answer>B</answer>", "B", 1.0),
        record("rows.jsonl:1", categories[1], f"<think>{EVIL}</think><answer>{EVIL}</answer>", EVIL, 0.0),
        record("rows.jsonl:2", categories[2], EVIL, None, 0.0),
        record("rows.jsonl:3", categories[3], "<answer>A", "A", 0.0),
        record("rows.jsonl:4", categories[4], "<answer>0.7", "0.7", 0.7),
        {"key": "rows.jsonl:5", "skipped": f"{EVIL}: no such file"},
    ]
    columns = {"think": rows, f"against {EVIL}": rows}
    result = {
        "results": {name: with_intervals(summarise(column), column) for name, column in columns.items()},
        "paired": {"think": paired(rows, rows)},
    }
    picture = folder / "curve.png"
    Image.new("RGB", (8, 8)).save(picture)
    questions = [(sample, dict.fromkeys(columns, row)) for sample, row in zip(samples, rows)]
    with PromptLoader(encoder, workers=0) as loader:
        return write_report(folder / "report.html", f"title {EVIL}", result, questions, loader, 100, picture)


def browse(url, folder):
    """The page's DOM after its scripts ran, in a headless Chromium; skips where there is none."""
    browser = next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )
    if browser is None:
        pytest.skip("no Chromium here: `apt-get install chromium`, and the report is opened in it")
    quiet = ("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync")
    sandbox = (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        f"--user-data-dir={folder}/profile",
    )
    command = [browser, *sandbox, *quiet, "--virtual-time-budget=2000", "--dump-dom", url]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=120).stdout


@pytest.fixture(scope="module")
def served(report):
    """(address of the report, list of the paths that a browser asked for)."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(report.parent))

        def log_message(self, *_):
            asked.append(self.path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/report.html", asked
    server.shutdown()


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ("", {0, 1, 2, 3, 4, 5}),
        ("verdict=right", {0}),
        ("verdict=wrong", {1, 2, 3}),
        ("verdict=unparsed", {2}),
        ("verdict=partly", {4}),
        ("verdict=unreadable", {5}),
        ("category=colour", {0, 1}),
        ("category=shape&verdict=unparsed", {2}),
        ("category=a+%22kind%22+%26+%3Cb%3E", {4}),
    ],
)
def test_filters_in_a_browser(served, tmp_path, filters, expected):
    dom = browse(f"{served[0]}#{filters}", tmp_path)
    cards = re.findall(r"<article([^>]*)><small>rows\.jsonl:(\d)", dom)
    assert len(cards) == 6, dom[:2000]
    assert {int(number) for attributes, number in cards if "hidden" not in attributes} == expected
    assert f'<span id="shown">{len(expected)} of 6</span>' in dom


def test_nothing_leaves_the_page_and_markup_shows_as_text(served, tmp_path):
    address, asked = served
    dom = browse(address, tmp_path)
    assert "<title>title &lt;script&gt;" in dom, "a script in a completion changed the page's title"
    assert set(asked) <= {'"GET /report.html HTTP/1.1"', "/report.html", "/favicon.ico"}, asked
    assert dom.count("&lt;script&gt;document.title") >= 10
    assert len(re.findall("<script", dom)) == 1
    pictures = re.findall(r'<img data-strip="\d+" alt="frames" src="data:image/webp;base64,', dom)
    assert len(pictures) == 4, "four questions have a readable video"
    references = re.findall(r"""<\w[^>]*?\s(?:src|href)=["']?([^\s"'>]+)""", dom)
    assert len(references) == 5, "four strips and the curve"
    assert all(reference.startswith("data:image/") for reference in references)


def test_the_file_needs_no_network_and_holds_each_video_once(report):
    page = report.read_text()
    assert page.count("data:image/webp") == 2
    assert page.count("<script") == 1
    assert "http" not in re.sub(r"http-equiv|base64,[\w+/=]+", "", page)
    assert len(re.findall("<(?:img|script|b|i|u)[ >]", page)) == 4 + 1 + 1 + 3 * 5, "markup of a text is not escaped"
    script = re.search("<script>(.*)</script>", page, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'\"" in page
    assert verdict({"prediction": None, "score": 0.0}) == "wrong unparsed"


def test_frames_are_those_that_the_model_saw(tmp_path, encoder):
    path = make_video(tmp_path / "v.mp4", frames=20, height=40, width=60)
    Image.effect_noise((50, 70), 90).convert("RGB").save(tmp_path / "i.png")
    prompt = encoder(Sample("k", "Q?", "A", (path,), (str(tmp_path / "i.png"),)))
    video, image = frames_of(prompt, encoder.processor)
    expected, _ = read_video(path, SMALL, encoder.factor)
    assert torch.equal(video, expected)
    assert torch.equal(image[0], read_image(str(tmp_path / "i.png"), SMALL, encoder.factor))
    assert strip(video).shape == (3, expected.shape[2], 8 * expected.shape[3])


def test_completions_of_a_step_with_frames_for_tensorboard(tmp_path, encoder):
    prompt = encoder(Sample("k", "Q | <b>?", "A", (make_video(tmp_path / "v.mp4"),)))
    group = RolloutGroup(prompt, [], [], ["<think>a|b\nc</think>", "x"], [True, True], rewards=[1.0, 0.5],
                         parts={"accuracy": [1.0, 0.0]}, advantages=[0.7, -0.7])  # fmt: skip
    shown = []
    log = RunLog(tmp_path / "run", keep=lambda phase, step: True)
    log.board.close()
    log.board = SimpleNamespace(
        add_image=lambda name, image, step: shown.append((name, tuple(image.shape), step)),
        add_text=lambda name, text, step: shown.append((name, text, step)),
    )
    log.show_groups(7, [group] * 3, encoder.processor)
    assert [(name, step) for name, _, step in shown] == [
        ("rollouts/0", 7), ("rollouts/0", 7), ("rollouts/1", 7), ("rollouts/1", 7)
    ]  # fmt: skip
    assert shown[0][1] == (3, 28, 8 * 28)
    assert completions_table(group).splitlines() == [
        "Q &#124; &lt;b&gt;? (answer: A)",
        "",
        "| reward | advantage | accuracy | completion |",
        "|---|---|---|---|",
        "| 1 | 0.7 | 1 | &lt;think&gt;a&#124;b c&lt;/think&gt; |",
        "| 0.5 | -0.7 | 0 | x |",
    ]


def scored(kind, accuracies):
    """A group of one token a completion, all of which answer A."""
    prompt = SimpleNamespace(sample=Sample("k", "Q?", "A", meta={"category": kind}))
    texts = ["<answer>A</answer>"] * len(accuracies)
    return RolloutGroup(prompt, [[7]] * len(texts), [], texts, [True] * len(texts), rewards=accuracies,
                        parts={"accuracy": accuracies})  # fmt: skip


def test_a_step_has_accuracy_by_category_and_pass_at_k():
    groups = [scored("x", [1.0, 0.0, 0.0, 0.0]), scored("y", [1.0, 1.0, 1.0, 1.0]), scored("x", [0.0, 0.0, 1.0, 1.0])]
    metrics = describe_groups(groups)
    assert metrics["accuracy"] == pytest.approx(7 / 12)
    assert (metrics["accuracy_x"], metrics["accuracy_y"]) == (3 / 8, 1.0)
    assert metrics["pass@2"] == pytest.approx((1 / 2 + 1 + 5 / 6) / 3) and metrics["pass@4"] == 1.0
    assert not {"pass@1", "pass@3", "pass@8"} & metrics.keys()
    for group in groups:
        group.parts = {}
    assert not [name for name in describe_groups(groups) if name.startswith(("accuracy", "pass@"))], "nobody measured"
    usage = describe_usage(groups, 2.0, torch.device("cpu"))
    assert usage["tokens_per_second"] == 12 / 2 and 0.05 < usage["peak_memory_gib"] < 1000


def test_an_evaluation_is_printed_with_its_interval_and_by_category(tmp_path, capsys):
    rows = [record(f"x{i}", "x", "", "A", float(i < 8)) for i in range(10)] + [record("y", "y", "", "A", 0.0)]
    with closing(RunLog(tmp_path / "run", keep=lambda phase, step: True)) as log:
        log.evaluation(3, summarise(rows, {"x"}), {NO_VIDEO: summarise(rows[:5], {"x"})})
    assert capsys.readouterr().out == (
        "step 3: held-out accuracy 80.0% (49.0-94.3%) of the categories trained on, 72.7% of all 11 questions; "
        "0 unreadable; x 80.0%, y 0.0%; blind gap -20.0%\n"
    )
    [row] = map(json.loads, open(tmp_path / "run/metrics.jsonl"))
    assert row == {"phase": "eval", "step": 3, "accuracy": 0.8, "accuracy_overall": pytest.approx(8 / 11),
                   "interval_low": wilson(0.8, 10)[0], "interval_high": wilson(0.8, 10)[1],
                   "accuracy_x": 0.8, "accuracy_y": 0.0, "unparsed": 0.0, "blind_gap": pytest.approx(-0.2)}  # fmt: skip


def test_a_row_of_rollouts_has_the_question_its_files_and_each_completion():
    sample = Sample("rows.jsonl:3", "Q?\nA. x", "A", ("v.mp4",), slot=5)
    group = RolloutGroup(SimpleNamespace(sample=sample), [[7, 8], [9]], [], ["a", "b"], [True, False],
                         rewards=[1.5, 0.0], parts={"accuracy": [1.0, 0.0], "format": [1.0, 0.0]},
                         logs={"judge/n": [3, 4]}, advantages=torch.tensor([0.5, -0.5]))  # fmt: skip
    expected = {
        "step": 4, "slot": 5, "key": "rows.jsonl:3", "problem": "Q?\nA. x", "videos": ("v.mp4",), "images": (),
        "answer": "A", "completions": ["a", "b"], "lengths": [2, 1], "rewards": [1.5, 0.0],
        "parts": {"accuracy": [1.0, 0.0], "format": [1.0, 0.0]}, "logs": {"judge/n": [3, 4]}, "advantages": [0.5, -0.5],
    }  # fmt: skip
    assert rollout_rows(4, [group]) == [expected]
    group.advantages = None
    assert rollout_rows(4, [group]) == [{**expected, "advantages": None}]


def test_the_table_of_an_evaluation():
    rows = [record("a", "x", "", "A", 1.0), record("b", "x", "", None, 0.0), {"key": "c", "skipped": "bad"}]
    rows += [record(f"y{i}", "y", "", "A", float(i < 8)) for i in range(10)]
    others = [record("a", "x", "", "A", 0.0), record("b", "x", "", "B", 0.0)]
    others += [record(f"y{i}", "y", "", "A", float(i in (0, 9))) for i in range(10)]
    results = {
        "think": with_intervals(summarise(rows), rows),
        "think against": with_intervals(summarise(others), others),
    }
    lines = evaluation_table({"results": results, "paired": {"think": paired(rows, others)}}).splitlines()
    assert lines[0].strip().split("  ") == ["think", "think against"]
    assert [line.split() for line in lines[1:4]] == [
        ["x", "50.0%", "0.0%"], ["y", "80.0%", "20.0%"], ["all", "75.0%", "16.7%"]
    ]  # fmt: skip
    intervals = lines[lines.index("95% intervals") + 2 :]
    assert intervals[1].split() == ["y", "49.0-94.3%", "5.7-51.0%"]
    assert intervals[2].split()[0] == "all"
    # Exact tests by hand: one gain, 2 / 2; seven gains and a loss, 2 (1 + 8) / 256; eight and one, 2 (1 + 9) / 512.
    assert [" ".join(line.split()) for line in lines[-5:]] == [
        "think, against the other checkpoint:",
        "x +50.0% of 2 questions (1 better, 0 worse, exact McNemar p = 1)",
        "y +60.0% of 10 questions (7 better, 1 worse, exact McNemar p = 0.07)",
        "all +58.3% of 12 questions (8 better, 1 worse, exact McNemar p = 0.039)",
        "12 questions; 1 unreadable, counted neither way",
    ]


def test_the_table_that_closes_a_run_names_controls_as_eval_does():
    rows = [record("a", "x", "", "A", 1.0), record("b", "x", "", None, 0.0)]
    controls = {control: summarise(rows[:1]) for control in CONTROLS}
    summary = summary_of(with_intervals(summarise(rows), rows), summarise(rows[:1]), controls, seconds=1.0)
    head, category, *_ = summary_table(summary).splitlines()
    assert " ".join(head.split()) == "before after shuffled reversed blank no video"
    assert category.split() == ["x", "50.0%", *["100.0%"] * 5]
    assert summary["accuracy_no_video"] == 1.0


def test_a_run_without_held_out_questions_closes_with_no_table():
    assert summary_table(summary_of({}, {}, {}, seconds=1.0)) == ""


def make_run(folder, steps):
    folder.mkdir()
    rows = [{"phase": "eval", "step": 0, "accuracy": 0.25}, {"phase": "eval", "step": 1, "other": 1.0}]
    rows += [{"phase": "eval", "step": 2, "accuracy": 0.5, "interval_low": 0.25, "interval_high": 0.75}]
    for step in range(steps):
        row = {"reward": step / 10, "accuracy": 0.5, "kl": 0.01, "length": 11.0, "entropy": 0.2, "clip_low_frac": 0.01,
               "clip_high_frac": 0.02, "sampler_logprob_diff": 1e-7, "letter_A": 0.75,
               "seconds_waiting": 0.1}  # fmt: skip
        rows.append({"phase": "train", "step": step, **row, **({"letter_B": 0.25} if step % 2 else {})})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"phase": "tr')
    return folder


def test_the_curve_has_the_gaps_if_they_were_measured(tmp_path, monkeypatch):
    labels = []
    monkeypatch.setattr(
        "matplotlib.axes.Axes.plot", lambda *given, label=None, **_: labels.append((label, *given[1:3]))
    )
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: None)
    folder = make_run(tmp_path / "run", 2)
    plot.plot_run(folder)
    assert not [label for label, *_ in labels if label and "gap" in label]
    rows = [{"phase": "eval", "step": 0, "accuracy": 0.5, "blind_gap": 0.25, "order_gap": 0.1}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plot.plot_run(folder)
    assert ("training, blind gap", [0], [0.25]) in labels and ("training, order gap", [0], [0.1]) in labels


def test_curves_of_one_run_and_of_several(tmp_path, capsys):
    runs = [make_run(tmp_path / "a", 5), make_run(tmp_path / "b", 3)]
    with Image.open(plot.plot_run(runs[0])) as one:
        assert one.format == "PNG"
    plot.main([*map(str, runs), "--output", str(tmp_path / "both.png")])
    with Image.open(tmp_path / "both.png") as both:
        assert min(both.size) > 500
    with pytest.raises(SystemExit, match="2"):
        plot.main([str(tmp_path)])
    assert "has no metrics.jsonl" in capsys.readouterr().err
    train = plot.read_metrics(runs[0], "train")
    assert len(train) == 5
    values = {title: plot.curve(train, metric) for title, metric in plot.PANELS.items()}
    assert values["clip share"] == (list(range(5)), pytest.approx([0.03] * 5))
    assert values["answer letters"][1] == [0.75] * 5
    assert plot.curve(train, "letter_B", 0.0)[1] == [0.0, 0.25, 0.0, 0.25, 0.0]
    assert plot.curve(train, "letter_B")[0] == [1, 3]
    make_run(tmp_path / "empty", 0)
    plot.plot_run(tmp_path / "empty")


def test_a_metric_that_no_run_measured_has_no_panel(tmp_path, monkeypatch):
    rows = [{"phase": "train", "step": step, "reward": 1.0, "length": 3.0} for step in range(2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    titles = []
    monkeypatch.setattr("matplotlib.axes.Axes.set_title", lambda _, title: titles.append(title))
    plot.plot_run(tmp_path)
    assert titles == ["reward", "completion length", "clip share"]


def test_a_run_without_a_step_has_empty_panels(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    with Image.open(plot.plot_run(tmp_path)) as picture:
        assert picture.format == "PNG"
