"""Every preset: its values contradict nothing, --help shows them, and three steps train a tiny model."""

import json
import math
import random
import re

import pytest

import train
from demo.synthetic import DemoSpec, make_demo_set
from demo.tiny import build_tiny_model
from grpo.config import PRESETS, Config, as_typed, check, check_combinations, load_config, parse_config, save_config
from grpo.errors import ConfigError

PUBLISHED = [name for name in PRESETS if name != "demo"]
SIZES = {  # the only values of a preset that a small run changes, beside paths and steps
    "prompts_per_step": 4, "mini_batch_size": 1, "group_size": 4, "max_new_tokens": 16, "dynamic_sampling": 3,
    "max_frames": 4, "min_pixels": 784, "max_pixels": 784, "total_pixels": 3136,
}  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_contradicts_nothing(name):
    config = parse_config(["--preset", name])
    assert {flag: getattr(config, flag) for flag in PRESETS[name]} == PRESETS[name] and config.preset == name
    check(Config(**PRESETS[name]))
    check_combinations(Config(**PRESETS[name]), PRESETS[name])


@pytest.mark.parametrize("name", PUBLISHED)
def test_help_with_a_preset_shows_its_values(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")  # an entry is the flag's line and at most one more
    with pytest.raises(SystemExit):
        parse_config(["--preset", name, "--help"])
    shown = capsys.readouterr().out
    for flag, value in PRESETS[name].items():
        entry = re.search(rf"^  --{flag}[ ,].*(\n {{20,}}.*)?", shown, re.MULTILINE)[0]
        assert entry.endswith(f" [{' '.join(as_typed(value).split())}]"), flag


def test_published_values_number_for_number():
    """What the sources name; each is cited in presets.yaml."""
    expected = {
        "video-r1": dict(temporal_bonus=0.3, temporal_threshold=0.8, kl_coef=0.04, group_size=8, lr_schedule="cosine",
                         weight_decay=0.01, grad_clip=5.0, max_new_tokens=768, max_prompt_tokens=16384, max_frames=16,
                         learning_rate=1e-6, max_pixels=128 * 28**2, prompts_per_step=4, steps=1200),
        "qwen2.5-vl-7b": dict(model="Video-R1/Qwen2.5-VL-7B-COT-SFT", temporal_bonus=0.3, kl_coef=0.04, grad_clip=5.0,
                              reward=("accuracy:1", "format:1", "length_window:0.2"), max_pixels=128 * 28**2),
        "qwen3-vl-8b": dict(model="Qwen/Qwen3-VL-8B-Instruct", prompts_per_step=256, mini_batch_size=0, group_size=8,
                            clip_eps_low=0.2, clip_eps_high=0.28, dual_clip=3.0, kl_coef=0.0, max_new_tokens=4096,
                            max_prompt_tokens=20000, max_frames=128, fps=2.0, max_pixels=512**2, freeze_vision=False,
                            image_max_pixels=1024**2, lr_schedule="constant", weight_decay=0.01, learning_rate=1e-6,
                            loss_normaliser="token", reward=("accuracy:0.9", "format:0.1"), temperature=1.0,
                            adam_beta2=0.999, grad_clip=1.0, steps=200),
        "dapo": dict(clip_eps_low=0.2, clip_eps_high=0.28, loss_normaliser="token", kl_coef=0.0, learning_rate=1e-6,
                     lr_schedule="constant", lr_warmup_steps=20, prompts_per_step=512, group_size=16,
                     mini_batch_size=512 // 16, max_new_tokens=16384 + 4096, dynamic_filter=True, grad_clip=1.0),
        "dr-grpo": dict(loss_normaliser="constant", advantage="none", kl_coef=0.0, group_size=8, prompts_per_step=128,
                        mini_batch_size=128 // 8, max_new_tokens=3000, lr_schedule="constant", temperature=1.0),
        "gspo": dict(loss="gspo", loss_normaliser="sequence", clip_eps_low=3e-4, clip_eps_high=4e-4, kl_coef=0.0,
                     prompts_per_step=4 * 128, mini_batch_size=128),
        "time-r1": dict(group_size=8, max_new_tokens=200, prompts_per_step=2, epochs=5.0, freeze_vision=True,
                        total_pixels=3584 * 28**2, min_pixels=16 * 28**2, reward=("timestamp_iou:1", "format:1")),
    }  # fmt: skip
    assert {*expected, "open-r1-video"} <= set(PUBLISHED)
    for name, values in expected.items():
        config = parse_config(["--preset", name])
        assert {flag: getattr(config, flag) for flag in values} == values, name


def test_a_mistake_in_a_preset_of_your_own_is_one_line(monkeypatch):
    """And numbers may be written as YAML reads as text."""
    monkeypatch.setitem(PRESETS, "mine", {"lr_shedule": "cosine"})
    with pytest.raises(
        ConfigError, match=r"^grpo/presets.yaml, mine: unknown setting lr_shedule \(did you mean lr_sch"
    ):
        parse_config(["--preset", "mine"])
    monkeypatch.setitem(PRESETS, "mine", {"group_size": "many"})
    with pytest.raises(ConfigError, match="^grpo/presets.yaml, mine: group_size must be a whole number, and is 'many'"):
        parse_config(["--preset", "mine"])
    monkeypatch.setitem(PRESETS, "mine", {"learning_rate": "1e-5", "reward": ("accuracy:2",)})
    config = parse_config(["--preset", "mine"])
    assert (config.learning_rate, config.reward) == (1e-5, ("accuracy:2",))


def test_a_flag_counts_more_than_a_preset_that_it_contradicts():
    """Nobody could leave out what the preset sets."""
    assert parse_config(["--preset", "dapo", "--loss", "sapo"]).loss == "sapo"
    with pytest.raises(ConfigError, match="--clip_eps_high 0.3: --loss sapo has a sigmoid"):
        parse_config(["--preset", "dapo", "--loss", "sapo", "--clip_eps_high", "0.3"])
    with pytest.raises(ConfigError, match="--mini_batch_size 32: is above --prompts_per_step 4; lower it"):
        parse_config(["--preset", "dapo", "--prompts_per_step", "4"])


def test_a_run_json_that_names_the_default_preset_by_its_earlier_name_is_read(tmp_path):
    save_config(parse_config([]), tmp_path / "run.json")
    saved = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(saved | {"preset": "qwen2-vl-7b"}))
    assert load_config(tmp_path / "run.json") == parse_config([])


def flags_of(name, **values):
    """A command line: the preset, smaller wherever it sets a size, on one CPU thread."""
    small = {flag: size for flag, size in SIZES.items() if getattr(parse_config(["--preset", name]), flag)}
    run = {"preset": name, "eval_samples": 0, "workers": 0, "threads": 1, "device": "cpu", "prompts_per_forward": 8,
           "prompts_per_rollout": 8}  # fmt: skip
    words = [word for flag, value in {**run, **small, **values}.items() for word in (f"--{flag}", str(value))]
    return [*words, "--activation_checkpointing", "none"]


@pytest.fixture(scope="module")
def choices(tmp_path_factory):
    return make_demo_set(tmp_path_factory.mktemp("choices"), DemoSpec(train=24, val=1, warmup=2))


@pytest.fixture(scope="module")
def moments(tmp_path_factory):
    """{part: file} of questions for a time; in the warm-up each is answered by four random spans."""
    rng, root = random.Random(0), tmp_path_factory.mktemp("moments")
    videos = make_demo_set(root, DemoSpec(train=24, val=2, warmup=8))
    words = lambda: f"{rng.randrange(4) / 2} to {2 + rng.randrange(4) / 2}"
    for part in ("train", "warmup"):
        rows = [json.loads(line) for line in videos[part].read_text().splitlines()]
        rows = [
            {
                "problem": "When is the shape on the left?", "solution": f"<answer>{words()}</answer>",
                "problem_type": "temporal grounding", "duration": 4.0, "video": row["video"],
                "completions": [f"<answer>{words()}</answer>" for _ in range(4)],
            }
            for row in rows
        ]  # fmt: skip
        videos[part].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return videos


@pytest.fixture(scope="module")
def warmed(choices, tmp_path_factory):
    """A tiny model that gives answers, some of them right, in the form that the prompt asks for."""
    root = tmp_path_factory.mktemp("warmed")
    paths = {"model": build_tiny_model(root / "model", seed=1), "data": choices["train"], "output": root / "run"}
    sft = {"sft_data": choices["warmup"], "sft_steps": 40, "sft_learning_rate": 5e-3, "sft_prompts_per_step": 8}
    assert train.main(flags_of("open-r1-video", **paths, **sft, steps=0)) == 0
    return root / "run" / "warmup"


SLOW = ("qwen2.5-vl-7b", "qwen3-vl-8b", "time-r1")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in PUBLISHED])
def test_a_preset_trains_a_tiny_model_for_three_steps(name, warmed, choices, moments, checkpoints, tmp_path):
    """video-r1 and time-r1 in two stages; the first also teaches the model to answer a prompt of other words.
    qwen3-vl-8b too: its tiny model is of its own family, and not warmed."""
    data = moments if name == "time-r1" else choices
    model = checkpoints["qwen3_vl"] if name == "qwen3-vl-8b" else warmed
    steps = {"video-r1": 15, "qwen2.5-vl-7b": 15, "qwen3-vl-8b": 40, "time-r1": 40}.get(name)
    sft = {"sft_data": data["warmup"], "sft_steps": steps, "sft_learning_rate": 5e-3} if steps else {}
    assert train.main(flags_of(name, model=model, data=data["train"], output=tmp_path, steps=3, **sft)) == 0
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["phase"] == "train"]
    assert len(steps) == 3 and all(math.isfinite(row["loss"]) and row["updates_skipped"] == 0 for row in steps)
    assert any(row["grad_norm"] > 0 for row in steps), [row["reward"] for row in steps]
    assert name != "time-r1" or any(row["timestamp_iou"] > 0 for row in steps)
