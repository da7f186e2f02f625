"""Rewards: functions of text and sample. This file picks, weighs and sums those that `--reward` names.

A reward is `f(completion, sample) -> float`, or `f(completion, sample, group) -> float` if it depends on the other
completions of the prompt (see `Group`). It is called once for each completion. `sample` has `answer` (the ground
truth), `problem_type`, `options`, `problem` and `meta`. To add a reward, write one such function, `def` or `async def`,
in a file, and name it:

    --reward accuracy:1 format:0.5 my_file.py:my_function:0.3

The file runs in a process of its own (see `rewards.user`), and can import the files beside it.

The reward `accuracy` depends on the sample's problem type: `rewards.problem_types` has one function for each type.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rewards.answer import answer_text
from rewards.grounding import timestamp_iou
from rewards.length import length_cosine, length_window, repetition, soft_overlong
from rewards.problem_types import ACCURACY
from rewards.think_format import tag_count, think_format
from rewards.user import arguments_needed, reward_file
from video.formats import Sample


@dataclass(frozen=True)
class Group:
    """The completions of one prompt, for a reward that compares them."""

    completions: list[str]  # the texts
    index: int  # of the completion that is being scored
    lengths: list[int]  # of each completion, in tokens; empty if the caller gave no lengths
    accuracy: list[float]  # of each completion, unweighted; empty if accuracy is not among the rewards
    max_new_tokens: int = 0  # the length at which completions are truncated; 0 if the caller gave no limit


@dataclass(frozen=True)
class Reward:
    """One entry of `--reward`."""

    name: str  # under which its values are logged
    weight: float  # what its value is multiplied by in the total
    function: Callable  # of a list of calls and their time limit in seconds -> [(value, message)]: `RewardFile.call`
    arguments: int  # of each call: 2 are (completion, sample), 3 are (completion, sample, group)
    user: bool  # whether the user wrote it: then a call may fail


def score_prediction(prediction: str | None, sample: Sample) -> float:
    """The accuracy, in [0, 1], of a prediction (see `answer_text`) by the sample's problem type; 0.0 for None.

    Evaluation calls it with `answer_text(completion, strict=False)`. Raises ValueError for an unknown problem type, and
    for a ground truth that does not fit its type.
    """
    try:
        if sample.problem_type not in ACCURACY:
            raise ValueError(f"unknown problem_type {sample.problem_type!r}; known: {', '.join(ACCURACY)}")
        # None is scored as "", which is wrong in every type, so that an unfit ground truth raises all the same.
        return ACCURACY[sample.problem_type](prediction or "", sample)
    except ValueError as error:
        raise ValueError(f"sample {sample.key!r}: {error}") from error


def accuracy(completion: str, sample: Sample) -> float:
    """How right the one answer in the answer tag is, in [0, 1]; 0.0 if there is no answer, or several."""
    return score_prediction(answer_text(completion), sample)


def check_sample(sample: Sample) -> None:
    """Raises ValueError or ImportError if `accuracy` cannot score this sample. Called before training."""
    score_prediction(None, sample)


REWARDS: dict[str, Callable] = {
    "accuracy": accuracy,
    "format": think_format,
    "tag_count": tag_count,
    "repetition": repetition,
    "length_window": length_window,
    "length_cosine": length_cosine,
    "soft_overlong": soft_overlong,
    "timestamp_iou": timestamp_iou,
}
NEED_ACCURACY = ("length_window", "length_cosine")


def parse_rewards(specs: list[str]) -> list[Reward]:
    """The rewards that `--reward` names: `NAME[:WEIGHT]` or `FILE.py:FUNCTION[:WEIGHT]`; the default weight is 1.

    A weight is any finite number but 0; a negative weight makes the reward a penalty. Raises ValueError, which names
    the flag. Accuracy comes first in the list, because group rewards read its values.
    """
    if not specs:
        raise ValueError("--reward: at least one is needed, such as accuracy:1")
    rewards: dict[str, Reward] = {}
    for spec in specs:
        try:
            reward = _parse_reward(spec)
            if reward.name in rewards or (reward.user and reward.name in REWARDS):
                raise ValueError(f"the name {reward.name!r} is taken; give each reward a name of its own")
            rewards[reward.name] = reward
        except (ValueError, ImportError, OSError) as error:
            raise ValueError(f"--reward {spec}: {error}") from error
    for name, reward in rewards.items():
        if name in NEED_ACCURACY and "accuracy" not in rewards:
            raise ValueError(f"--reward {name}: {name} depends on the accuracy; add accuracy:1")
    return sorted(rewards.values(), key=lambda reward: reward.name != "accuracy")


def _parse_reward(spec: str) -> Reward:
    """`my_file.py:f:0.3` -> the user's function f with weight 0.3; `format` -> think_format with weight 1."""
    file, is_file, rest = spec.partition(".py:")
    name, _, weight_text = (rest if is_file else spec).partition(":")
    if is_file:
        user_file = reward_file(str(Path(file + ".py").resolve()))
        function, arguments = functools.partial(user_file.call, name), user_file.functions().get(name)
    else:
        built_in = REWARDS.get(name)
        function = lambda calls, seconds: [(built_in(*call), "") for call in calls]
        arguments = arguments_needed(built_in) if built_in else 0
    if arguments not in (2, 3):
        raise ValueError(
            f"no reward called {name!r} takes (completion, sample) or (completion, sample, group); "
            f"use one of {', '.join(REWARDS)}, or FILE.py:FUNCTION for your own"
        )
    try:
        weight = float(weight_text or 1)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight) or weight == 0:
        raise ValueError("the weight must be finite and not 0; to drop a reward, leave it out")
    return Reward(name, weight, function, arguments, bool(is_file))


def score_group(
    rewards: list[Reward],
    completions: list[str],
    sample: Sample,
    lengths: list[int] | None = None,
    reward_timeout: float = 60.0,
    max_new_tokens: int = 0,
) -> tuple[list[float], dict[str, list[float]], dict[str, list[str]]]:
    """Scores the completions of one prompt -> (totals, parts, failures).

    totals[i]: sum over rewards r of r.weight * parts[r.name][i].
    parts[name][i]: the unweighted value of completion i; parts["accuracy"] is the raw accuracy.
    failures[name]: the messages of the reward's failed calls, in the order of the completions; only if calls failed.

    `lengths` are in tokens; the length rewards need them, and soft_overlong needs `max_new_tokens`. A user's reward has
    `reward_timeout` seconds for the group, all completions at once. A call of it that raises, is late, ends its process
    or returns no finite number scores 0. Each call gets a copy of the sample. An error in a built-in reward is a bug or
    a bad sample, and is raised.
    """
    totals, parts, failures = [0.0] * len(completions), {}, {}
    for reward in rewards:
        if not reward.user and reward.arguments == 3 and len(lengths or []) != len(completions):
            raise ValueError(f"{reward.name} needs the length in tokens of each completion")
        group = functools.partial(Group, completions, max_new_tokens=max_new_tokens)
        accuracies = parts.get("accuracy", [])
        calls = [
            (completion, sample, group(i, lengths or [], accuracies))[: reward.arguments]
            for i, completion in enumerate(completions)
        ]
        outcomes = reward.function(calls, reward_timeout)
        parts[reward.name] = [value for value, _ in outcomes]
        totals = [total + reward.weight * value for total, (value, _) in zip(totals, outcomes)]
        if messages := [message for _, message in outcomes if message]:
            failures[reward.name] = messages
    return totals, parts, failures
