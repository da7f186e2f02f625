"""Temporal contrast in the rollout: which prompts get a second group, of what frames, and what that adds to rewards."""

import json

import pytest
import torch
from conftest import ONE_FAST, PROMPT_KINDS, make_prompt
from processes import assert_same_run, launch, run_here

import grpo.rollout
import train
from demo.synthetic import DemoSpec, make_demo_set
from grpo.advantage import group_advantages
from grpo.batch import RolloutGroup
from grpo.config import parse_config
from grpo.rollout import rollout
from rewards import parse_rewards
from video.prompt import shuffle_frames

RIGHT, WRONG = "<answer>A</answer>", "<answer>B</answer>"


def config_of(*more):
    return parse_config(
        ["--preset", "demo", "--group_size", "4", "--max_new_tokens", "4", "--prompts_per_rollout", "2", *more]
    )


def frames_of(patches, grid):
    """(2 t, h w, 3, pixels of a patch) of one video's patches, place by place in plain loops: the oracle of the
    vectorised one."""
    t, h, w = grid
    area = patches.shape[1] // 6  # 14 x 14, or 16 x 16
    frames = torch.empty(2 * t, h * w, 3, area)
    for row, patch in enumerate(patches):
        for frame in range(2):
            for colour in range(3):
                frames[2 * (row // (h * w)) + frame, row % (h * w), colour] = patch[(colour * 2 + frame) * area :][
                    :area
                ]
    return frames


@pytest.mark.parametrize("kind", ["video", "two videos", "image and video"])
def test_frames_are_permuted_each_video_by_itself_and_nothing_else_changes(tiny, kind):
    prompt = make_prompt(tiny[2], PROMPT_KINDS[kind])
    kept = prompt.pixel_values_videos.clone()
    mixed, orders = shuffle_frames(prompt, "k"), []
    sizes = prompt.video_grid_thw.prod(dim=1).tolist()
    videos = zip(kept.split(sizes), mixed.pixel_values_videos.split(sizes), prompt.video_grid_thw.tolist())
    for before, after, grid in videos:
        before, after = frames_of(before, grid), frames_of(after, grid)
        order = [next(i for i, frame in enumerate(before) if torch.equal(frame, other)) for other in after]
        assert sorted(order) == list(range(2 * grid[0])) and order != sorted(order)
        orders.append(tuple(order))
    assert torch.equal(prompt.pixel_values_videos, kept), "the prompt itself is left as it was"
    for name in ("sample", "input_ids", "video_grid_thw", "pixel_values", "image_grid_thw", "seconds_per_grid"):
        assert getattr(mixed, name) is getattr(prompt, name)
    others = [shuffle_frames(prompt, f"k{n}").pixel_values_videos for n in range(9)]
    assert any(not torch.equal(other, others[0]) for other in others), "the key counts"


@pytest.fixture
def scripted(monkeypatch, tiny_vl):
    """rollout() of a script: the ordered group answers A A B B, the shuffled one A B; (run, calls of the sampler)."""
    calls = []

    def generate(policy, prompts, group_size, settings, seeds, tokenizer, features):
        calls.append((prompts, group_size, seeds))
        texts = {4: [RIGHT, RIGHT, WRONG, WRONG], 2: [RIGHT, WRONG]}[group_size]
        rows = [torch.zeros(4, dtype=torch.long)] * group_size
        return [RolloutGroup(prompt, rows, [], texts, []) for prompt in prompts]

    monkeypatch.setattr(grpo.rollout, "generate", generate)

    def run(prompts, *more, step=3):
        config = config_of("--reward", "accuracy:2", "format:0.5", *more)
        return rollout(tiny_vl[0], prompts, tiny_vl[2], parse_rewards(config.reward), config, step)

    return run, calls


def test_the_second_group_is_of_shuffled_frames_of_videos_alone(scripted, tiny_vl):
    run, calls = scripted
    prompts = [make_prompt(tiny_vl[2], grids, seed=n) for n, grids in enumerate(PROMPT_KINDS.values())]
    run(prompts, "--temporal_bonus", "0.3")
    ordered = [p for group, size, _ in calls if size == 4 for p in group]
    shuffled = [p for group, size, _ in calls if size == 2 for p in group]
    assert [id(p) for p in ordered] == [id(p) for p in prompts]
    timed = [p for p in prompts if p.video_grid_thw is not None]
    assert [p.sample for p in shuffled] == [p.sample for p in timed] and len(timed) == 4
    for before, after in zip(timed, shuffled):
        assert not torch.equal(before.pixel_values_videos, after.pixel_values_videos)
    seeds = [seed for _, _, seeds in calls for seed in seeds]
    assert len(set(seeds)) == len(seeds) == len(prompts) + len(timed), "no group's numbers are another's"

    first = shuffled[0].pixel_values_videos
    calls.clear()
    run(prompts, "--temporal_bonus", "0.3", step=4)
    assert not torch.equal(first, next(group[0] for group, size, _ in calls if size == 2).pixel_values_videos)
    calls.clear()
    run(prompts)
    assert {size for _, size, _ in calls} == {4}, "off: no second group"


@pytest.mark.parametrize(
    "more, total", [([], [2.0, 2.0, 0.0, 0.0]), (["--temporal_bonus", "0.3"], [2.3, 2.3, 0.0, 0.0]),
                    (["--temporal_bonus", "0.3", "--temporal_threshold", "1.0"], [2.3, 2.3, 0.0, 0.0]),
                    (["--temporal_bonus", "0.3", "--temporal_threshold", "1.01"], [2.0, 2.0, 0.0, 0.0])],
)  # fmt: skip
def test_rewards_and_advantages_by_hand(scripted, tiny_vl, more, total):
    """Half of either group is right; two rewards of 2 (or 2.3) and two of 0, of deviation 2 / sqrt(3)."""
    run, _ = scripted
    video, image = (make_prompt(tiny_vl[2], PROMPT_KINDS[kind], seed=n) for n, kind in enumerate(("video", "image")))
    timed, still = run([video, image], *more)
    assert timed.rewards == pytest.approx(total) and still.rewards == [2.0, 2.0, 0.0, 0.0]
    high = total[0] / 2 / (total[0] / 3**0.5 + 1e-4)
    assert group_advantages(timed.rewards).tolist() == pytest.approx([high, high, -high, -high], rel=1e-6)
    assert "temporal_bonus" not in still.parts and "shuffled_accuracy" not in still.parts
    if more:
        assert timed.parts["shuffled_accuracy"] == [0.5] * 4
        assert timed.parts["temporal_bonus"] == pytest.approx([total[0] - 2.0, total[1] - 2.0, 0.0, 0.0])
        assert timed.parts["accuracy"] == [1.0, 1.0, 0.0, 0.0], "raw"


def test_rollouts_do_not_depend_on_the_prompts_beside_them(tiny_vl):
    """So they are the same on one process and on several."""
    policy, _, tokenizer = tiny_vl
    config = config_of("--temporal_bonus", "0.3", "--reward", "accuracy:1", "length_cosine:1")
    prompts = [make_prompt(tokenizer, PROMPT_KINDS["video"], seed=n) for n in range(3)]
    rewards = parse_rewards(config.reward)
    together = rollout(policy, prompts, tokenizer, rewards, config, step=1)
    for prompt, group in zip(prompts, together):
        (alone,) = rollout(policy, [prompt], tokenizer, rewards, config, step=1)
        assert alone.texts == group.texts and alone.rewards == group.rewards and alone.parts == group.parts


@pytest.mark.parametrize("family", ONE_FAST)
def test_a_run_with_temporal_contrast(tmp_path, checkpoints, family, capsys):
    data = make_demo_set(tmp_path / "data", DemoSpec(train=16, val=2, warmup=16))
    flags = [
        "--preset", "demo", "--no-demo", "--model", str(checkpoints[family]), "--output", str(tmp_path / "run"),
        "--data", str(data["train"]), "--sft_data", str(data["warmup"]), "--sft_steps", "30",
        "--sft_learning_rate", "2e-3",
        "--steps", "4", "--prompts_per_step", "4", "--group_size", "6", "--max_new_tokens", "20", "--eval_samples", "0",
        "--workers", "0", "--temporal_bonus", "0.3",
    ]  # fmt: skip
    assert train.main(flags) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["phase"] == "train"]
    assert len(steps) == 4 and any(row["temporal_bonus"] > 0 for row in steps)
    for row in steps:
        assert 0 <= row["shuffled_accuracy"] <= 1 and 0 <= row["temporal_bonus"] <= 0.3
        assert row["reward"] == pytest.approx(row["accuracy"] + 0.5 * row["format"] + row["temporal_bonus"])
    assert train.main([*flags, "--reward", "format:1"]) == 2
    assert "--temporal_bonus looks at the accuracy; add accuracy:1 to --reward" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_temporal_contrast_on_two_processes_equals_one(world, tmp_path):
    """Every third row is text alone, so one process samples second groups while the other has none."""
    rows = [json.loads(line) | {"key": n} for n, line in enumerate(world[0]["train"].read_text().splitlines())]
    for row in rows:
        row["video"] = str(world[0]["train"].parent / row["video"]) if row["key"] % 3 else None
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run_here(tmp_path / "0", world, "--sft_data", str(world[0]["warmup"]), "--sft_steps", "25", "--steps", "0",
             "--sft_learning_rate", "2e-3", "--eval_samples", "0")  # fmt: skip
    more = ("--data", str(tmp_path / "d.jsonl"), "--model", str(tmp_path / "0" / "warmup"), "--max_new_tokens", "20",
            "--reward", "accuracy:1", "format:0.5", "--group_size", "4", "--temporal_bonus", "0.3")  # fmt: skip
    alone = run_here(tmp_path / "1", world, *more)
    together, _ = launch(2, tmp_path / "2", world, *more)
    assert_same_run(together, alone, tmp_path / "2", tmp_path / "1")
    for one, two in zip(alone, together):
        assert one["shuffled_accuracy"] == pytest.approx(two["shuffled_accuracy"])
        assert one["temporal_bonus"] == pytest.approx(two["temporal_bonus"])
    assert any(row["temporal_bonus"] > 0 for row in alone) and any(row["shuffled_accuracy"] > 0 for row in alone)
