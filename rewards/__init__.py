"""Rewards: functions of text and sample. This file picks, weighs and sums those that `--reward` names.

A reward is a function, `def` or `async def`, of one of three forms:

    f(completion, sample)         once for each completion
    f(completion, sample, group)  likewise, if it depends on the other completions of the prompt (see `Group`)
    f(completions, samples)       once for a whole step of this rank, as two lists: the parameters must have these names

It returns a number (of the third form, a list of numbers), or (number, {name: number}) to log numbers of its own.
`sample` has `answer` (the ground truth), `problem_type`, `options`, `problem` and `meta`. To add a reward, write a
function in a file and name it; a weight of 0 logs its values and adds nothing to the total:

    --reward accuracy:1 format:0.5 my_file.py:my_function:0.3

The file runs in a process of its own (see `rewards.user`), and can import the files beside it. docs/rewards.md has
examples.

The reward `accuracy` depends on the sample's problem type: `rewards.problem_types` has one function for each type.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from rewards.answer import answer_text
from rewards.grounding import timestamp_iou
from rewards.judge import JUDGED, Judge
from rewards.length import length_cosine, length_window, repetition, soft_overlong
from rewards.problem_types import ACCURACY
from rewards.think_format import tag_count, think_format
from rewards.user import Outcome, RewardFile, call_files, form_of, reward_file
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

    name: str  # of the function; its values are logged under it
    weight: float  # what its value is multiplied by in the total
    form: str  # how it is called: see `form_of`
    function: Callable | None  # None if it is the user's
    file: RewardFile | None = None  # the user's file: a call of it may fail
    judge: Judge | None = None  # of the accuracy of free text: a request of it may fail

    @property
    def user(self) -> bool:
        return self.file is not None


class Scores(NamedTuple):
    """What the rewards give the completions of one prompt."""

    totals: list[float]  # of completion i: the sum over rewards r of r.weight * parts[r.name][i]
    parts: dict[str, list[float]]  # reward -> unweighted value of each completion; "accuracy" is the raw accuracy
    failures: dict[str, list[str]]  # reward -> messages of its failed calls, in the order of the completions
    logs: dict[str, list[float]]  # "REWARD/NAME" -> the numbers that the reward logs under NAME


def score_prediction(prediction: str | None, sample: Sample) -> float:
    """The accuracy, in [0, 1], of a prediction (see `answer_text`) by the sample's problem type; 0.0 for None.

    Evaluation calls it with `answer_text(completion, strict=False)`. Raises ValueError for an unknown problem type, and
    for a ground truth that does not fit its type.
    """
    try:
        if sample.problem_type not in ACCURACY:
            raise ValueError(
                f"unknown problem_type {sample.problem_type!r}; accuracy knows {', '.join(ACCURACY)}; to train on it "
                "by a reward of your own, leave accuracy out of --reward and set --eval_samples 0"
            )
        # None is scored as "", which is wrong in every type, so that an unfit ground truth raises all the same.
        return ACCURACY[sample.problem_type](prediction or "", sample)
    except ValueError as error:
        raise ValueError(f"sample {sample.key!r}: {error}") from error


def score_predictions(predictions: list[str | None], samples: list[Sample], judge: Judge | None) -> list[Outcome]:
    """The outcome of each prediction: what the judge says of free text, if there is a judge; else `score_prediction`.

    A prediction of no text is wrong unasked.
    """
    asked = [i for i, s in enumerate(samples) if judge and s.problem_type in JUDGED and predictions[i]]
    judged = judge.outcomes([predictions[i] for i in asked], [samples[i] for i in asked]) if asked else []
    found = dict(zip(asked, judged))
    score = lambda i: found.get(i) or (score_prediction(predictions[i], samples[i]), {}, "")
    return [score(i) for i in range(len(samples))]


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


def parse_rewards(specs: list[str], judge: Judge | None = None) -> list[Reward]:
    """The rewards that `--reward` names: `NAME[:WEIGHT]` or `FILE.py:FUNCTION[:WEIGHT]`; the default weight is 1.

    A weight is any finite number: 0 only logs the reward, a negative weight makes it a penalty. Raises ValueError,
    which names the flag. Accuracy comes first in the list, because group rewards read its values.
    """
    if not specs:
        raise ValueError("--reward: at least one is needed, such as accuracy:1")
    rewards: dict[str, Reward] = {}
    for spec in specs:
        try:
            reward = _parse_reward(spec)
            reward = replace(reward, judge=judge) if reward.name == "accuracy" and not reward.user else reward
            if reward.name in rewards or (reward.user and reward.name in REWARDS):
                raise ValueError(f"the name {reward.name!r} is taken; give each reward a name of its own")
            rewards[reward.name] = reward
        except (ValueError, ImportError, OSError) as error:
            raise ValueError(f"--reward {spec}: {error}") from error
    for name, reward in rewards.items():
        if name in NEED_ACCURACY and "accuracy" not in rewards:
            raise ValueError(f"--reward {name}: {name} depends on the accuracy; add accuracy:1")
    if not any(reward.weight for reward in rewards.values()):
        raise ValueError("--reward: every weight is 0, so nothing would be learned; give one reward another weight")
    return sorted(rewards.values(), key=lambda reward: reward.name != "accuracy")


def _parse_reward(spec: str) -> Reward:
    """`my_file.py:f:0.3` -> the user's function f with weight 0.3; `format` -> think_format with weight 1."""
    file, is_file, rest = spec.partition(".py:")
    name, _, weight_text = (rest if is_file else spec).partition(":")
    user_file = reward_file(str(Path(file + ".py").resolve())) if is_file else None
    function = None if is_file else REWARDS.get(name)
    form = user_file.functions().get(name) if is_file else function and form_of(function)
    if form is None:
        if near := not is_file and get_close_matches(name, REWARDS, 1):
            raise ValueError(f"no such reward; did you mean {near[0]}?")
        raise ValueError(
            f"no reward called {name!r} takes (completion, sample), (completion, sample, group) or (completions, "
            f"samples); use one of {', '.join(REWARDS)}, or FILE.py:FUNCTION for your own"
        )
    try:
        weight = float(weight_text or 1)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise ValueError("the weight must be a finite number; 0 only logs the reward")
    return Reward(name, weight, form, function, user_file)


def score_groups(
    rewards: list[Reward],
    completions: list[list[str]],
    samples: list[Sample],
    lengths: list[list[int]] | None = None,
    reward_timeout: float = 60.0,
    max_new_tokens: int = 0,
) -> list[Scores]:
    """The scores of completions[g], those of the prompt of samples[g], for each prompt of a step.

    `lengths` are in tokens; the length rewards need them, and soft_overlong needs `max_new_tokens`. All calls of the
    user's rewards run at once; they and the judge have `reward_timeout` seconds together. A call that raises, is late,
    ends its process or returns no finite number scores 0. Each call gets a copy of the sample. An error in a built-in
    reward is a bug or a bad sample, and is raised.
    """
    # 1) Built-in rewards, accuracy first
    lengths, outcomes, began = lengths or [[]] * len(samples), {}, time.monotonic()
    groups = [Group(texts, 0, own, [], max_new_tokens) for texts, own in zip(completions, lengths, strict=True)]
    for reward in rewards:
        if reward.user:
            continue
        if reward.form == "group" and any(len(group.lengths) != len(group.completions) for group in groups):
            raise ValueError(f"{reward.name} needs the length in tokens of each completion")
        own = _calls(reward, groups, samples)
        if reward.judge:
            predictions = [answer_text(text) for text, _ in own]
            outcomes[reward.name] = score_predictions(predictions, [sample for _, sample in own], reward.judge)
        else:
            outcomes[reward.name] = [(reward.function(*call), {}, "") for call in own]
        if reward.name == "accuracy":
            values = (value for value, _, _ in outcomes["accuracy"])
            groups = [replace(group, accuracy=list(islice(values, len(group.completions)))) for group in groups]

    # 2) The user's, all at once
    calls = [(reward, call) for reward in rewards if reward.user for call in _calls(reward, groups, samples)]
    left = max(0.1, reward_timeout - (time.monotonic() - began))
    results = call_files([(reward.file, reward.name, call) for reward, call in calls], left)
    for (reward, _), found in zip(calls, results):
        outcomes.setdefault(reward.name, []).extend(found)

    # 3) Sums, group by group
    columns = {reward: iter(outcomes.get(reward.name, ())) for reward in rewards}
    return [
        _scores({reward: list(islice(column, len(texts))) for reward, column in columns.items()}, len(texts))
        for texts in completions
    ]


def _calls(reward: Reward, groups: list[Group], samples: list[Sample]) -> list[tuple]:
    """The arguments of each call of a reward."""
    each = [
        (text, sample, replace(group, index=i))
        for group, sample in zip(groups, samples)
        for i, text in enumerate(group.completions)
    ]
    if reward.form == "batch":
        return [([text for text, _, _ in each], [sample for _, sample, _ in each])] if each else []
    return each if reward.form == "group" else [call[:2] for call in each]


def _scores(outcomes: dict[Reward, list[Outcome]], count: int) -> Scores:
    """The scores of a group of `count` completions, each reward's outcomes given."""
    scores = Scores([0.0] * count, {}, {}, {})
    for reward, found in outcomes.items():
        values = scores.parts[reward.name] = [value for value, _, _ in found]
        scores.totals[:] = [total + reward.weight * value for total, value in zip(scores.totals, values)]
        if messages := [message for _, _, message in found if message]:
            scores.failures[reward.name] = messages
        for name, number in (item for _, log, _ in found for item in log.items()):
            scores.logs.setdefault(f"{reward.name}/{name}", []).append(number)
    return scores
