"""train.py whose accuracies follow a script: the random answers of a tiny model are never right, so that no group would
have signal."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import grpo.rollout
import train

score_group = grpo.rollout.score_group


def number_of(key):
    """The row of a sample, from 0: "data.jsonl:3#2" is 2."""
    return int(key.rpartition(":")[2].partition("#")[0]) - 1


def has_signal(number):
    return number % 3 > 0


def scripted(rewards, completions, sample, *more):
    """Every other completion is right, but in every third row none is."""
    totals, parts, errors = score_group(rewards, completions, sample, *more)
    accuracy = [float(n % 2 and has_signal(number_of(sample.key))) for n in range(len(completions))]
    return [total + a for total, a in zip(totals, accuracy)], parts | {"accuracy": accuracy}, errors


if __name__ == "__main__":
    grpo.rollout.score_group = scripted
    sys.exit(train.main())
