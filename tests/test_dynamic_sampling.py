"""Dynamic sampling: groups without signal, and samples that cannot be read, are replaced by the next prompts of the
data, within a budget, on any number of processes, and a resumed run draws what the uninterrupted one draws."""

import json
import os
import signal
from types import SimpleNamespace

import pytest
import torch
from conftest import make_prompt
from processes import ROOT, assert_same_run, back_to, kill, launch, run_here, start, training_of, wait_for
from scripted_train import has_signal, number_of, scripted

import grpo.rollout
import train
from grpo.batch import RolloutGroup
from grpo.config import parse_config
from grpo.rollout import resample
from grpo.run.data import epoch_order
from grpo.run.log import completions_table
from video.loader import PromptLoader

ROWS, UNREADABLE, PROMPTS, BUDGET = 24, (1, 8, 13, 20), 6, 2


def group(signal):
    return SimpleNamespace(parts={"accuracy": [1.0, 0.0] if signal else [0.0, 0.0]})


@pytest.mark.parametrize("first, later, budget, asked", [
    ("1111", "", 3, []),  # all of the first have signal
    ("1100", "11", 3, [2]),
    ("1100", "1001", 3, [2, 1, 1]),
    ("1100", "1000", 2, [2, 1, 1]),  # 8 are drawn: the budget is spent, and one group is missing
    ("0000", "0" * 4, 2, [4]),
    ("0000", "0" * 8, 3, [4, 4]),
    ("1000", "111", 1, []),  # the budget allows the first alone
    ("11", "011", 3, [2, 1]),  # two of the first four could not be read
])  # fmt: skip
def test_the_budget_by_hand(first, later, budget, asked):
    config = parse_config(["--preset", "demo", "--prompts_per_step", "4", "--dynamic_sampling", str(budget)])
    source, counts = iter(later), []

    def more(count):
        counts.append(count)
        return [group(next(source) == "1") for _ in range(count)]

    groups, drawn = resample([group(mark == "1") for mark in first], more, config)
    assert counts == asked and drawn == 4 + sum(asked) <= 4 * budget
    assert len(groups) == len(first) + sum(asked), "groups without signal are reported, not lost"
    assert sum(len(set(g.parts["accuracy"])) > 1 for g in groups) <= 4


@pytest.fixture(scope="module")
def flags(world, tmp_path_factory):
    """The flags of a run on rows of which some cannot be read and some have no signal."""
    data = world[0]["train"]
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    assert len(rows) == ROWS
    for number, row in enumerate(rows):
        row["video"] = "missing.mp4" if number in UNREADABLE else str(data.parent / row["video"])
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ("--data", str(path), "--reward", "accuracy:1", f"{ROOT}/tests/toy_reward.py:vowels", "--eval_samples", "0",
            "--prompts_per_step", str(PROMPTS), "--dynamic_sampling", str(BUDGET), "--advantage", "batch",
            "--steps", "4", "--save_every", "2", "--keep_checkpoints", "9", "--show_every", "1")  # fmt: skip


@pytest.fixture
def events(monkeypatch):
    """What a scripted run in this process does: ("decode", rows) and ("update", rows of the groups trained on)."""
    seen, submit, update = [], PromptLoader.submit, train.update

    def decode(self, samples, *more):
        seen.append(("decode", [number_of(sample.key) for sample in samples]))
        return submit(self, samples, *more)

    def updated(policy, optimizer, steps, *more, **named):
        groups = [group for batches in steps for batch in batches for group in batch.rollouts]
        seen.append(("update", [number_of(group.prompt.sample.key) for group in groups]))
        assert all(len(set(group.parts["accuracy"])) > 1 for group in groups)
        return update(policy, optimizer, steps, *more, **named)

    monkeypatch.setattr(grpo.rollout, "score_groups", scripted)
    monkeypatch.setattr(PromptLoader, "submit", decode)
    monkeypatch.setattr(train, "update", updated)
    return seen


def position_of(folder, step):
    return json.loads((folder / f"checkpoint-{step}" / "training" / "state.json").read_text())["position"]


def test_a_run_draws_the_data_in_order_and_trains_on_what_has_signal(world, flags, events, tmp_path):
    rows = run_here(tmp_path, world, *flags)
    drawn = [number for event, numbers in events if event == "decode" for number in numbers]
    counts = [int(row["prompts_drawn"]) for row in rows]
    endless = [number for epoch in range(3) for number in epoch_order(ROWS, 42, epoch)]
    assert drawn == endless[: sum(counts)], "no prompt is lost or comes twice in an epoch; none is decoded in vain"
    assert sum(counts) > ROWS and PROMPTS < max(counts) == PROMPTS * BUDGET, "an epoch ends, and a budget is spent"
    assert [position_of(tmp_path, step) for step in (2, 4)] == [sum(counts[:2]), sum(counts)]

    trained = [numbers for event, numbers in events if event == "update"]
    for row, count, own in zip(rows, counts, trained, strict=True):
        step, drawn = drawn[:count], drawn[count:]
        assert own == [number for number in step if has_signal(number) and number not in UNREADABLE]
        assert len(own) == PROMPTS or count == PROMPTS * BUDGET
        assert row["skipped"] == sum(number in UNREADABLE for number in step)

    ahead = [i for i, (event, numbers) in enumerate(events) if event == "decode" and len(numbers) == PROMPTS]
    updates = [i for i, (event, _) in enumerate(events) if event == "update"]
    assert all(any(i == update - 1 for i in ahead) for update in updates[:-1]), "decoded while the update runs"


def test_stopped_by_a_signal_and_resumed_equals_uninterrupted(world, flags, events, tmp_path, monkeypatch):
    whole = run_here(tmp_path / "whole", world, *flags)
    drawn = [numbers for event, numbers in events if event == "decode"]
    events.clear()
    update = train.update
    stop = lambda *given, **named: os.kill(os.getpid(), signal.SIGTERM) or update(*given, **named)
    with monkeypatch.context() as patch, pytest.raises(AssertionError):
        patch.setattr(train, "update", stop)
        run_here(tmp_path / "stopped", world, *flags)
    assert position_of(tmp_path / "stopped", 1) == whole[0]["prompts_drawn"]
    assert run_here(tmp_path / "stopped", world, *flags) == whole
    again = [numbers for event, numbers in events if event == "decode"]
    ahead = next(i for i in range(len(drawn)) if sum(map(len, drawn[:i])) == whole[0]["prompts_drawn"])
    assert again == drawn[: ahead + 1] + drawn[ahead:], "the second step's first prompts were decoded, but not used"


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(world, flags, events, tmp_path):
    """With a worker that decodes ahead, whose work is lost."""
    more = (*flags, "--save_every", "1", "--workers", "1")
    process = start(1, tmp_path / "killed", world, *more, script="tests/scripted_train.py")
    wait_for((tmp_path / "killed" / "checkpoint-2").exists, process)
    kill(process)
    process.communicate()
    whole = run_here(tmp_path / "whole", world, *more)
    assert run_here(tmp_path / "killed", world, *more) == whole
    ours, theirs = training_of(tmp_path / "killed", 4), training_of(tmp_path / "whole", 4)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_two_processes_equal_one_and_one_goes_on_from_two(world, flags, events, tmp_path):
    """With mini-batches and a reference that moves; at a low rate, for eight of Adam's steps blow up rounding."""
    more = (
        *flags,
        "--learning_rate",
        "1e-5",
        "--mini_batch_size",
        "4",
        "--ref_sync_steps",
        "2",
        "--prompts_per_forward",
        "1",
    )
    alone = run_here(tmp_path / "1", world, *more)
    together, _ = launch(2, tmp_path / "2", world, *more, script="tests/scripted_train.py")
    assert_same_run(together, alone, tmp_path / "2", tmp_path / "1", step=4)
    resumed = run_here(back_to(tmp_path / "2", 2, tmp_path / "2 to 1"), world, *more)
    assert_same_run(resumed, alone, tmp_path / "2 to 1", tmp_path / "1", step=4)
    for rows in (together, resumed):
        for name in ("prompts_drawn", "skipped"):
            assert [row[name] for row in rows] == [row[name] for row in alone]


def test_a_group_that_the_filter_left_out_is_shown(tiny_vl):
    """It has no advantages: it does not train."""
    group = RolloutGroup(make_prompt(tiny_vl[2], []), [], [], ["a", "b"], [True, True], rewards=[0.5, 1.0])
    assert completions_table(group).splitlines()[-2:] == ["| 0.5 | 0 | a |", "| 1 | 0 | b |"]
