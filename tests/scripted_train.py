"""train.py whose accuracies follow a script: the random answers of a tiny model are never right, so that no group would
have signal."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import grpo.rollout
import train

score_groups = grpo.rollout.score_groups


def number_of(key):
    """The row of a sample, from 0: "data.jsonl:3#2" is 2."""
    return int(key.rpartition(":")[2].partition("#")[0]) - 1


def has_signal(number):
    return number % 3 > 0


def scripted(rewards, completions, samples, *more):
    """Every other completion is right, but in every third row none is."""
    scores = score_groups(rewards, completions, samples, *more)
    for sample, (totals, parts, *_) in zip(samples, scores):
        parts["accuracy"] = [float(n % 2 and has_signal(number_of(sample.key))) for n in range(len(totals))]
        totals[:] = [total + right for total, right in zip(totals, parts["accuracy"])]
    return scores


if __name__ == "__main__":
    grpo.rollout.score_groups = scripted
    sys.exit(train.main())
