"""The closing table of a run, and its numbers in summary.json."""

from grpo.metrics import plot_run


def summary_of(before, after, controls, seconds):
    """One flat record of a run's evaluations (each a `grpo.evaluate.summarise`); None for what was not evaluated.

    `accuracy_*` are over all questions, `kinds` has the same by kind of question, `opposite_when_reversed` is the share
    of questions with an opposite answer that got it when the video ran backwards.
    """
    evaluated = {
        "before": before, "after": after,
        "shuffled": controls.get("shuffle"), "reversed": controls.get("reverse"), "blank": controls.get("blank"),
    }  # fmt: skip
    kinds = sorted(after.get("kinds", {}))
    return {
        **{f"accuracy_{name}": result and result["overall"] for name, result in evaluated.items()},
        "opposite_when_reversed": controls["reverse"]["opposite"] if "reverse" in controls else None,
        "seconds": seconds,
        "kinds": {kind: {name: result and result["kinds"].get(kind) for name, result in evaluated.items()} for kind in kinds},
        "questions": after.get("count", 0),
        "skipped": after.get("skipped", 0),
        "unparsed": after.get("unparsed"),
    }


def print_table(summary, folder):
    """Prints accuracy by kind of question, before and after training and under each control, and where to look."""
    columns = ("before", "after", "shuffled", "reversed", "blank")
    rows = {**summary["kinds"], "all": {name: summary[f"accuracy_{name}"] for name in columns}}
    shown = [name for name in columns if rows["all"][name] is not None]
    print(f"\nheld-out accuracy, {summary['questions']} questions")
    print(f"{'':16}" + "".join(f"{name:>10}" for name in shown))
    for kind, row in rows.items():
        print(f"{kind:16}" + "".join(f"{row[name]:>10.1%}" if row[name] is not None else f"{'-':>10}" for name in shown))
    if summary["opposite_when_reversed"] is not None:
        print(f"opposite answer when the video is reversed: {summary['opposite_when_reversed']:.1%}")
    print(f"{summary['seconds']:.0f} s; curve: {plot_run(folder)}; events: tensorboard --logdir {folder}")
