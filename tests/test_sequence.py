"""Ranks that share each prompt (--sequence_parallel) against one process: the same scores, gradients and samples."""

import math
import sys

import pytest
import torch
from conftest import FAMILIES, assert_close_to_scale
from processes import (
    ROOT,
    assert_same_run,
    back_to,
    finish,
    kill,
    launch,
    metrics_of,
    run_here,
    start,
    start_command,
    wait_for,
)
from scripted_train import scripted
from sequence_ranks import ROWS, outcomes
from test_checkpoint import LONG

import grpo.rollout
from grpo import sequence
from grpo.engine.distributed import start as start_group
from grpo.engine.model_files import read_config
from grpo.errors import ConfigError
from video.files import read_rows
from video.prompt import encoders


@pytest.mark.slow
@pytest.mark.parametrize("count, families", [(2, FAMILIES[1:2]), (2, FAMILIES), (4, FAMILIES)])
def test_ranks_that_share_a_prompt_equal_one_process(checkpoints, tmp_path, count, families):
    """All families, several kinds of prompts, rows that 2 and 4 do not divide, more ranks than key/value heads (4 to
    2), than frames or than completions."""
    folders = [str(checkpoints[family]) for family in families]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    finish(
        start_command([*torchrun, str(ROOT / "tests/sequence_ranks.py"), str(count), str(tmp_path / "of"), *folders])
    )
    expected, found = outcomes(folders, torch.device("cpu")), torch.load(tmp_path / "of", weights_only=False)
    for folder in folders:
        ours, theirs = found["results"][folder], expected[folder]
        lengths = [row["length"] for row in theirs["rows"].values()]
        assert any(length % 2 for length in lengths) and any(length % 4 for length in lengths)
        for name in ROWS:
            assert_same_row(ours["rows"][name], theirs["rows"][name], f"{folder} {name}")
            shares = [share[folder][name] for share in found["patches"]]
            assert sum(shares) == theirs["rows"][name]["patches"], "each patch is encoded by one rank"
        assert_same_samples(ours["samples"], theirs["samples"])
        assert_sent_as_the_formula_says(read_config(folder).text_config, ours, count)


def assert_same_row(ours, theirs, name):
    for part in ("logprobs", "entropy"):
        assert (ours[part] - theirs[part]).abs().max() <= 1e-5, (name, part)
    assert not ours["missing"], name
    for parameter, gradient in ours["gradients"].items():
        if parameter in theirs["gradients"]:
            assert_close_to_scale(gradient, theirs["gradients"][parameter], 1e-4, f"{name} {parameter}")
        else:  # the tower of text alone
            assert not gradient.any(), (name, parameter)


def assert_sent_as_the_formula_says(text, found, count):
    """docs/performance.md: the bytes that a rank sends of a row of L tokens, in fp32 here."""
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    token = text.num_hidden_layers * head_size * 4  # bytes of one head of a token
    repeated = math.lcm(text.num_key_value_heads, count)
    for row in found["rows"].values():  # forward, recomputation and backward
        share = -(-row["length"] // count)
        one_way = (count - 1) * share * token * (2 * text.num_attention_heads + 2 * repeated) // count
        assert row["sent"]["heads"] == 3 * one_way
    for row in found["samples"].values():  # the prefill alone: decoding sends nothing
        share = -(-row["length"] // count)
        one_way = (count - 1) * share * token * (2 * text.num_attention_heads + 2 * repeated) // count
        assert row["sent"]["heads"] == one_way
        assert row["sent"]["prompt"] == (count - 1) * share * token * 2 * text.num_key_value_heads


def assert_same_samples(ours, theirs):
    for key, expected_rows in theirs.items():
        for (tokens, logprobs), (expected, their_logprobs) in zip(
            ours[key]["rows"], expected_rows["rows"], strict=True
        ):
            assert torch.equal(tokens, expected), key
            assert (logprobs - their_logprobs).abs().max() <= 1e-5, key


def test_ranks_that_cannot_share_are_refused_in_one_line(monkeypatch):
    with pytest.raises(
        ConfigError, match="--sequence_parallel 3: must divide the model's 4 attention heads; give 1, 2, 4"
    ):
        sequence.check_heads(4, 3)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="--sequence_parallel 3: must divide the number of processes, 4"):
        start_group("cpu", sequence_parallel=3)


def test_time_steps_are_shared_by_patches():
    assert [ranks.tolist() for ranks in encoders([(4, 6, 6), (1, 4, 4)], 2)] == [[0, 0, 1, 1], [1]]
    assert encoders([(6, 2, 2)], 4)[0].tolist() == [0, 1, 1, 2, 3, 3]  # by the middles of the steps


S2, S4 = ("--sequence_parallel", "2"), ("--sequence_parallel", "4")


@pytest.mark.slow
@pytest.mark.parametrize("processes, shared", [(2, S2), (4, S2), (4, S4)], ids=["1x2", "2x2", "1x4"])
def test_a_run_that_shares_prompts_equals_one_process(world, tmp_path, processes, shared):
    """Three steps of train.py: metrics, moments, weights, and evaluation before and after."""
    alone = run_here(tmp_path / "1", world)
    together, output = launch(processes, tmp_path / "s", world, *shared)
    assert_same_run(together, alone, tmp_path / "s", tmp_path / "1")
    assert f"on {processes} x cpu, {shared[1]} to a prompt: " in output
    assert evaluations_of(tmp_path / "s") == evaluations_of(tmp_path / "1")


def evaluations_of(folder):
    return [row for row in metrics_of(folder) if row["phase"] == "eval"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ("--lora_rank", "4", "--learning_rate", "1e-2"),
        ("--freeze_vision",),
        ("--temporal_bonus", "0.3", "--reward", "accuracy:1", f"{ROOT}/tests/toy_reward.py:vowels:1"),
        ("--mini_batch_size", "4", "--ppo_epochs", "2", "--loss", "gspo"),
        ("--dynamic_sampling", "3", "--reward", "accuracy:1", f"{ROOT}/tests/toy_reward.py:vowels:1"),
        ("--activation_checkpointing", "none", "--kl_in", "reward", "--kl_estimator", "k1", "--ref_sync_steps", "2"),
        ("--activation_checkpointing", "selective"),
    ],
    ids=lambda more: " ".join(more[:2]),
)
def test_every_option_means_the_same(world, tmp_path, monkeypatch, more):
    """With scripted accuracies: a tiny model's answers are never right, so no group would have signal or a bonus."""
    monkeypatch.setattr(grpo.rollout, "score_groups", scripted)
    alone = run_here(tmp_path / "1", world, *more)
    together, _ = launch(2, tmp_path / "2", world, *more, *S2, script="tests/scripted_train.py")
    assert_same_run(together, alone, tmp_path / "2", tmp_path / "1")


@pytest.mark.slow
def test_resumed_by_another_number_of_ranks_to_a_prompt(world, tmp_path):
    alone = run_here(tmp_path / "1", world, *LONG)
    launch(2, tmp_path / "2", world, *LONG, *S2)
    for count, shared in ((1, ()), (2, ()), (4, S2), (4, S4)):
        folder = back_to(tmp_path / "2", 2, tmp_path / f"to {count} {' '.join(shared)}")
        resumed, _ = launch(count, folder, world, *LONG, *shared)
        assert_same_run(resumed, alone, folder, tmp_path / "1", step=4)


@pytest.mark.slow
def test_killed_and_resumed_by_another_number_of_ranks_to_a_prompt(world, tmp_path):
    """SIGKILL after the first checkpoint."""
    more = ("--save_every", "1", "--steps", "4", "--keep_checkpoints", "9")
    alone, folder = run_here(tmp_path / "1", world, *more), tmp_path / "killed"
    process = start(2, folder, world, *more, *S2)
    wait_for(lambda: (folder / "checkpoint-2").exists(), process)
    kill(process)
    process.communicate()
    resumed, output = launch(4, folder, world, *more, *S4)
    assert "goes on from" in output
    assert_same_run(resumed, alone, folder, tmp_path / "1", step=4)


@pytest.mark.slow
def test_a_sample_that_one_rank_cannot_read_is_skipped_by_all(world, tmp_path):
    """The first rank of the group cannot open every fifth video: the second must not wait for it."""
    script = tmp_path / "blind.py"
    script.write_text(
        f"import os, sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import train\n"
        "from video.frames import VideoError\n"
        "from video.prompt import PromptEncoder\n"
        "real = PromptEncoder.__call__\n"
        "def encode(self, sample, control=None):\n"
        "    if os.environ['RANK'] == '0' and sample.key.endswith('5'):\n"
        "        raise VideoError('there.mp4', 'a disk of this process alone')\n"
        "    return real(self, sample, control)\n"
        "PromptEncoder.__call__ = encode\n"
        "sys.exit(train.main())\n"
    )
    rows, output = launch(2, tmp_path / "2", world, *S2, script=script)
    assert sum(row["skipped"] for row in rows) > 0
    assert output.count("a disk of this process alone") == sum(row["skipped"] for row in rows)


@pytest.mark.slow
def test_eval_answers_alike(world, tmp_path):
    run_here(tmp_path / "1", world)
    for name, launcher in (("one", ()), ("two", ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"))):
        own = ["--ckpt", tmp_path / "1" / "checkpoint-3", "--output", tmp_path / name, "--mode", "both", "--controls"]
        finish(start_command([sys.executable, *launcher, ROOT / "eval.py", *map(str, own), *(S2 if launcher else ())]))
    one, two = (read_rows(tmp_path / name / "predictions.jsonl", ("key",)) for name in ("one", "two"))
    assert one == two and one
