"""The command lines of train.py and of the scripts under bench/: what --help says, one-line errors, labels."""

import builtins
import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import train
from grpo.advantage import ADVANTAGES
from grpo.config import METRICS, PRESETS, Config, parse_config, save_config
from grpo.errors import ConfigError
from grpo.loss import KL_ESTIMATORS, LOSSES, TIS_MODES, token_weights
from grpo.run.folder import check_inputs

ROOT = Path(__file__).parent.parent


@pytest.fixture
def shown(capsys, monkeypatch):
    """train.py --help, its spaces and line breaks single spaces."""
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as end:
        parse_config(["--help"])
    assert end.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def entry(shown, flag):
    return re.search(rf"--{flag}[ ,].*?(?= --(?!no-)\w|$)", shown)[0]


def test_help_shows_the_values_a_flag_takes_and_the_default_presets_own(shown):
    assert "Trains Qwen2-VL, Qwen2.5-VL or Qwen3-VL on video questions" in shown
    assert entry(shown, "preset").startswith(f"--preset {{{','.join(PRESETS)}}}")
    choices = {"resume": "auto,anyway,no", "advantage": ",".join(ADVANTAGES),
               "device": "auto,cuda,cpu", "lr_schedule": "linear,cosine,constant",
               "loss_normaliser": "token,sequence,constant"}  # fmt: skip
    for flag, values in choices.items():
        assert entry(shown, flag).startswith(f"--{flag} {{{values}}}")
    assert "[sequence]" in entry(shown, "loss_normaliser"), "the default preset's, not the dataclass's"
    assert "[accuracy:1]" in entry(shown, "reward") and "[]" not in shown and "[None]" not in shown
    for control in ("shuffled", "reversed", "blank", "no video"):
        assert control in entry(shown, "controls")


def test_help_with_a_preset_shows_its_values(capsys):
    with pytest.raises(SystemExit):
        parse_config(["--help", "--preset", "demo"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "[0.0004]" in entry(shown, "learning_rate") and "[demo]" in entry(shown, "preset")
    assert "the values of --preset demo" in shown


@pytest.mark.parametrize("flag", ["fps", "min_frames", "max_frames"])
def test_a_frame_flag_counts_more_than_the_presets_nframes(flag):
    assert parse_config(["--preset", "demo"]).nframes == 8
    assert parse_config(["--preset", "demo", f"--{flag}", "4"]).nframes is None
    assert parse_config(["--preset", "demo", f"--{flag}", "4", "--nframes", "6"]).nframes == 6


@pytest.mark.parametrize("flags, both", [
    ("--dual_clip 3 --loss cispo", ("--dual_clip 3", "--loss cispo")),
    ("--dual_clip 3 --loss sapo", ("--dual_clip 3", "--loss sapo")),
    ("--clip_eps_low 0.1 --loss sapo", ("--clip_eps_low 0.1", "--loss sapo")),
    ("--clip_eps_high 0.1 --loss sapo_sequence", ("--clip_eps_high 0.1", "--loss sapo_sequence")),
    ("--kl_estimator k2 --kl_coef 0", ("--kl_estimator k2", "--kl_coef 0")),
    ("--kl_in reward --kl_coef 0", ("--kl_in reward", "--kl_coef 0")),
    ("--kl_correction --kl_coef 0", ("--kl_correction", "--kl_coef 0")),
    ("--ref_sync_steps 5 --kl_coef 0", ("--ref_sync_steps 5", "--kl_coef 0")),
    ("--kl_in reward", ("--kl_in reward", "--kl_estimator k3")),
    ("--kl_in reward --kl_estimator k2", ("--kl_in reward", "--kl_estimator k2")),
    ("--kl_in reward --kl_estimator k1 --kl_correction", ("--kl_correction", "--kl_in reward")),
    ("--kl_estimator k1", ("--kl_estimator k1", "--kl_in loss")),
    ("--lora_rank 8 --no-freeze_vision", ("--lora_rank 8", "--no-freeze_vision")),
    ("--ref_sync_steps 5 --lora_rank 8", ("--ref_sync_steps 5", "--lora_rank")),
    ("--ref_mixup_alpha 0.5", ("--ref_mixup_alpha 0.5", "--ref_sync_steps")),
    ("--feature_cache_gb 5", ("--feature_cache_gb 5", "without --feature_cache")),
    ("--frame_cache_gb 5", ("--frame_cache_gb 5", "without --frame_cache")),
    ("--lora_alpha 16", ("--lora_alpha 16", "--lora_rank")),
    ("--temporal_threshold 0.5", ("--temporal_threshold 0.5", "--temporal_bonus")),
    ("--tis_mode sequence_mask", ("--tis_mode sequence_mask", "--tis_cap")),
    ("--dynamic_sampling 3 --no-dynamic_filter", ("--dynamic_sampling 3", "--no-dynamic_filter")),
    ("--dynamic_sampling 3 --reward format:1", ("--dynamic_sampling", "--reward")),
    ("--dynamic_filter --reward format:1", ("--dynamic_filter", "--reward")),
    ("--sft_steps 5", ("--sft_steps", "--sft_data")),
    ("--family qwen3_vl", ("--family qwen3_vl", "--model")),
    ("--preset demo --family qwen3_vl --model mine", ("--family qwen3_vl", "--model")),
    ("--prompt_template {problem} --answer_form math=x", ("--answer_form math=x", "--prompt_template")),
    ("--answer_form x", ("--answer_form x", "TYPE=WORDS")),
    ("--answer_form math=", ("--answer_form math=", "TYPE=WORDS")),
    ("--answer_form numerica=x", ("--answer_form numerica=x", "did you mean numerical?")),
])  # fmt: skip
def test_settings_that_mean_nothing_together_are_one_line_that_names_both(flags, both, capsys):
    assert train.main(flags.split()) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("train.py: error: ") and all(flag in line for flag in both)


@pytest.mark.parametrize("flags", [
    "--loss gspo --dual_clip 3", "--loss cispo --clip_eps_high 4", "--loss sapo", "--kl_coef 0",
    "--kl_in reward --kl_estimator k1", "--kl_estimator k1 --kl_correction", "--kl_coef 0 --ref_sync_steps 0",
    "--tis_cap 2 --tis_mode sequence_mask", "--ref_sync_steps 5 --ref_mixup_alpha 0.5", "--mini_batch_size 4",
    "--kl_coef 0 --no-kl_correction", "--lora_rank 8 --kl_in reward --kl_estimator k1", "--dynamic_sampling 3",
    "--answer_form math=x=1 mine=y",
])  # fmt: skip
def test_settings_that_combine(flags):
    assert parse_config(flags.split()).preset


def test_dynamic_sampling_filters():
    assert parse_config(["--dynamic_sampling", "3"]).dynamic_filter and not parse_config([]).dynamic_filter


@pytest.mark.parametrize("flag, table", [
    ("loss", LOSSES), ("advantage", ADVANTAGES), ("kl_estimator", KL_ESTIMATORS), ("tis_mode", TIS_MODES),
])  # fmt: skip
def test_choices_of_a_flag_are_the_rows_of_its_table(flag, table):
    """config.py names them once more, because the tables need torch, without which --help answers at once."""
    assert choices_of(flag) == tuple(table)


def test_choices_of_the_normaliser_are_those_that_weights_have():
    totals = {"tokens": 3, "completions": 2}
    weights = [token_weights([1, 2], name, totals, 4).tolist() for name in choices_of("loss_normaliser")]
    expected = [[1 / 3] * 3, [1 / 2, 1 / 4, 1 / 4], [1 / 8] * 3]
    assert all(ours == pytest.approx(theirs) for ours, theirs in zip(weights, expected, strict=True))
    with pytest.raises(KeyError):
        token_weights([1, 2], "another", totals, 4)


def choices_of(flag):
    return next(item.metadata["choices"] for item in dataclasses.fields(Config) if item.name == flag)


def test_help_comes_in_sections(shown):
    at = [shown.index(f" {name}: --") for name in ("what is trained", "sampling", "rewards", "loss", "optimiser",
                                                   "warm-up", "video", "memory and speed", "output")]  # fmt: skip
    assert at == sorted(at)
    assert at[1] < shown.index("--prompts_per_step PROMPTS") < shown.index("--top_p TOP_P") < at[2]


def test_the_page_of_metrics_explains_every_metric_of_a_step():
    page = (ROOT / "docs/metrics.md").read_text()
    assert [name for name in sorted(METRICS) if f"`{name}`" not in page] == []


def run(*command):
    whole = [sys.executable, *command]
    return subprocess.run(whole, check=False, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_help_of_the_cost_model_runs_no_model():
    done = run("bench/cost_model.py", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage:") and "### Qwen2-VL" not in done.stdout


@pytest.mark.skipif(importlib.util.find_spec("trl") is not None, reason="TRL is installed")
def test_the_step_bench_without_trl_says_what_to_install():
    done = run("bench/step.py")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "pip install -r bench/requirements.txt" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux's /proc")
def test_the_step_bench_runs_without_trl_if_told_to(tmp_path):
    sizes = ("--model", "tiny", "--images", "2", "--group", "2", "--completion", "4", "--rounds", "1")
    done = run("bench/step.py", *sizes, "--only", "ours", "--output", tmp_path / "step")
    assert done.returncode == 0, done.stderr
    [point] = json.loads((tmp_path / "step.json").read_text())["points"]
    assert point["ours"]["completion_tokens"] == 2 * 4 and len(point["ours"]["steps"]) == 1
    assert sum(point["ours"]["flops"].values()) >= sum(point["minimum"].values()) > 0
    assert "| backward |" in (tmp_path / "step.md").read_text()


@pytest.fixture
def gpu_check(monkeypatch):
    """bench/gpu_check.py as a module."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "bench/gpu_check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_tiny_gpu_check_is_labelled_tiny(gpu_check, monkeypatch, tmp_path):
    phases = {"rollout": {"seconds": 1.0, "gib": None, "reserved_gib": None, "planned_gib": 1.0}}
    case = {"real": True, "phases": phases, "decode": {}, "decoded_tokens_per_second": 1, "update_tflop_per_second": 1}
    monkeypatch.setattr(gpu_check, "run", lambda command: (0, f"{json.dumps(case)}\n=== 7 passed in 1.00s ===\n"))
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--tiny", "--output", str(tmp_path / "check")])
    assert gpu_check.main() == 0
    rows = [line for line in (tmp_path / "check.md").read_text().splitlines() if "rollout |" in line]
    assert len(rows) == 4 and all(row.startswith("| tiny in place of ") for row in rows)
    assert "tests: 7 passed in 1.00s\n" in (tmp_path / "check.md").read_text()


def test_the_gpu_check_shows_output_as_it_comes(gpu_check, monkeypatch, tmp_path):
    """The child goes on only once its first line was shown; without that it ends after 30 seconds with code 1."""
    seen, shown = tmp_path / "seen", builtins.print
    monkeypatch.setattr(builtins, "print", lambda *args, **kwargs: (shown(*args, **kwargs), seen.touch()))
    child = (f"import pathlib, sys, time; print('first')\nfor _ in range(300):\n  time.sleep(0.1)\n"
             f"  if pathlib.Path({str(seen)!r}).exists(): print('second'); sys.exit(0)\nsys.exit(1)")  # fmt: skip
    assert gpu_check.run([sys.executable, "-c", child]) == (0, "first\nsecond\n")


def test_a_flag_counts_more_than_the_dynamic_sampling_of_a_preset():
    config = parse_config(["--preset", "dapo", "--no-dynamic_filter"])
    assert (config.dynamic_sampling, config.dynamic_filter) == (0, False)
    config = parse_config(["--preset", "dapo"])
    assert config.dynamic_sampling > 0 and config.dynamic_filter


def settings_file(folder, text, name="own.yaml"):
    (folder / name).write_text(text)
    return str(folder / name)


def test_a_file_counts_more_than_its_preset_and_a_flag_more_than_the_file(tmp_path):
    own = settings_file(tmp_path, "preset: dapo\ngroup_size: 6\nlearning_rate: 1e-5\nreward: accuracy:2\nsteps: null\n")
    config = parse_config(["--config", own, "--max_new_tokens", "64", "--group_size", "3"])
    expected = dict(preset="dapo", group_size=3, learning_rate=1e-5, reward=("accuracy:2",), max_new_tokens=64,
                    clip_eps_high=0.28, steps=None, config=own)  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected
    assert parse_config(["--config", own, "--preset", "gspo"]).loss == "gspo"
    with pytest.raises(SystemExit):
        parse_config(["--config", own, "--preset", "gsop"])


@pytest.mark.parametrize("flags", [
    ["--preset", name] for name in PRESETS
] + [["--kl_coef", "0"], ["--preset", "dapo", "--no-dynamic_filter"], ["--preset", "dapo", "--loss", "sapo"],
     ["--lora_rank", "8"], ["--preset", "demo", "--fps", "1"], ["--preset", "demo", "--seed", "3"],
     ["--preset", "video-r1", "--answer_form", "math=a number"]])  # fmt: skip
def test_the_run_json_of_any_run_is_a_file_of_its_settings(flags, tmp_path):
    config = parse_config([*flags, "--resume", "no", "--plan", "4"])
    save_config(config, tmp_path / "run.json")
    own = str(tmp_path / "run.json")
    again = parse_config(["--config", own])
    assert again == dataclasses.replace(config, config=own, resume="auto", plan=0), "a command's own are not read"


def test_what_is_given_counts_more_than_an_earlier_value_that_would_hide_it(tmp_path):
    own = settings_file(tmp_path, "preset: demo\nfps: 1\nepochs: 2\n")
    config = parse_config(["--config", own])
    assert (config.nframes, config.fps, config.steps, config.epochs) == (None, 1.0, None, 2.0)
    own = settings_file(tmp_path, "nframes: 6\nsteps: 5\n")
    config = parse_config(["--config", own, "--max_frames", "8", "--epochs", "3"])
    assert (config.nframes, config.max_frames, config.steps, config.epochs) == (None, 8, None, 3.0)
    assert parse_config(["--config", own, "--epochs", "3", "--steps", "7"]).steps == 7


def test_what_one_setting_of_a_run_json_implied_ends_with_it(tmp_path):
    """Its run.json says that the vision tower is frozen because the run had adapters; so for the dynamic filter."""
    own = str(tmp_path / "run.json")
    save_config(parse_config(["--lora_rank", "8", "--dynamic_sampling", "3"]), own)
    config = parse_config(["--config", own])
    assert config.freeze_vision and config.dynamic_filter
    config = parse_config(["--config", own, "--lora_rank", "0", "--dynamic_sampling", "0"])
    assert not config.freeze_vision and not config.dynamic_filter
    save_config(parse_config(["--freeze_vision", "--dynamic_filter"]), own)
    config = parse_config(["--config", own, "--lora_rank", "0", "--dynamic_sampling", "0"])
    assert config.freeze_vision and config.dynamic_filter, "asked for by name"


def test_a_flag_counts_more_than_what_a_file_has_for_the_other_case(tmp_path):
    """A feature cache beside a tower that is trained would give sampling, or training too, the features of before."""
    own = str(tmp_path / "run.json")
    save_config(parse_config(["--freeze_vision", "--feature_cache", "kept"]), own)
    assert parse_config(["--config", own]).feature_cache == "kept"
    assert parse_config(["--config", own, "--no-freeze_vision"]).feature_cache is None
    own = settings_file(tmp_path, "preset: time-r1\nfeature_cache: kept\n")
    assert parse_config(["--config", own, "--no-freeze_vision"]).feature_cache is None
    own = settings_file(tmp_path, "ref_sync_steps: 5\n")
    assert parse_config(["--config", own]).ref_sync_steps == 5
    assert parse_config(["--config", own, "--lora_rank", "4"]).ref_sync_steps == 0


def test_a_flag_that_turns_a_files_kl_into_none_is_refused(tmp_path):
    own = settings_file(tmp_path, "kl_in: reward\nkl_estimator: k1\n")
    with pytest.raises(ConfigError, match="^--kl_in loss: the mean gradient of --kl_estimator k1 is then 0; set k2"):
        parse_config(["--config", own, "--kl_in", "loss"])
    with pytest.raises(ConfigError, match="^--kl_estimator k3: hardly pulls with --kl_in reward; set k1, or --kl_in"):
        parse_config(["--config", own, "--kl_estimator", "k3"])
    assert parse_config(["--config", own, "--kl_in", "loss", "--kl_estimator", "k3"]).kl_in == "loss"


def test_help_shows_the_values_of_a_file(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse_config(["--help", "--config", settings_file(tmp_path, "preset: demo\ngroup_size: 31")])
    shown = " ".join(capsys.readouterr().out.split())
    assert "[31]" in entry(shown, "group_size") and "[demo]" in entry(shown, "preset")
    assert "the values of --preset demo and --config " in shown


@pytest.mark.parametrize("text, words", [
    ("grup_size: 8", "own.yaml: unknown setting grup_size (did you mean group_size?)"),
    ("lr: 1e-5", "unknown setting lr (did you mean learning_rate?)"),
    ("clip_low: 0.1", "unknown setting clip_low (did you mean clip_eps_low?)"),
    ("zzz: 8", "unknown setting zzz (see --help)"),
    ("1: 2", "unknown setting 1 (see --help)"),
    ("steps: ten", "own.yaml: steps must be a whole number, and is 'ten'"),
    ("group_size: 4.5", "group_size must be a whole number, and is 4.5"),
    ("learning_rate: [1]", "learning_rate must be a number, and is [1]"),
    ("learning_rate:", "learning_rate must be a number, and is None"),
    ("demo: 1", "demo must be true or false, and is 1"),
    ("reward: [accuracy: 1]", "reward must be a list of texts, and is [{'accuracy': 1}]"),
    ("lr_schedule: wavy", "lr_schedule must be one of linear, cosine, constant, and is wavy"),
    ("preset: dappo", "preset must be one of open-r1-video, video-r1,"),
    ("group_size: 1", "--group_size 1: must be at least 2"),
    ("dual_clip: 3\nloss: cispo", "--dual_clip 3.0: bounds the clip of ppo"),
    ("resume: no", "own.yaml: resume is not a setting of a run; give it as --resume"),
    ("", "own.yaml: must hold settings, such as `group_size: 8`"),
    ("a: [", "own.yaml: is not YAML: while parsing"),
])  # fmt: skip
def test_a_mistake_in_a_settings_file_is_one_line(text, words, tmp_path, capsys):
    assert train.main(["--config", settings_file(tmp_path, text)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("train.py: error: ") and words in line


def test_a_settings_file_that_is_not_there_or_no_json_is_one_line(tmp_path, capsys):
    for path, words in ((str(tmp_path / "gone.yaml"), "gone.yaml: No such file or directory; a relative path starts"),
                        (settings_file(tmp_path, "{x", "run.json"), "run.json: is not JSON")):  # fmt: skip
        assert train.main(["--config", path]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert words in line


def test_a_part_of_a_file_that_a_flag_overrides_contradicts_nothing(tmp_path):
    own = settings_file(tmp_path, "loss: ppo\ndual_clip: 3\nkl_estimator: k2\n")
    config = parse_config(["--config", own, "--kl_coef", "0"])
    assert (config.kl_coef, config.kl_estimator) == (0.0, "k2"), "nobody could leave it out"


@pytest.mark.parametrize("typed, meant", [
    ("--lr", "--learning_rate"), ("--beta", "--kl_coef"), ("--num_generations", "--group_size"),
    ("--importance_cap", "--tis_cap"), ("--filter_groups", "--dynamic_filter"), ("--grup_size", "--group_size"),
])  # fmt: skip
def test_flags_of_other_trainers_and_of_earlier_versions_are_answered(typed, meant, capsys):
    with pytest.raises(SystemExit):
        parse_config([typed, "1"])
    assert f"did you mean {meant}?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong, flag", [("--bta", "kl_coef"), ("--max_step", "steps"), ("--learning-rate", "learning_rate")]
)
def test_a_misspelt_flag_of_another_trainer_is_understood(capsys, wrong, flag):
    with pytest.raises(SystemExit):
        parse_config([wrong, "1"])
    assert f"(did you mean --{flag}?)" in capsys.readouterr().err


def test_a_missing_model_is_named_before_the_demo_is_built():
    """Its videos take minutes."""
    config = parse_config(["--preset", "demo", "--model", "runs/no/such/warmup", "--sft_steps", "0"])
    with pytest.raises(ConfigError, match="--model runs/no/such/warmup: not on this machine; there is no such folder"):
        check_inputs(config)
