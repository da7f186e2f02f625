"""eval.py from its command line on tiny models and mp4 files: numbers, controls, resuming, processes, errors."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ONE_FAST, killed_while_saving, load_model
from processes import full_disk, held
from transformers import AutoProcessor

import eval as eval_script
import grpo.engine.evaluate
from demo.synthetic import DemoSpec, make_demo_set
from demo.tiny import build_tiny_model
from evaluation.predictions import Predictions
from evaluation.significance import mcnemar, paired, with_intervals
from grpo.config import Config, ConfigError, save_config
from grpo.engine.evaluate import NO_VIDEO, EvalSettings, encode, plan, predict, summarise, wilson
from grpo.engine.model import model_spec
from grpo.engine.model_files import model_identity
from grpo.policy import Policy
from grpo.run.data import digest, draw, split_data
from grpo.sampler import SamplingSettings
from video.dataset import Sample, read_samples
from video.frames import VideoSettings
from video.loader import PromptLoader
from video.prompt import PromptEncoder, Skipped

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
TINY = ("--nframes", "4", "--min_pixels", "784", "--max_pixels", "784", "--max_new_tokens", "8", "--threads", "1",
        "--device", "cpu", "--prompt_template", "{problem}")  # fmt: skip


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """val.jsonl: several questions about each of 12 videos."""
    return make_demo_set(tmp_path_factory.mktemp("demo"), DemoSpec(train=4, val=12, warmup=4))["val"]


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    """A tiny checkpoint, loaded by the parts that the tests of this file call themselves."""
    return build_tiny_model(tmp_path_factory.mktemp("tiny") / "model", seed=3)


@pytest.fixture
def parts(tiny_folder):
    """(policy, loader, tokenizer) of the tiny checkpoint, decoding in this process."""
    tokenizer = AutoProcessor.from_pretrained(tiny_folder).tokenizer
    model = load_model(tiny_folder)
    settings = VideoSettings(nframes=4, min_pixels=784, max_pixels=784)
    encoder = PromptEncoder(tiny_folder, settings, "{problem}")
    return Policy(model, model_spec(model, tokenizer)), PromptLoader(encoder, workers=0), tokenizer


def greedy(count):
    return SamplingSettings(temperature=0.0, max_new_tokens=count)


def run(ckpt, output, *flags):
    """eval.main in this process; (exit code, results.json or None)."""
    code = eval_script.main(["--ckpt", str(ckpt), "--output", str(output), "--workers", "0", *TINY, *flags])
    path = Path(output) / "results.json"
    return code, json.loads(path.read_text()) if path.exists() else None


def answers(folder):
    """The lines of predictions.jsonl."""
    return [json.loads(line) for line in (Path(folder) / "predictions.jsonl").read_text().splitlines()]


def script(monkeypatch, completions):
    """Makes the model say completions[sample key]; what is around it stays."""

    def say(policy, prompts, *_):
        return [SimpleNamespace(texts=[completions[p.sample.key]]) for p in prompts]

    monkeypatch.setattr(grpo.engine.evaluate, "generate", say)


def test_wilson_and_mcnemar_against_literal_numbers():
    assert wilson(0.8, 10) == pytest.approx([0.490162, 0.943318], abs=1e-6)
    assert wilson(0.0, 20) == pytest.approx([0.0, 0.161125], abs=1e-6)
    assert wilson(1.0, 5) == pytest.approx([0.565518, 1.0], abs=1e-6)
    for end in wilson(0.977, 256):  # Wilson's own definition: the shares from which 0.977 is 1.96 standard errors away
        assert abs(0.977 - end) == pytest.approx(1.959964 * (end * (1 - end) / 256) ** 0.5, rel=1e-6)
    assert wilson(0.0, 0) == [0.0, 1.0]
    assert mcnemar(1, 7) == mcnemar(7, 1) == 18 / 256
    assert mcnemar(0, 5) == 0.0625
    assert mcnemar(10, 2) == pytest.approx(0.03857421875, abs=1e-15)
    assert mcnemar(3, 3) == mcnemar(0, 0) == 1.0
    assert 0 < mcnemar(2000, 1500) < 1e-16


def test_summary_counts_the_unparsed_as_wrong_and_the_unreadable_not_at_all():
    row = lambda key, category, prediction, score: {
        "key": key, "category": category, "prediction": prediction, "score": score, "opposite": None
    }  # fmt: skip
    records = [
        row("a", "x", "A", 1.0),
        row("b", "x", None, 0.0),
        row("c", "y", "7", 0.4),
        {"key": "d", "skipped": "bad"},
    ]
    summary = with_intervals(summarise(records), records)
    assert summary["overall"] == pytest.approx(1.4 / 3)
    assert summary["categories"] == {"x": 0.5, "y": 0.4}
    assert (summary["count"], summary["skipped"], summary["counts"]) == (3, 1, {"x": 2, "y": 1})
    assert summary["unparsed"] == pytest.approx(1 / 3)
    assert summary["intervals"]["x"] == wilson(0.5, 2)
    assert summary["trained_interval"] == pytest.approx(wilson(1.4 / 3, 3))
    assert summarise(records, {"x"})["trained_interval"] == wilson(0.5, 2)
    other = [row("a", "x", "B", 0.0), row("b", "x", "A", 1.0), row("d", "y", "A", 1.0), row("c", "y", "7", 0.0)]
    gain = paired(records, other)
    categories = gain.pop("categories")
    assert gain == {"difference": pytest.approx(0.4 / 3), "better": 2, "worse": 1, "p": 1.0, "count": 3}
    assert categories == {
        "x": {"difference": 0.0, "better": 1, "worse": 1, "p": 1.0, "count": 2},
        "y": {"difference": pytest.approx(0.4), "better": 1, "worse": 0, "p": 1.0, "count": 1},
    }


def test_accuracy_is_of_the_categories_trained_on_or_of_all_if_none_was_asked():
    row = {"opposite": None, "prediction": "A"}
    rows = [{"category": "a", "score": 1.0, **row}, {"category": "b", "score": 0.0, **row}]
    assert summarise(rows, {"a", "c"})["trained"] == 1.0
    assert summarise(rows, {"c"})["trained"] == summarise(rows)["trained"] == summarise(rows)["overall"] == 0.5


def test_questions_about_one_video_share_its_frames_and_vision_pass(parts, demo, monkeypatch):
    policy, loader, tokenizer = parts
    about = {}
    for sample in read_samples(demo):
        about.setdefault(sample.videos, []).append(sample)
    samples = [sample for questions in about.values() if len(questions) == 3 for sample in questions][:9]
    alone = predict(policy, loader, samples, tokenizer, EvalSettings(greedy(8), 1))
    decoded, passes, encoder, tower = [], [], loader.encoder, policy.vision_features
    monkeypatch.setattr(
        loader, "encoder", lambda sample, control: decoded.append(sample.key) or encoder(sample, control)
    )
    for name in ("text", "text_ids", "expand", "planned_tokens"):
        setattr(loader.encoder, name, getattr(encoder, name))
    monkeypatch.setattr(
        policy, "vision_features", lambda packed, keep=True: passes.append(len(packed.grids)) or tower(packed)
    )
    together = predict(policy, loader, samples, tokenizer, EvalSettings(greedy(8), 6))
    assert together == alone, "an answer depends on what it was decoded with"
    assert len(decoded) == 3, f"3 videos, decoded {len(decoded)} times"
    assert passes == [2, 1], f"vision passes over {passes} videos, where the batches have 2 and 1 distinct ones"


def test_a_question_at_fault_takes_no_other_question_about_its_video_down(parts, demo):
    good, *_ = read_samples(demo)
    bad = Sample("bad", "hi <|im_end|>", "A", good.videos)
    missing = [Sample(f"gone:{i}", "Q?", "A", ("gone.mp4",)) for i in range(2)]
    samples = [bad, good, *missing]
    encoded = {
        (p.key if isinstance(p, Skipped) else p.sample.key): p
        for batch in encode(parts[1], plan(samples, parts[1].encoder, 4), None)
        for p in batch
    }
    assert isinstance(encoded["bad"], Skipped)
    assert len(encoded[good.key].input_ids) > 0
    assert all("no such file" in encoded[s.key].reason for s in missing)


def test_controls_change_the_video_and_no_video_leaves_it_out(parts, demo, monkeypatch):
    policy, loader, tokenizer = parts
    seen = {}

    def look(policy, prompts, *_):
        for p in prompts:
            seen[p.sample.key] = (p.pixel_values_videos, int((p.input_ids == policy.spec.video_token_id).sum()))
        return [SimpleNamespace(texts=[""]) for _ in prompts]

    monkeypatch.setattr(grpo.engine.evaluate, "generate", look)
    samples = read_samples(demo)[:3]
    pixels = {}
    for control in (None, "reversed", "blank", NO_VIDEO):
        predict(policy, loader, samples, tokenizer, EvalSettings(greedy(8), 4, control=control))
        pixels[control], placeholders = seen[samples[0].key]
        assert placeholders == (0 if control == NO_VIDEO else 2)
    assert pixels[NO_VIDEO] is None
    assert not torch.equal(pixels[None], pixels["reversed"])
    assert len(pixels["blank"].unique()) <= 3


@pytest.mark.parametrize("family", ONE_FAST)
def test_a_whole_evaluation_with_modes_controls_and_another_checkpoint(tmp_path, demo, checkpoints, worlds, family):
    flags = ("--data", str(demo), "--samples", "9", "--eval_batch", "4", "--mode", "both", "--controls")
    tiny_folder = worlds[family][1][False]
    code, result = run(tiny_folder, tmp_path / "out", *flags, "--against", str(checkpoints[family]))
    assert code == 0
    assert list(result["results"]) == [
        *("think", "think shuffled", "think reversed", "think blank", "think no video"),
        *("direct", "direct shuffled", "direct reversed", "direct blank", "direct no video"),
        *("think against", "direct against"),
    ]
    assert all(summary["count"] == 9 for summary in result["results"].values())
    assert set(result["paired"]) == {"think", "direct"}
    assert len(answers(tmp_path / "out")) == 9 * 12
    assert (tmp_path / "out/report.html").stat().st_size > 5000
    before = (tmp_path / "out/predictions.jsonl").read_bytes()
    assert run(tiny_folder, tmp_path / "out", *flags)[0] == 0, "a finished evaluation may be asked for again, with less"
    assert (tmp_path / "out/predictions.jsonl").read_bytes() == before


def test_evaluation_gives_what_training_logged(tmp_path, demo, tiny_folder, parts):
    policy, loader, tokenizer = parts
    config = Config(
        data=str(demo), eval_data=str(demo), eval_samples=20, nframes=4, min_pixels=784, max_pixels=784,
        max_new_tokens=8, prompt_template="{problem}", eval_batch=8, workers=0,
    )  # fmt: skip
    save_config(config, tiny_folder / "run.json")
    try:
        records = predict(policy, loader, draw(read_samples(demo), 20), tokenizer, EvalSettings(greedy(8), 8))
        code = eval_script.main(["--ckpt", str(tiny_folder), "--output", str(tmp_path), "--device", "cpu"])
    finally:
        (tiny_folder / "run.json").unlink()
    assert code == 0
    assert json.loads((tmp_path / "results.json").read_text())["results"]["think"] == with_intervals(
        summarise(records), records
    )


def test_a_draw_is_over_the_whole_file_and_the_same_for_every_checkpoint(demo):
    samples = read_samples(demo)
    drawn = draw(samples, 12)
    assert drawn == sorted(drawn, key=samples.index)
    assert len(samples) == 24 and max(map(samples.index, drawn)) >= 12, "these are the first 12"
    assert drawn == draw(samples, 12) and {s.key for s in draw(samples, 5)} < {s.key for s in drawn}
    assert draw(samples, 1000) == samples
    arguments = SimpleNamespace(benchmark=None, data=str(demo), video_root=None, samples=12)
    assert eval_script.find_samples(None, Config(seed=7), arguments) == drawn
    held_out = split_data(Config(data=(str(demo),), eval_data=str(demo), eval_samples=12, seed=1), print)[1]
    assert held_out == drawn


def test_a_digest_is_of_what_rows_say_and_not_of_where_files_lie(demo):
    sample, other = read_samples(demo)[:2]
    moved = dataclasses.replace(sample, videos=(f"/elsewhere/{Path(sample.videos[0]).name}",))
    assert digest([sample, other]) == digest([moved, other]) != digest([other, sample])
    for change in ({"problem": "?"}, {"answer": "Z"}, {"videos": ("/elsewhere/z.mp4",)}, {"meta": {"note": "\ud83d"}}):
        assert digest([sample]) != digest([dataclasses.replace(sample, **change)])
    assert digest([sample, other]).startswith("2 rows, digest ")


def test_a_runs_own_questions_are_found_under_another_video_root(tmp_path, demo):
    save_config(Config(), tmp_path / "run.json")
    config = Config(data=(str(demo),), eval_samples=3, video_root="/gone")
    arguments = SimpleNamespace(benchmark=None, data=None, video_root=str(demo.parent), samples=None, ckpt="RUN")
    samples = eval_script.find_samples(tmp_path, config, arguments)
    assert len(samples) == 3 and all(Path(path).is_file() for sample in samples for path in sample.videos)


@pytest.mark.parametrize("held", [5, 0])
def test_more_samples_than_a_run_held_out_are_none_it_was_trained_on(tmp_path, demo, held):
    save_config(Config(), tmp_path / "run.json")
    config = Config(data=(str(demo),), eval_samples=held)
    arguments = SimpleNamespace(benchmark=None, data=None, video_root=None, samples=12, ckpt="RUN/checkpoint-1")
    if not held:
        with pytest.raises(ConfigError, match="its run held out no questions; give --data FILE"):
            eval_script.find_samples(tmp_path, config, arguments)
        return
    assert len(eval_script.find_samples(tmp_path, config, arguments)) == held


def test_questions_held_out_of_data_that_has_changed_since_are_refused(tmp_path, demo):
    """One row more and other questions would be drawn: ones that the run was trained on."""
    checkpoint = tmp_path / "run" / "checkpoint-1"
    checkpoint.mkdir(parents=True)
    save_config(Config(), checkpoint / "run.json")
    data = tmp_path / "rows.jsonl"
    data.write_text(demo.read_text())
    config = Config(data=(str(data),), eval_samples=6, video_root=str(demo.parent))
    arguments = SimpleNamespace(benchmark=None, data=None, video_root=None, samples=4, ckpt="RUN/checkpoint-1")
    held_out = eval_script.held_out_samples(checkpoint, config, arguments)
    (checkpoint.parent / "versions.json").write_text(json.dumps({"data": {"held out": digest(held_out)}}))
    assert len(eval_script.find_samples(checkpoint, config, arguments)) == 4
    data.write_text(demo.read_text() + demo.read_text().splitlines()[0] + "\n")
    with pytest.raises(ConfigError, match="its run held out 6 rows, digest .* has changed since.*give --data FILE"):
        eval_script.find_samples(checkpoint, config, arguments)
    config = dataclasses.replace(config, eval_data=str(data))
    assert len(eval_script.find_samples(checkpoint, config, arguments)) == 4, "a file of their own is never trained on"


def test_unreadable_videos_are_reported_apart(tmp_path, demo, tiny_folder):
    rows = [json.loads(line) for line in demo.read_text().splitlines()[:6]]
    rows = [{**row, "video": str(demo.parent / row["video"])} for row in rows]
    rows[4]["video"] = str(tmp_path / "gone.mp4")
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, result = run(tiny_folder, tmp_path / "out", "--data", str(data))
    summary = result["results"]["think"]
    assert (code, summary["count"], summary["skipped"]) == (0, 5, 1)
    assert "gone.mp4: no such file" in next(row["skipped"] for row in answers(tmp_path / "out") if "skipped" in row)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--ckpt", "no/such/folder/at/all"), "--ckpt no/such/folder/at/all: no such folder"),
        (("--ckpt", "EMPTY"), "has no config.json"),
        (("--ckpt", "TINY"), "give --data or --benchmark"),
        (("--ckpt", "TINY", "--data", "none.jsonl"), "--data none.jsonl: no such file"),
        (("--ckpt", "TINY", "--data", "DATA", "--temperature", "-1"), "--temperature -1.0: must be at least 0"),
        (("--ckpt", "TINY", "--data", "DATA", "--temperature", "inf"), "--temperature inf: must be at least 0"),
        (("--ckpt", "TINY", "--data", "DATA", "--temperature", "nan"), "--temperature nan: must be at least 0"),
        (("--ckpt", "TINY", "--data", "DATA", "--max_frames", "1"), "--max_frames"),
        (("--ckpt", "TINY", "--benchmark", "mvbench"), "--benchmark needs --benchmark_dir"),
        (("--ckpt", "TINY", "--benchmark", "mvbench", "--benchmark_dir", "EMPTY"), "hf download OpenGVLab/MVBench"),
        (("--ckpt", "TINY", "--data", "DATA", "--against", "TINY"), "same weights"),
        (("--ckpt", "TINY", "--benchmark", "imagenet"), "--benchmark"),
    ],
)
def test_wrong_flags_give_one_line_and_exit_code_2(tmp_path, capsys, demo, tiny_folder, flags, says):
    places = {"EMPTY": str(tmp_path), "TINY": str(tiny_folder), "DATA": str(demo)}
    try:
        code = eval_script.main([*(places.get(flag, flag) for flag in flags), "--output", str(tmp_path / "out")])
    except SystemExit as exit:
        code = exit.code
    error = capsys.readouterr().err.strip()
    assert code == 2
    assert says in error
    assert len(error.splitlines()) == 1, error


def test_answers_under_other_settings_are_not_mixed(tmp_path, capsys, demo, tiny_folder):
    assert run(tiny_folder, tmp_path, "--data", str(demo), "--samples", "3")[0] == 0
    assert run(tiny_folder, tmp_path, "--data", str(demo), "--samples", "3", "--max_new_tokens", "9")[0] == 2
    assert "max_new_tokens was 8, is 9" in capsys.readouterr().err


def test_a_line_cut_short_is_dropped_and_weights_are_told_apart(tmp_path, tiny_folder, checkpoints):
    predictions = Predictions(tmp_path, {"fps": 2.0})
    predictions.add(("m", "think", None), [{"key": "a", "score": 1.0}, {"key": "b", "score": 0.0}])
    path = tmp_path / "predictions-0.jsonl"  # as a kill leaves it: not merged
    path.write_text(path.read_text()[:-9])
    again = Predictions(tmp_path, {"fps": 2.0})
    assert again.done == {("m", "think", None): {"a": {"key": "a", "score": 1.0}}}
    again.add(("m", "think", None), [{"key": "b", "score": 0.0}])
    again.merge()
    assert [row["key"] for row in answers(tmp_path)] == ["a", "b"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["predictions.jsonl", "settings.json"]
    with pytest.raises(ConfigError, match="fps was 2.0, is 1.0"):
        Predictions(tmp_path, {"fps": 1.0})
    assert model_identity(tiny_folder) != model_identity(checkpoints["qwen2_vl"])


def test_stopped_at_five_random_batches_and_resumed_gives_the_same_bytes(tmp_path, demo, tiny_folder):
    flags = ("--data", str(demo), "--eval_batch", "2", "--controls", "--report_samples", "0")
    assert run(tiny_folder, tmp_path / "whole", *flags)[0] == 0
    draw = random.Random(0)
    for _ in range(5):
        with killed_while_saving(draw.randrange(3, 12)):
            run(tiny_folder, tmp_path / "parts", *flags)
    assert run(tiny_folder, tmp_path / "parts", *flags)[0] == 0
    for name in ("predictions.jsonl", "results.json"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_damaged_lines_are_left_out_and_their_questions_asked_again(tmp_path, demo, tiny_folder, capsys):
    """By a power loss, which leaves NUL bytes and what is no UTF-8, and by an editor."""
    flags = ("--data", str(demo), "--samples", "5", "--report_samples", "0")
    assert run(tiny_folder, tmp_path, *flags)[0] == 0
    path = tmp_path / "predictions.jsonl"
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    lines[1:4] = [b"\0" * len(lines[1]) + b"\n", b"\xff\xfe" + lines[2], b'{"key": "a"}\n']
    path.write_bytes(b"".join(lines))
    capsys.readouterr()
    assert run(tiny_folder, tmp_path, *flags)[0] == 0
    assert f"{path}: 3 damaged lines are left out" in capsys.readouterr().err
    assert path.read_bytes() == whole


@pytest.mark.parametrize("name", ["settings.json", "predictions-0.jsonl", "results.json", "report.html"])
def test_a_full_disk_ends_an_evaluation_with_one_line_and_it_goes_on(tmp_path, demo, tiny_folder, capsys, name):
    flags = ("--data", str(demo), "--samples", "3")
    with full_disk(name):
        assert run(tiny_folder, tmp_path, *flags)[0] == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert name in error and ": No space left on device; once that is mended, the same command goes on" in error
    assert not list(tmp_path.glob("*.part"))
    assert run(tiny_folder, tmp_path, *flags)[0] == 0 and len(answers(tmp_path)) == 3


@pytest.mark.parametrize("text", ["", "[1]", '{"fps": 2'])
def test_damaged_settings_are_one_line(tmp_path, demo, tiny_folder, capsys, text):
    (tmp_path / "settings.json").write_text(text)
    assert run(tiny_folder, tmp_path, "--data", str(demo), "--samples", "3")[0] == 2
    assert "settings.json is damaged; choose another --output" in capsys.readouterr().err.splitlines()[-1]


def test_an_evaluation_keeps_its_folder_to_itself(tmp_path, demo, tiny_folder, capsys):
    with held(tmp_path) as holder:
        assert run(tiny_folder, tmp_path, "--data", str(demo), "--samples", "3")[0] == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"--output {tmp_path}: process {holder.pid} on " in error and "is writing there" in error
    assert run(tiny_folder, tmp_path, "--data", str(demo), "--samples", "3")[0] == 0, "a SIGKILL leaves no lock behind"


@pytest.mark.parametrize("output", ["/dev/null/a", "x" * 300, "/proc/nowhere"])
def test_an_output_that_cannot_be_written_to_is_one_line(demo, tiny_folder, capsys, output):
    assert eval_script.main(["--ckpt", str(tiny_folder), "--output", output, "--data", str(demo)]) == 2
    error = capsys.readouterr().err.splitlines()
    assert f"--output {output}: cannot be written to (" in error[-1] and "choose another" in error[-1]


def command(tiny_folder, output, demo, *flags, launcher=()):
    own = ["--ckpt", str(tiny_folder), "--output", str(output), "--data", str(demo), "--workers", "1", *TINY, *flags]
    return [sys.executable, *launcher, str(ROOT / "eval.py"), *own]


def written(folder):
    """Bytes of answers in a folder that another process is writing, and merging, to."""
    try:
        return sum(path.stat().st_size for path in folder.glob("*.jsonl"))
    except FileNotFoundError:
        return 0


@pytest.mark.slow
def test_killed_at_five_random_moments_and_resumed_gives_the_same_bytes(tmp_path, demo, tiny_folder):
    flags = ("--eval_batch", "1", "--controls", "--report_samples", "0")
    subprocess.run(command(tiny_folder, tmp_path / "whole", demo, *flags), check=True, cwd=ROOT, capture_output=True)
    size, draw = (tmp_path / "whole/predictions.jsonl").stat().st_size, random.Random(1)
    moments = sorted(draw.uniform(0.05, 0.85) for _ in range(5))
    for moment in moments:
        process = subprocess.Popen(
            command(tiny_folder, tmp_path / "parts", demo, *flags), cwd=ROOT, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        while written(tmp_path / "parts") < moment * size and process.poll() is None:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.02))
        assert process.poll() is None, "it ended before it could be killed"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(command(tiny_folder, tmp_path / "parts", demo, *flags), check=True, cwd=ROOT, capture_output=True)
    for name in ("predictions.jsonl", "results.json"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_an_interrupted_evaluation_ends_with_one_line(tmp_path, demo, tiny_folder, monkeypatch, capsys):
    def interrupt(*_):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Predictions, "add", interrupt)
    assert run(tiny_folder, tmp_path, "--data", str(demo), "--samples", "3")[0] == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith("eval.py: stopped; the same command goes on")


@pytest.mark.slow
def test_two_processes_give_the_answers_of_one(tmp_path, demo, tiny_folder):
    """With an odd number of batches: one process decodes once more than the other, so no forward may be collective."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    for name, launcher in (("one", ()), ("two", torchrun)):
        made = command(tiny_folder, tmp_path / name, demo, "--eval_batch", "7", "--mode", "both", launcher=launcher)
        done = subprocess.run(made, check=False, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    for name in ("predictions.jsonl", "results.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


@pytest.mark.slow
def test_three_times_faster_than_generate_one_sample_at_a_time(tmp_path, tiny_folder, parts):
    """200 questions of the demo, batches of 40, against transformers' own generate in a loop; same greedy settings."""
    torch.set_num_threads(1)
    policy, loader, tokenizer = parts
    data = make_demo_set(tmp_path, DemoSpec(train=4, val=100, warmup=4))["val"]
    samples = read_samples(data)[:200]
    predict(policy, loader, samples[:4], tokenizer, EvalSettings(greedy(24), 4))
    clock = time.perf_counter()
    predict(policy, loader, samples, tokenizer, EvalSettings(greedy(24), 40))
    own = time.perf_counter() - clock

    model = type(policy.model).from_pretrained(tiny_folder, attn_implementation="sdpa")
    clock = time.perf_counter()
    for sample in samples:
        prompt = loader.encoder(sample)
        ids = prompt.input_ids[None]
        model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False,
            pixel_values_videos=prompt.pixel_values_videos, video_grid_thw=prompt.video_grid_thw,
            mm_token_type_ids=2 * (ids == policy.spec.video_token_id).int(),
        )  # fmt: skip
    theirs = time.perf_counter() - clock
    print(f"\n200 questions: {own:.2f} s here, {theirs:.2f} s with generate, {theirs / own:.1f} times")
    assert theirs / own >= 3
