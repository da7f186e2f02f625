"""The closing table of a run, and its numbers in summary.json."""


def summary_of(before, after, controls, seconds):
    """One flat record of a run's evaluations (each a `grpo.evaluate.summarise`); None for what was not evaluated.

    `accuracy_*` are over all questions, `kinds` has the same by kind of question, `opposite_when_reversed` is the share
    of questions with an opposite answer that got it when the video ran backwards.
    """
    evaluated = {
        "before": before or None, "after": after or None,
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


def summary_table(summary):
    """Accuracy by kind of question, before and after training and under each control, as text."""
    columns = ("before", "after", "shuffled", "reversed", "blank")
    rows = {**summary["kinds"], "all": {name: summary[f"accuracy_{name}"] for name in columns}}
    shown = [name for name in columns if rows["all"][name] is not None]
    text = accuracy_table(rows, shown)
    if summary["opposite_when_reversed"] is not None:
        text += f"\nopposite answer when the video is reversed: {summary['opposite_when_reversed']:.1%}"
    return text


def evaluation_table(results):
    """The same of an evaluation: {column: `grpo.evaluate.summarise`}, as text."""
    kinds = next(iter(results.values()))["kinds"]
    rows = {kind: {name: result["kinds"].get(kind) for name, result in results.items()} for kind in kinds}
    rows["all"] = {name: result["overall"] for name, result in results.items()}
    first = next(iter(results.values()))
    text = accuracy_table(rows, list(results))
    if results.get("reverse", {}).get("opposite") is not None:
        text += f"\nopposite answer when the video is reversed: {results['reverse']['opposite']:.1%}"
    return text + f"\n{first['count']} questions, {first['unparsed']:.1%} not parsed, {first['skipped']} videos unreadable"


def accuracy_table(rows, columns):
    """{row: {column: share or None}} as aligned text."""
    cell = lambda value: f"{value:>10.1%}" if value is not None else f"{'-':>10}"
    lines = [" " * 16 + "".join(f"{name:>10}" for name in columns)]
    lines += [f"{kind:16}" + "".join(cell(row[name]) for name in columns) for kind, row in rows.items()]
    return "\n".join(lines)
