"""How sure an evaluation's numbers are: intervals of all accuracies, and paired tests of two checkpoints."""

import math

from grpo.engine.evaluate import mean, scores_by_category, wilson


def with_intervals(summary, records):
    """A `grpo.engine.evaluate.summarise` of the records, with "intervals", {"overall" or category: 95% Wilson
    interval}, and "counts", {category: questions}."""
    categories = scores_by_category([r for r in records if "skipped" not in r])
    groups = {"overall": [score for scores in categories.values() for score in scores], **categories}
    shares = {"overall": summary["overall"], **summary["categories"]}
    intervals = {name: wilson(shares[name], len(scores)) for name, scores in groups.items()}
    counts = {category: len(scores) for category, scores in categories.items()}
    return {**summary, "intervals": intervals, "counts": counts}


def mcnemar(better, worse):
    """The exact two-sided p-value that `better` gains and `worse` losses are tosses of one fair coin (McNemar 1947)."""
    count = better + worse
    tail = sum(math.comb(count, i) for i in range(min(better, worse) + 1))
    return min(1.0, 2 * tail / 2**count)


def paired(records, others):
    """What records gain over `others`, answers to the same samples: {"difference" of mean scores, "better", "worse",
    "p", "count", "categories": {category: the same of it alone}}, over the samples that both could read. With scores
    between 0 and 1 it is the exact sign test."""
    other = {r["key"]: r["score"] for r in others if "skipped" not in r}
    gains = [(r["category"], r["score"] - other[r["key"]]) for r in records if "skipped" not in r and r["key"] in other]
    names = sorted({category for category, _ in gains})
    categories = {name: _gain([gain for category, gain in gains if category == name]) for name in names}
    return {**_gain([gain for _, gain in gains]), "categories": categories}


def _gain(gains):
    better, worse = sum(g > 0 for g in gains), sum(g < 0 for g in gains)
    p = mcnemar(better, worse)
    return {"difference": mean(gains), "better": better, "worse": worse, "p": p, "count": len(gains)}
