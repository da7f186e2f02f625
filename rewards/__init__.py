"""Rewards: plain functions of text and sample, one file each; this file chooses, weighs and sums them.

A reward is `f(completion, sample) -> float`, or, where it depends on the other completions, `f(completion, sample,
group)` (see `Group`). It is called once for each completion. `sample` has `answer` (the ground truth),
`problem_type`, `options`, `problem` and `meta`. To add your own, write one such function, `def` or `async def`, in a
file, and name it:

    --reward accuracy:1 format:0.5 my_file.py:my_function:0.3

The file runs in a process of its own (see `rewards.user`), and can import the files beside it.
"""

import functools
import math as _math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from rewards.answer import answer_text
from rewards.choice import choice
from rewards.format import format
from rewards.length import length_cosine, length_window, soft_overlong
from rewards.math import math
from rewards.numeric import mean_relative_accuracy, numeric
from rewards.ocr import ocr
from rewards.regression import regression
from rewards.repetition import repetition
from rewards.tag_count import tag_count
from rewards.text import rouge
from rewards.user import RewardFile, arguments_needed

# problem_type -> f(prediction, sample), in [0, 1]. The prediction is the content of the answer tag.
ACCURACY: dict[str, Callable] = {
    "multiple choice": choice,
    "numerical": numeric,
    "mra": mean_relative_accuracy,
    "OCR": ocr,
    "free-form": rouge,
    "regression": regression,
    "math": math,
}


@dataclass(frozen=True)
class Group:
    """The completions of one prompt, as a reward that compares them sees them."""

    completions: list[str]
    index: int  # of the completion being scored
    lengths: list[int]  # in tokens; empty where the caller did not give them
    accuracy: list[float]  # raw, of every completion; empty where accuracy is not among the rewards
    max_new_tokens: int = 0  # the length at which completions are cut; 0 if the caller gave no limit


@dataclass(frozen=True)
class Reward:
    """One entry of `--reward`: its function, how much it weighs, and whether it is the user's own.

    A built-in `function` takes what a reward takes; a user's takes a list of such calls and the seconds they may last.
    """

    name: str
    weight: float
    function: Callable
    wants_group: bool = False
    user: bool = False


def score_prediction(prediction: str | None, sample) -> float:
    """The accuracy, in [0, 1], of what `answer_text` found, by the problem type of this very sample; 0.0 for None.

    Evaluation calls it with `answer_text(completion, strict=False)`. ValueError for a type that no file here scores, or
    for a ground truth that does not fit its type.
    """
    try:
        if sample.problem_type not in ACCURACY:
            raise ValueError(f"unknown problem_type {sample.problem_type!r}; known: {', '.join(ACCURACY)}")
        # None is scored as "", which is wrong in every type, so that an unfit ground truth shows all the same.
        score = ACCURACY[sample.problem_type](prediction or "", sample)
    except ValueError as error:
        raise ValueError(f"sample {sample.key!r}: {error}") from error
    return 0.0 if prediction is None else score


def accuracy(completion: str, sample) -> float:
    """How right the one answer in the completion's answer tag is, in [0, 1]; 0.0 without one, or with several."""
    return score_prediction(answer_text(completion), sample)


def check_sample(sample) -> None:
    """Raises ValueError or ImportError where `accuracy` could not score this sample; call it before training."""
    score_prediction(None, sample)


REWARDS: dict[str, Callable] = {
    "accuracy": accuracy,
    "format": format,
    "tag_count": tag_count,
    "repetition": repetition,
    "length_window": length_window,
    "length_cosine": length_cosine,
    "soft_overlong": soft_overlong,
}
NEED_ACCURACY = ("length_window", "length_cosine")


def parse_rewards(specs: list[str]) -> list[Reward]:
    """The rewards that `--reward` names: `NAME[:WEIGHT]` or `FILE.py:FUNCTION[:WEIGHT]`, weight 1 where none is given.

    A weight is any finite number but 0; a negative one turns the reward into a penalty. ValueError names the flag.
    """
    if not specs:
        raise ValueError("--reward: at least one is needed, such as accuracy:1")
    rewards: list[Reward] = []
    for spec in specs:
        file, is_file, rest = spec.partition(".py:")
        name, _, weight = (rest if is_file else spec).partition(":")
        if not is_file and name not in REWARDS:
            raise ValueError(
                f"--reward {spec}: no reward is called {name!r}; use one of {', '.join(REWARDS)}, "
                "or FILE.py:FUNCTION for your own"
            )
        if is_file:
            function, needed = _user_function(spec, file + ".py", name)
        else:
            function, needed = REWARDS[name], arguments_needed(REWARDS[name])
        rewards.append(Reward(name, _weight(spec, weight), function, needed == 3, bool(is_file)))
    names = [reward.name for reward in rewards]
    for reward, spec in zip(rewards, specs):
        if names.count(reward.name) > 1 or (reward.user and reward.name in REWARDS):
            raise ValueError(f"--reward {spec}: the name {reward.name!r} is taken; give each reward a name of its own")
        if reward.name in NEED_ACCURACY and "accuracy" not in names:
            raise ValueError(f"--reward {spec}: {reward.name} depends on the accuracy; add accuracy:1")
    return sorted(rewards, key=lambda reward: reward.name != "accuracy")  # first, since the group rewards read it


def score_group(
    rewards: list[Reward],
    completions: list[str],
    sample,
    lengths: list[int] | None = None,
    reward_timeout: float = 60.0,
    max_new_tokens: int = 0,
) -> tuple[list[float], dict[str, list[float]], dict[str, list[str]]]:
    """The total and the named parts of each completion of one prompt.

    total[i] = sum over rewards r of r.weight * parts[r.name][i]. `lengths` are in tokens; the length rewards need them,
    and soft_overlong needs `max_new_tokens`.

    A user's reward may be slow or fail: it gets `reward_timeout` seconds for the group, all completions at once. A call
    that raises, is late, ends its process or returns no finite number scores 0, is counted in `failed`, and the first
    failure's message is kept. Each call gets a copy of the sample: what it changes there nobody else sees. An error in
    a built-in reward is a bug or a bad sample, and is raised.
    """
    totals, parts, failures = [0.0] * len(completions), {}, {}
    for reward in rewards:
        group = Group(completions, 0, lengths or [], parts.get("accuracy", []), max_new_tokens)
        if not reward.user and reward.wants_group and len(group.lengths) != len(completions):
            raise ValueError(f"{reward.name} needs the length in tokens of each completion")
        calls = [
            (completion, sample, replace(group, index=i)) if reward.wants_group else (completion, sample)
            for i, completion in enumerate(completions)
        ]
        if reward.user:
            part, errors = reward.function(calls, reward_timeout)
            if errors:
                failures[reward.name] = [errors[i] for i in sorted(errors)]
        else:
            part = [reward.function(*call) for call in calls]
        parts[reward.name] = part
        totals = [total + reward.weight * value for total, value in zip(totals, part)]
    return totals, parts, failures


def _weight(spec: str, text: str) -> float:
    try:
        weight = float(text) if text else 1.0
    except ValueError:
        weight = _math.nan
    if not _math.isfinite(weight) or weight == 0:
        raise ValueError(f"--reward {spec}: the weight must be finite and not 0; to drop a reward, leave it out")
    return weight


def _user_function(spec: str, path: str, name: str) -> tuple[Callable, int]:
    """(f(calls, seconds) as `RewardFile.call`, number of arguments of a call) of the function in the user's file."""
    if not Path(path).is_file():
        raise ValueError(f"--reward {spec}: there is no file {path}")
    file = _reward_file(str(Path(path).resolve()))
    try:
        functions = file.functions()
    except ImportError as error:
        raise ValueError(f"--reward {spec}: {path} cannot be imported: {error}") from error
    if name not in functions:
        raise ValueError(f"--reward {spec}: {path} defines no function {name!r}")
    if functions[name] not in (2, 3):
        raise ValueError(f"--reward {spec}: the function must take (completion, sample) or (completion, sample, group)")
    return functools.partial(file.call, name), functions[name]


_reward_file = functools.cache(RewardFile)  # imported once, however many rewards it holds
