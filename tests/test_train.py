"""The scripts as a user runs them: a whole tiny run, the same seed twice, resume, a reward that rises, bad input."""

import errno
import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES
from processes import full_disk, held
from safetensors.torch import load_file, save_file
from tensorboard.summary.writer.record_writer import RecordWriter

import demo.build
import grpo.run.run
import train
from demo.build import build_demo
from demo.synthetic import DemoSpec, make_demo_set
from evaluation.plot import reward_metrics
from grpo.config import METRICS, METRICS_OF_KINDS, PRESETS, Config, load_config, parse_config, save_config
from grpo.engine.checkpoint import Saver
from grpo.engine.model_files import read_config
from grpo.errors import ConfigError, Stopped
from grpo.run.data import draw_samples, steps_of
from grpo.run.log import describe_run
from video.dataset import Sample
from video.files import append_rows

ROOT = Path(__file__).parent.parent
SHORT = ("--sft_steps", "0", "--eval_samples", "0")
TIMES = ("seconds", "seconds_waiting", "seconds_sampling", "tokens_per_second", "peak_memory_gib")


@pytest.fixture(scope="module")
def demo_set(tmp_path_factory):
    return make_demo_set(tmp_path_factory.mktemp("demo"), DemoSpec(train=24, val=8, warmup=8))


@pytest.fixture
def flags(demo_set, checkpoints, tmp_path):
    """A run of four small steps that takes seconds."""
    return [
        "--preset", "demo", "--no-demo", "--model", str(checkpoints["qwen2_vl"]), "--output", str(tmp_path / "run"),
        "--data", str(demo_set["train"]), "--eval_data", str(demo_set["val"]), "--sft_data", str(demo_set["warmup"]),
        "--sft_steps", "2", "--steps", "4", "--prompts_per_step", "4", "--group_size", "4", "--max_new_tokens", "8",
        "--eval_samples", "6", "--eval_every", "2", "--save_every", "2", "--rollouts_every", "1", "--workers", "0",
    ]  # fmt: skip


def metrics_of(folder):
    rows = [json.loads(line) for line in open(Path(folder) / "metrics.jsonl")]
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def rollouts_of(folder):
    return [json.loads(line) for line in open(Path(folder) / "rollouts.jsonl")]


def run(flags, *more):
    """Runs train.py in this process; later flags override earlier ones."""
    assert train.main([*flags, *more]) == 0
    return Path(flags[flags.index("--output") + 1])


def test_a_run_leaves_everything(flags):
    folder = run(flags)
    names = {p.name for p in folder.iterdir()}
    assert {
        "metrics.jsonl",
        "summary.json",
        "curve.png",
        "run.json",
        "versions.json",
        "checkpoint-4",
        "warmup",
    } <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    phases = [row["phase"] for row in metrics_of(folder)]
    assert phases.count("warmup") == 2 and phases.count("train") == 4 and phases.count("eval") == 3
    summary = json.loads((folder / "summary.json").read_text())
    for name in ("accuracy_before", "accuracy_after", "accuracy_shuffled", "accuracy_blank", "opposite_when_reversed"):
        assert 0 <= summary[name] <= 1
    assert summary["seconds"] > 0 and set(summary["categories"]) <= {"colour", "direction", "place", "shape"}
    first = next(row for row in metrics_of(folder) if row["phase"] == "train")
    assert {"accuracy_direction", "pass@2", "pass@4"} <= first.keys()
    assert 0 <= first["kl"] < 1e-6 and first["sampler_logprob_diff"] < 1e-5


def test_gaps_come_with_every_so_many_evaluations_and_change_nothing_else(flags, monkeypatch, capsys):
    score, asked = {None: 0.75, "no video": 0.5, "shuffled": 0.125}, []

    def scripted(policy, loader, samples, tokenizer, settings, report):
        asked.append(settings.control)
        row = {"category": "direction", "score": score[settings.control], "prediction": "A", "opposite": None}
        return [{"key": sample.key, **row} for sample in samples]

    monkeypatch.setattr(grpo.run.run, "predict", scripted)
    monkeypatch.setattr(train, "plot_run", lambda folder: folder)
    flags += ["--sft_steps", "0", "--eval_every", "1", "--no-controls", "--prompts_per_step", "2", "--group_size", "2",
              "--save_every", "100"]  # fmt: skip
    without = metrics_of(run(flags))
    assert asked == [None] * 5
    folder = run(flags, "--resume", "no", "--gap_every", "3")
    assert asked[5:] == [None, "no video", "shuffled", None, None, None, "no video", "shuffled", None, "no video",
                         "shuffled"]  # fmt: skip
    rows, found = metrics_of(folder), {"blind_gap": 0.25, "order_gap": 0.625}
    assert [row["step"] for row in rows if row.items() >= found.items()] == [0, 3, 4]
    assert [{name: row[name] for name in row if name not in found} for row in rows] == without
    assert "step 3: held-out accuracy 75.0%" in (out := capsys.readouterr().out)
    assert out.count("; blind gap 25.0%; order gap 62.5%") == 3
    assert train.main([*flags, "--eval_samples", "0", "--gap_every", "1"]) == 2
    assert "--gap_every 1: asks held-out questions" in capsys.readouterr().err


def test_the_same_seed_gives_the_same_metrics(flags):
    first = metrics_of(run(flags))
    again = metrics_of(run(flags, "--resume", "no"))
    assert first == again
    other = metrics_of(run(flags, "--resume", "no", "--seed", "7"))
    assert other != first


def test_a_run_that_stopped_goes_on_as_if_it_had_not(flags, monkeypatch, capsys):
    whole, rollouts = metrics_of(run(flags)), rollouts_of(flags[6])
    assert [row["step"] for row in rollouts] == [step for step in range(4) for _ in range(4)], "a line a group"
    weights = load_file(Path(flags[6]) / "checkpoint-4" / "model.safetensors")
    save = Saver.save

    def die_at_two(self, step, *rest):
        save(self, step, *rest)
        if step == 2:
            self.wait()
            raise KeyboardInterrupt

    monkeypatch.setattr(Saver, "save", die_at_two)
    assert train.main([*flags, "--resume", "no"]) == 130
    assert "ended at once, without saving" in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.setattr(Saver, "save", save)
    append_rows(Path(flags[6]) / "rollouts.jsonl", rollouts[8:9])  # of a step after the checkpoint
    assert metrics_of(run(flags)) == whole and rollouts_of(flags[6]) == rollouts
    resumed = load_file(Path(flags[6]) / "checkpoint-4" / "model.safetensors")
    assert weights.keys() == resumed.keys() and all(torch.equal(weights[k], resumed[k]) for k in weights)


def test_a_run_that_is_extended_equals_the_longer_run(flags, capsys):
    """Also its best checkpoint: the last evaluation of the shorter run counts, though it came after the checkpoint."""
    flags = [*flags, "--sft_steps", "0", "--lr_schedule", "constant", "--save_every", "1", "--keep_checkpoints", "1"]
    folder = run(flags, "--steps", "6")
    long, rollouts, best = metrics_of(folder), rollouts_of(folder), best_of(folder)
    weights = load_file(folder / "checkpoint-6" / "model.safetensors")
    run(flags, "--resume", "no", "--steps", "4")
    capsys.readouterr()
    run(flags, "--steps", "6")
    assert "4 of 6 steps are done" in capsys.readouterr().out
    assert metrics_of(folder) == long and rollouts_of(folder) == rollouts and best_of(folder) == best
    extended = load_file(folder / "checkpoint-6" / "model.safetensors")
    assert weights.keys() == extended.keys() and all(torch.equal(weights[k], extended[k]) for k in weights)
    assert json.loads((folder / "run.json").read_text())["steps"] == 6


def best_of(folder):
    return json.loads((folder / "checkpoint-6/training/state.json").read_text())["best"]


def test_a_run_whose_rates_would_have_been_others_is_not_extended(flags, capsys):
    folder = run(flags, *SHORT, "--steps", "2", "--lr_warmup_steps", "2")
    assert train.main([*flags, *SHORT, "--steps", "4", "--lr_warmup_steps", "2", "--epochs", "3"]) == 0, (
        "in the warm-up"
    )
    assert [row["step"] for row in metrics_of(folder)] == [0, 1, 2, 3]
    capsys.readouterr()
    assert train.main([*flags, *SHORT, "--steps", "6", "--lr_warmup_steps", "2"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "--steps was 4, is 6, and --lr_schedule cosine would have given the steps done other rates" in line
    assert "--model" in line and "--resume no" in line


@pytest.mark.slow
def test_the_evaluation_of_a_run_may_change(flags, demo_set, capsys):
    folder = run(flags, "--sft_steps", "0", "--no-controls")
    trained = [row for row in metrics_of(folder) if row["phase"] == "train"]
    before = json.loads((folder / "summary.json").read_text())
    assert before["accuracy_before"] is not None
    flags = [*flags, "--sft_steps", "0", "--no-controls", "--eval_every", "1", "--save_every", "3"]
    run(flags)
    assert "evaluates other questions" not in capsys.readouterr().out
    run(flags, "--eval_samples", "0")
    run(flags, "--eval_samples", "4")
    assert "evaluates other questions from step 4 on: accuracies before it" in capsys.readouterr().out
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["questions"], summary["accuracy_before"]) == (4, None)
    assert [row for row in metrics_of(folder) if row["phase"] == "train"] == trained
    (digest,) = json.loads((folder / "versions.json").read_text())["data_before"][:1]
    assert digest["held out"].startswith("6 rows")


def test_the_hint_after_a_stop_is_a_command_that_goes_on(flags, monkeypatch, capsys):
    def stop(*_):
        raise Stopped(2, 15)

    monkeypatch.setattr(train, "train", stop)
    for more, words in (((), "the same command"), (("--resume", "no"), "the same command without --resume no")):
        assert train.main([*flags, *more]) == 143
        assert f"stopped before step 2; {words} goes on from there" in capsys.readouterr().err


def test_a_run_that_stopped_after_its_warm_up_does_not_repeat_it(flags, monkeypatch):
    whole = metrics_of(run(flags))
    save = Saver.save_weights

    def die(*given):
        save(*given)
        raise KeyboardInterrupt

    monkeypatch.setattr(Saver, "save_weights", die)
    assert train.main([*flags, "--resume", "no"]) == 130
    assert [row["phase"] for row in metrics_of(flags[6])] == ["warmup"] * 2
    monkeypatch.setattr(train, "warm_up", None)
    assert metrics_of(run(flags)) == whole


def test_a_run_does_not_go_on_from_other_weights_in_its_models_folder(flags, checkpoints, tmp_path, capsys):
    """The reference, and what is beneath adapters, would be another model's."""
    model = tmp_path / "model"
    shutil.copytree(checkpoints["qwen2_vl"], model)
    flags = [*flags, "--model", str(model)]
    run(flags)
    [file] = model.glob("*.safetensors")
    weights = load_file(file)
    save_file({name: weight + 1 for name, weight in weights.items()}, file, metadata={"format": "pt"})
    assert train.main([*flags, "--controls"]) == 2
    assert "whose data or model has changed since (model was model@" in capsys.readouterr().err
    run(flags, "--resume", "anyway")


def test_a_finished_run_is_only_reported(flags, demo_set, capsys):
    data = demo_set["train"].with_name("own.jsonl")
    data.write_text(demo_set["train"].read_text())
    flags = [*flags, "--data", str(data)]
    folder = run(flags)
    before = metrics_of(folder)
    capsys.readouterr()
    run(flags)
    assert metrics_of(folder) == before
    assert f"goes on from {folder}/checkpoint-4, 4 of 4 steps are done; --resume no" in capsys.readouterr().out
    lines = data.read_text().splitlines(keepends=True)
    data.write_text("".join(lines[:-1]))
    assert train.main(flags) == 2
    error = capsys.readouterr().err
    assert "data or model has changed since (train was 24 rows, digest " in error and ", is 23 rows, digest " in error
    assert "--resume anyway goes on" in error and "held out" not in error
    old = json.loads((folder / "versions.json").read_text())["data"]
    run(flags, "--resume", "anyway")
    output = capsys.readouterr().out
    assert f"data or model has changed (train was {old['train']}, is 23 rows, digest " in output
    assert "); goes on as --resume anyway asks" in output
    run(flags)
    assert metrics_of(folder) == before
    versions = json.loads((folder / "versions.json").read_text())
    assert versions["data_before"] == [old] and versions["data"]["train"].startswith("23 rows")


def test_other_settings_do_not_go_on_in_the_same_folder(flags, capsys):
    run(flags)
    assert train.main([*flags, "--learning_rate", "1", "--reward", "accuracy:1", "format:2", "--dynamic_filter"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "--learning_rate was 0.0004, is 1.0" in error and "--output" in error
    assert (
        "--reward was accuracy:1 format:0.5, is accuracy:1 format:2" in error
        and "--dynamic_filter was off, is on" in error
    )


def test_eval_reads_the_checkpoint_back_to_the_same_accuracy(flags):
    folder = run(flags, "--sft_steps", "30", "--eval_samples", "24", "--sft_learning_rate", "2e-3")
    summary = json.loads((folder / "summary.json").read_text())
    import eval as eval_script

    assert eval_script.main(["--ckpt", str(folder / "checkpoint-4"), "--output", str(folder / "eval")]) == 0
    lines = [json.loads(line) for path in (folder / "eval").glob("predictions*.jsonl") for line in open(path)]
    assert sum(line["score"] for line in lines) / len(lines) == pytest.approx(summary["overall"]["after"], abs=1e-12)


def test_a_toy_reward_rises(flags, tmp_path):
    """The share of one token in a completion: GRPO must raise it, from a model of random weights."""
    (tmp_path / "toy.py").write_text(
        "def often(completion, sample):\n    return completion.count('e') / (1 + len(completion))\n"
    )
    folder = run(
        flags, "--sft_steps", "0", "--steps", "25", "--reward", f"{tmp_path}/toy.py:often", "--learning_rate", "5e-3",
        "--kl_coef", "0", "--group_size", "8", "--eval_samples", "0", "--lr_schedule", "constant",
    )  # fmt: skip
    rewards = [row["reward"] for row in metrics_of(folder)]
    assert sum(rewards[-5:]) > 3 * sum(rewards[:5]) and rewards[-1] > 0.3


def test_bad_videos_are_skipped_counted_and_named(flags, demo_set, tmp_path, capsys):
    """Never replaced; the step is smaller, and the run goes on."""
    rows = [json.loads(line) for line in open(demo_set["train"])][:4]
    good = demo_set["train"].parent / rows[0]["video"]
    (tmp_path / "cut.mp4").write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    (tmp_path / "text.mp4").write_text("this is no video")
    for row, name in zip(rows, (good, tmp_path / "cut.mp4", tmp_path / "text.mp4", tmp_path / "missing.mp4")):
        row["video"] = str(name)
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = run(flags, "--data", str(tmp_path / "bad.jsonl"), "--sft_steps", "0", "--steps", "2")
    steps = [row for row in metrics_of(folder) if row["phase"] == "train"]
    assert [row["skipped"] for row in steps] == [3, 3]
    shown = capsys.readouterr().out
    for name in ("cut.mp4", "text.mp4", "missing.mp4"):
        assert shown.count(name) == 2, "once each step, with its path"


def test_starting_anew_touches_nothing_of_others(flags, tmp_path):
    folder = tmp_path / "run"
    (folder / "checkpoint-600").mkdir(parents=True)
    (folder / "train.json").write_text("[]")
    run(flags, "--sft_steps", "0", "--steps", "2", "--keep_checkpoints", "1")
    run(flags, "--sft_steps", "0", "--steps", "1", "--resume", "no")
    assert (folder / "train.json").read_text() == "[]" and (folder / "checkpoint-600").is_dir()
    assert (folder / "checkpoint-1").is_dir() and not (folder / "checkpoint-2").exists()


def test_a_sample_that_comes_twice_in_a_step_is_sampled_anew():
    samples = [Sample(key, "?", "A") for key in ("a:1", "b:1", "a:1", "a:1")]
    for seed in range(4):
        keys = [s.key for s in draw_samples(samples, 0, 4, seed)]
        keys.remove("b:1")
        assert keys == ["a:1", "a:1#2", "a:1#3"], "numbered as they come"
    pairs = [Sample(key, "?", "A") for key in ("a:1", "b:1")]
    assert sorted(s.key for s in draw_samples(pairs, 0, 4, seed=1)) == ["a:1", "a:1#2", "b:1", "b:1#2"], "two epochs"
    assert sorted(s.key for s in draw_samples(pairs, 2, 2, seed=1)) == ["a:1", "b:1"], "a later draw counts anew"


def test_a_failing_reward_is_shown_and_counted(flags, tmp_path, capsys):
    (tmp_path / "bad.py").write_text("def f(completion, sample):\n    raise KeyError('boom')\n")
    folder = run(flags, "--sft_steps", "0", "--steps", "1", "--reward", "accuracy:1", f"{tmp_path}/bad.py:f:0.5")
    shown = capsys.readouterr().out
    assert shown.count("reward f failed") == 1, "one line a step, however many groups"
    assert "step 0: reward f failed in 4 of 4 groups, scored 0: KeyError: 'boom'" in shown
    assert next(row for row in metrics_of(folder) if row["phase"] == "train")["rewards_failed"] == 4


def test_filtering_runs_after_a_warm_up_and_needs_accuracy(flags, capsys):
    run(flags, "--dynamic_filter")
    assert train.main([*flags, "--dynamic_filter", "--reward", "format:1"]) == 2
    assert "--dynamic_filter" in capsys.readouterr().err.splitlines()[-1]


def test_epochs_leave_no_row_out():
    assert [steps_of(1, count, 10) for count in (10, 24, 3)] == [1, 3, 1]
    assert steps_of(0.5, 24, 4) == 3 and steps_of(2, 5, 4) == 3
    samples = [Sample(f"{number:02d}", "?", "A") for number in range(24)]
    seen = [sample.key for step in range(3) for sample in draw_samples(samples, 10 * step, 10, seed=1)]
    assert sorted(seen[:24]) == [sample.key for sample in samples]


def test_a_diverged_model_is_one_line(flags, capsys):
    more = ("--sft_steps", "0", "--steps", "6", "--learning_rate", "1e30", "--kl_coef", "0", "--eval_samples", "0",
            "--reward", f"{ROOT}/tests/toy_reward.py:vowels")  # fmt: skip
    assert train.main([*flags, *more]) == 2
    assert "not finite" in capsys.readouterr().err.splitlines()[-1]


@contextmanager
def full_disk_of_tensorboard(calls):
    """It writes in a thread of its own, which hands its error to the next call."""

    def write(*given):
        next(counter) < calls or refuse(errno.ENOSPC)
        return real(*given)

    real, counter = RecordWriter.write, count()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RecordWriter, "write", write)
        yield


def refuse(number):
    raise OSError(number, os.strerror(number))


def test_a_full_disk_ends_a_run_with_one_line_and_it_goes_on(flags, capfd):
    flags = [*flags, *SHORT, "--steps", "2"]
    for name in (
        "run.json",
        "versions.json",
        "metrics.jsonl",
        "rollouts.jsonl",
        "tfevents",
        "state.json",
        "summary.json",
    ):
        with full_disk_of_tensorboard(20) if name == "tfevents" else full_disk(name):
            assert train.main(flags) == 2
        error = capfd.readouterr().err
        assert name in error.splitlines()[-1] and "No space left on device" in error.splitlines()[-1]
        assert "Traceback" not in error
    folder = run(flags)
    assert [row["step"] for row in metrics_of(folder) if row["phase"] == "train"] == [0, 1]
    assert not list(folder.rglob("*.part"))


def test_damaged_metrics_are_dropped_with_a_word_and_a_full_disk_at_resume_spares_the_rest(flags, capsys):
    flags = [*flags, *SHORT]
    path = run(flags) / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"\0" * 40 + b"\n" + b"\xff" + lines[2] + b"[1]\n" + lines[3][:-20])
    damaged = path.read_bytes()
    with full_disk("metrics.jsonl"):
        assert train.main(flags) == 2
    assert path.read_bytes() == damaged
    capsys.readouterr()
    run(flags)
    assert f"{path}: 4 damaged lines are left out" in capsys.readouterr().err
    assert path.read_bytes() == lines[0]


def test_a_run_keeps_its_folder_to_itself(flags, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    with held(tmp_path / "run") as holder:
        assert train.main(flags) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"--output {tmp_path / 'run'}: process {holder.pid} on here is writing there; wait for it" in error
    run(flags, *SHORT, "--steps", "1")  # a SIGKILL leaves no lock behind


def test_a_folder_that_cannot_be_locked_is_used_with_a_word(flags, monkeypatch, capsys):
    monkeypatch.setattr("grpo.run.folder.fcntl.flock", lambda *_: refuse(errno.ENOLCK))
    run(flags, *SHORT, "--steps", "1")
    assert "cannot be locked (No locks available): take care" in capsys.readouterr().err


@pytest.mark.parametrize("git", [FileNotFoundError("git"), PermissionError(), subprocess.TimeoutExpired("git", 20)])
def test_no_git_costs_one_empty_field(monkeypatch, git):
    def fail(*_, **__):
        raise git

    monkeypatch.setattr(subprocess, "run", fail)
    assert describe_run()["revision"] == "" and describe_run()["torch"] == torch.__version__


BAD_INPUT = {
    "--data": (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
    "--model": (["--model", "no/such/model"], "no/such/model"),
    "--group_size": (["--group_size", "1"], "at least 2"),
    "--temperature": (["--temperature", "0"], "above 0"),
    "--top_p": (["--top_p", "1.5"], "at most 1"),
    "--clip_eps_low": (["--clip_eps_low", "-0.1"], "above 0"),
    "--prompt_template": (["--prompt_template", "no place"], "{problem}"),
    "--min_pixels": (["--min_pixels", "9999999"], "--max_pixels"),
    "--sft_steps": (["--sft_steps", "5", "--sft_data", ""], "--sft_data"),
    "--reward": (["--reward", "charm:1"], "charm"),
    "--eval_data": (["--eval_data", "nowhere.jsonl"], "nowhere.jsonl"),
    "--seed": (["--seed", "99999999999999999999"], "at most"),
    "--output": (["--output", __file__], "cannot be written"),
    "--device": (["--device", "cuda"], "GPU"),
    "--output ": (["--output", ""], "is empty; name a folder"),
    "--threads": (["--threads", "100000"], "at most 1024"),
    "--learning_rate": (["--learning_rate", "inf"], "must be finite"),
    "--kl_coef": (["--kl_coef", "inf"], "must be finite"),
    "--frame_cache_gb": (["--frame_cache_gb", "inf"], "must be finite"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_settings_are_one_line(flags, name, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    more, words = BAD_INPUT[name]
    assert train.main([*flags, *more]) == 2
    error = capsys.readouterr().err
    assert name.strip() in error and words in error and error.count("\n") == 1 and "Traceback" not in error


@pytest.mark.parametrize("more, words", [(["--no_such_flag", "1"], ""), (["--steps", "many"], "many"),
                                         (["--group", "4"], ""), (["--preset", "huge"], "open-r1-video"),
                                         (["--lr_schedule", "wavy"], "cosine")])  # fmt: skip
def test_unknown_flags_types_and_choices_exit_with_2(flags, more, words, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main([*flags, *more])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and more[0] in error and words in error and error.count("\n") == 1


def test_a_command_with_missing_inputs_leaves_no_folder(flags, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("--data", "--model"):
        assert train.main([*flags, *BAD_INPUT[name][0], "--output", str(tmp_path / "new")]) == 2
    assert not (tmp_path / "new").exists()


BAD_DATA = {
    "empty": ("", "empty"),
    "json": ('{"problem": "?", "solution": \n', "bad.jsonl:1"),
    "field": ('{"question": "?", "solution": "<answer>A</answer>"}\n', "bad.jsonl:1"),
    "type": ('{"problem": 5, "solution": "<answer>A</answer>"}\n', "problem"),
    "letter": ('{"problem": "?", "solution": "<answer></answer>", "video": "a.mp4"}\n', "bad.jsonl:1"),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data_is_one_line(flags, name, tmp_path, capsys):
    text, words = BAD_DATA[name]
    (tmp_path / "bad.jsonl").write_text(text)
    assert train.main([*flags, "--data", str(tmp_path / "bad.jsonl")]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_no_flags_say_what_is_missing(tmp_path):
    """The 7B recipe without its data: what is missing, how to get it, the demo; at once, and no traceback."""
    done = subprocess.run(
        [sys.executable, ROOT / "train.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )  # fmt: skip
    assert done.returncode == 2
    for words in ("LLaVA-Video-large-swift-origin.jsonl", "hf download", "Qwen/Qwen2-VL-7B-Instruct", "--preset demo"):
        assert words in done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("\n") == 1


def test_the_default_preset_is_open_r1_video():
    """facts.md's published settings, number for number."""
    config = parse_config([])
    expected = dict(
        model="Qwen/Qwen2-VL-7B-Instruct", learning_rate=1e-6, lr_schedule="linear", kl_coef=0.1, prompts_per_step=4,
        group_size=8, max_new_tokens=256, max_prompt_tokens=8192, temperature=1.0, epochs=1.0, seed=42, fps=2.0,
        max_frames=16, min_pixels=128 * 28**2, max_pixels=196 * 28**2, reward=("accuracy:1",),
        loss_normaliser="sequence", activation_checkpointing="full", ppo_epochs=1, top_k=0, top_p=1.0,
    )  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected
    assert "<think>" in config.prompt_template and "<answer>" in config.prompt_template


def test_configuration_survives_saving(tmp_path):
    config = parse_config(["--preset", "demo", "--nframes", "6", "--reward", "accuracy:2", "format:0.1"])
    save_config(config, tmp_path / "run.json")
    assert load_config(tmp_path / "run.json") == config
    (tmp_path / "run.json").write_text("{}x")
    with pytest.raises(ConfigError, match="run.json"):
        load_config(tmp_path / "run.json")


@pytest.fixture
def as_before():
    """A function that gives the flags in a run.json the names that an earlier version wrote."""
    old = {"clip_eps_low": "clip_low", "clip_eps_high": "clip_high", "dynamic_filter": "filter_groups",
           "tis_cap": "importance_cap", "ppo_epochs": "updates_per_batch"}  # fmt: skip

    def rename(path):
        saved = json.loads(path.read_text())
        assert old.keys() <= saved.keys()
        path.write_text(json.dumps({old.get(name, name): value for name, value in saved.items()}))

    return rename


def test_a_run_json_of_an_earlier_version_is_read(tmp_path, as_before):
    config = parse_config(["--clip_eps_low", "0.1", "--clip_eps_high", "0.3", "--dynamic_filter", "--tis_cap", "2",
                           "--ppo_epochs", "3"])  # fmt: skip
    save_config(config, tmp_path / "run.json")
    as_before(tmp_path / "run.json")
    assert load_config(tmp_path / "run.json") == config


def test_a_run_of_an_earlier_version_goes_on(flags, as_before, capsys):
    flags = [*flags, *SHORT, "--clip_eps_high", "0.3"]
    folder = run(flags, "--steps", "4")
    before = metrics_of(folder)
    for path in (folder / "run.json", folder / "checkpoint-4" / "run.json"):
        as_before(path)
    capsys.readouterr()
    assert train.main([*flags, "--clip_eps_high", "0.2"]) == 2
    assert "--clip_eps_high was 0.3, is 0.2" in capsys.readouterr().err
    run(flags)
    assert "4 of 4 steps are done" in capsys.readouterr().out and metrics_of(folder) == before
    assert json.loads((folder / "run.json").read_text())["clip_eps_high"] == 0.3


def test_every_flag_has_a_sentence(capsys):
    with pytest.raises(SystemExit):
        parse_config(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for name, item in Config.__dataclass_fields__.items():
        assert f"--{name}" in shown and " ".join(item.metadata["help"].split())[:40] in shown
        assert item.metadata["help"].endswith((".", ").")), name


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_valid(preset):
    assert parse_config(["--preset", preset]).preset == preset


@pytest.mark.slow
def test_a_compiled_run_is_the_same_run(flags):
    plain = [row for row in metrics_of(run(flags)) if row["phase"] == "train"]
    compiled = [row for row in metrics_of(run(flags, "--resume", "no", "--compile")) if row["phase"] == "train"]
    for a, b in zip(compiled, plain, strict=True):
        assert a["reward"] == b["reward"] and a["loss"] == pytest.approx(b["loss"], abs=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


OWN = """
def riddle(completion, sample): return float(sample.problem_type == "riddle"), {"letters": len(completion)}
def batch(completions, samples): return [n % 2 for n in range(len(completions))]
"""


def test_a_run_of_problems_that_only_its_own_rewards_know(flags, demo_set, tmp_path, capsys):
    """The demo's rows with another type; one reward is only logged."""
    rows = [json.loads(line) | {"problem_type": "riddle"} for line in demo_set["train"].read_text().splitlines()]
    data = demo_set["train"].with_name("riddles.jsonl")
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own.py").write_text(OWN)
    rewards = ("--reward", f"{tmp_path}/own.py:riddle:0", f"{tmp_path}/own.py:batch:2")
    more = ("--data", str(data), "--steps", "2", "--sft_steps", "0", "--eval_samples", "0")
    folder = run(flags, *more, *rewards)
    for row in metrics_of(folder):
        assert (row["riddle"], row["batch"], row["reward"], row["rewards_failed"]) == (1.0, 0.5, 1.0, 0)
        assert row["riddle/letters"] > 0 and "accuracy" not in row
    assert reward_metrics(metrics_of(folder)) == ["riddle", "batch", "riddle/letters"]
    assert train.main([*flags, *more, "--reward", "accuracy:1"]) == 2
    assert "unknown problem_type 'riddle'; accuracy knows" in capsys.readouterr().err


def test_a_reward_may_not_be_called_like_a_metric(flags, tmp_path):
    """Else their numbers would mix; the list of names is that of what a step really logs."""
    (tmp_path / "own.py").write_text("def length(completion, sample):\n    return 0.0\n")
    with pytest.raises(ConfigError, match="--reward length: a metric has this name"):
        parse_config([*flags, "--reward", "accuracy:1", f"{tmp_path}/own.py:length"])
    row = next(row for row in metrics_of(run(flags)) if row["phase"] == "train")
    with pytest.raises(ConfigError, match="--reward letter_A: a metric"):
        (tmp_path / "two.py").write_text("def letter_A(completion, sample):\n    return 0.0\n")
        parse_config([*flags, "--reward", f"{tmp_path}/two.py:letter_A"])
    rest = {name for name in row if not name.startswith(METRICS_OF_KINDS)} - {"accuracy", "format", "tag_count"}
    assert rest <= METRICS and {"length", "reward", "kl", "grad_norm"} <= rest


def test_resume_no_removes_nothing_before_the_new_run_can_start(flags, capsys):
    folder = run(flags)
    before = sorted(path.name for path in folder.iterdir())
    for more in (
        ("--model", str(folder / "warmup")),
        ("--prompt_template", "{problem}<|video_pad|>"),
        ("--model", "no/such"),
    ):
        assert train.main([*flags, "--resume", "no", *more]) == 2
        assert sorted(path.name for path in folder.iterdir()) == before
    assert "--resume no would remove --model" in capsys.readouterr().err


def test_resume_no_leaves_a_run_without_run_json_and_its_own_inputs_alone(flags, demo_set, capsys):
    """Else old checkpoints would count as the newest: new ones were removed as older, and the next start would go on
    from an old one."""
    flags = [*flags, *SHORT]
    folder = run(flags)
    for name, value in (("data", demo_set["train"]), ("eval_data", demo_set["val"])):
        inside = folder / "merged" / "rows.jsonl"
        inside.parent.mkdir(exist_ok=True)
        inside.write_bytes(value.read_bytes())
        assert train.main([*flags, f"--{name}", str(inside), "--resume", "no"]) == 2
        assert f"--resume no would remove --{name} {inside}" in capsys.readouterr().err and inside.exists()
    (folder / "run.json").unlink()
    assert train.main([*flags, "--resume", "no"]) == 2
    assert f"--output {folder}: holds checkpoint-4 but no run.json; choose another" in capsys.readouterr().err


def test_a_checkpoint_of_more_steps_than_the_run_has_is_refused(flags, capsys):
    flags = [*flags, *SHORT]
    folder = run(flags)
    (folder / "checkpoint-4").rename(folder / "checkpoint-9")
    assert train.main(flags) == 2
    assert f"--steps 4: {folder / 'checkpoint-9'} has more; give it another --output" in capsys.readouterr().err


def test_a_run_that_could_use_no_sample_fails_each_time_it_is_asked(flags, tmp_path, capsys):
    (tmp_path / "gone.jsonl").write_text(
        '{"problem": "p", "solution": "<answer>A</answer>", "video": "gone.mp4"}\n' * 2
    )
    more = ("--data", str(tmp_path / "gone.jsonl"), "--sft_steps", "0", "--output", str(tmp_path / "out"))
    for _ in range(2):
        assert train.main([*flags, *more]) == 2
        assert "every sample was skipped" in capsys.readouterr().err
    assert not (tmp_path / "out" / "checkpoint-4").exists()


@pytest.fixture
def small_demo(tmp_path, monkeypatch):
    """--preset demo makes a handful of videos, in a fresh working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo.build, "DemoSpec", lambda seed, **_: DemoSpec(seed=seed, train=4, val=4, warmup=4))


def test_each_seed_has_a_demo_of_its_own(small_demo):
    build_demo(parse_config(["--preset", "demo"]))
    stamps = {path: path.stat().st_mtime_ns for path in Path("runs/demo").rglob("*")}
    assert len(stamps) > 20
    other = parse_config(["--preset", "demo", "--seed", "1"])
    assert (other.model, other.output) == ("runs/demo-seed-1/start", "runs/demo-seed-1/run")
    build_demo(other)
    assert Path(other.data[0]).read_text() != Path("runs/demo/data/train.jsonl").read_text()
    assert {path: path.stat().st_mtime_ns for path in Path("runs/demo").rglob("*")} == stamps
    assert sorted(path.name for path in Path("runs/demo").iterdir()) == ["data", "start"], "nothing is left over"


def test_each_family_has_a_start_model_of_its_own_beside_the_same_videos(small_demo):
    """And the default family's is the same, byte for byte, whether or not the flag is given."""
    weights, configs = {}, {family: parse_config(["--preset", "demo", "--family", family]) for family in FAMILIES}
    assert (configs["qwen3_vl"].model, configs["qwen3_vl"].output) == (
        "runs/demo/start-qwen3_vl", "runs/demo/run-qwen3_vl"
    )  # fmt: skip
    for family, config in configs.items():
        build_demo(config)
        assert read_config(config.model).model_type == family
        weights[family] = (Path(config.model) / "model.safetensors").read_bytes()
    names = {path.name for path in Path("runs/demo").iterdir()}
    assert names == {"data", *(Path(config.model).name for config in configs.values())}
    plain = parse_config(["--preset", "demo"])
    shutil.rmtree(plain.model)
    build_demo(plain)
    assert (Path(plain.model) / "model.safetensors").read_bytes() == weights["qwen2_vl"]
    os.replace(configs["qwen3_vl"].model, "runs/aside")
    shutil.copytree(plain.model, configs["qwen3_vl"].model)
    build_demo(configs["qwen3_vl"])
    assert read_config(configs["qwen3_vl"].model).model_type == "qwen3_vl", "one of another family is replaced"
    other = parse_config(["--preset", "demo", "--family", "qwen3_vl", "--seed", "1"])
    assert (other.model, other.output) == ("runs/demo-seed-1/start-qwen3_vl", "runs/demo-seed-1/run-qwen3_vl")


def test_a_kill_while_the_demos_model_is_built_is_made_good(small_demo, monkeypatch):
    def die(folder, **_):
        Path(folder).mkdir(parents=True)
        (Path(folder) / "config.json").write_text("{")
        raise KeyboardInterrupt

    config = parse_config(["--preset", "demo"])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(demo.build, "build_tiny_model", die)
        build_demo(config)
    build_demo(config)
    assert (Path(config.model) / "model.safetensors").is_file()


def test_a_start_model_of_other_texts_is_made_anew(small_demo):
    """Its tokenizer is trained on the texts: with that of an older version the demo would be another one."""
    flags = ["--preset", "demo"]
    build_demo(parse_config(flags))
    tokenizer = Path(parse_config(flags).model) / "tokenizer.json"
    before, stamp = tokenizer.read_text(), tokenizer.stat().st_mtime_ns
    build_demo(parse_config(flags))
    assert tokenizer.stat().st_mtime_ns == stamp
    build_demo(parse_config([*flags, "--prompt_template", "Look closely, look closely. {problem}"]))
    assert tokenizer.read_text() != before


def test_the_demo_makes_and_replaces_only_what_is_its_own(tmp_path, monkeypatch, capsys):
    """A user's folder of the same names is left alone; a path with a slip is an error, not a new model or set."""
    monkeypatch.chdir(tmp_path)
    mine = {"mine/videos/own.mp4": "x", "mine/train.jsonl": "{}", "mine/model/config.json": "{}"}
    for name, text in mine.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text)
    own = ["--eval_data", "mine/train.jsonl", "--sft_data", "mine/train.jsonl", "--model", "mine/model"]
    build_demo(parse_config(["--preset", "demo", "--data", "mine/train.jsonl", *own]))
    assert {str(path) for path in Path().rglob("*") if path.is_file()} == mine.keys()
    assert all(Path(name).read_text() == text for name, text in mine.items())
    for slip, named in (("--data", "mine/trian.jsonl"), ("--data", "trian.jsonl")):
        assert train.main(["--preset", "demo", slip, named, "--output", "out"]) == 2
        assert f"--data {named}: no such file" in capsys.readouterr().err
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert train.main(["--preset", "demo", "--model", "mine/modle", "--output", "out"]) == 2
    assert "--model mine/modle: not on this machine" in capsys.readouterr().err
    assert not Path("runs").exists() and not Path("videos").exists()
