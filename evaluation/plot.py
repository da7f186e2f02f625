"""Curves of one or several training runs in one PNG.

python -m evaluation.plot runs/a runs/b [--output compare.png]
"""

from pathlib import Path

from grpo.config import METRICS, METRICS_OF_KINDS
from video.files import read_rows
from video.terminal import OneLineParser

PANELS = {  # title: the metric that it shows of each step
    "reward": "reward",
    "accuracy": "accuracy",
    "KL to the reference": "kl",
    "completion length": "length",
    "entropy": "entropy",
    "clip share": "clip_share",
    "sampler gap": "sampler_logprob_diff",
    "answer letters": "top_letter",
    "seconds waiting for data": "seconds_waiting",
}


def read_metrics(folder: str | Path, phase: str) -> list[dict]:
    """The rows of one phase of a run's metrics.jsonl, with two metrics more: `clip_share`, of both sides; and
    `top_letter`, the share of the letter that most completions of the step answer, None if no letter was answered."""
    rows = [row for row in read_rows(Path(folder) / "metrics.jsonl", ("phase", "step")) if row["phase"] == phase]
    for row in rows:
        row["clip_share"] = row.get("clip_low_frac", 0) + row.get("clip_high_frac", 0)
        row["top_letter"] = max((row[name] for name in row if name.startswith("letter_")), default=None)
    return rows


def curve(rows: list[dict], metric: str, absent: float | None = None) -> tuple[list[int], list[float]]:
    """(steps, values) of a metric; a row without it counts as `absent`, or is left out if that is None."""
    points = [(row["step"], value) for row in rows if (value := row.get(metric, absent)) is not None]
    return [step for step, _ in points], [value for _, value in points]


def reward_metrics(rows: list[dict]) -> list[str]:
    """The metrics that the rewards of a run make, its accuracy aside: each reward, and what it logs of its own."""
    known = {*METRICS, *PANELS.values()}
    names = dict.fromkeys(name for row in rows for name in row)
    return [name for name in names if name not in known and not name.startswith(METRICS_OF_KINDS)]


def interval_bars(rows: list[dict]) -> list[list[float]]:
    """[how far the 95% interval reaches below each held-out accuracy, how far above]; 0 if a row has no interval."""
    asked = [row for row in rows if "accuracy" in row]
    ends = ("interval_low", "interval_high")
    return [[abs(row["accuracy"] - row.get(end, row["accuracy"])) for row in asked] for end in ends]


def plot_runs(folders: list[str | Path], path: str | Path) -> str | Path:
    """Draws those of the PANELS that a run measured by step, and a panel for each reward, to `path`, and returns it.
    With the accuracy are the held-out accuracy, its 95% interval as a bar, and, if they were measured, its blind and
    order gaps. Runs without a step, such as a supervised pass alone, have all panels, empty.

    Of the answer letters, a run alone shows each; of several runs, each shows its most frequent one.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    several = len(folders) > 1
    runs = [(read_metrics(folder, "train"), read_metrics(folder, "eval")) for folder in folders]
    names = ["/".join(Path(folder).parts[-2:]) if several else "training" for folder in folders]
    panels = PANELS | {name: name for name in reward_metrics([row for train, _ in runs for row in train])}
    measured = lambda metric: any(curve(rows, metric)[0] for run in runs for rows in run)
    panels = {title: metric for title, metric in panels.items() if measured(metric)} or panels
    lines = -(-len(panels) // 3)
    figure, axes = plt.subplots(lines, 3, figsize=(14, 0.5 + 3 * lines), constrained_layout=True)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (title, metric) in zip(axes.flat, panels.items()):
        letters = metric == "top_letter"
        for number, (name, (train, held_out)) in enumerate(zip(names, runs)):
            colour = f"C{number}"
            if letters and not several:
                for letter in sorted({name for row in train for name in row if name.startswith("letter_")}):
                    axis.plot(*curve(train, letter, 0.0), linewidth=1, label=letter.removeprefix("letter_"))
            else:
                axis.plot(*curve(train, metric), linewidth=1, color=colour, label=name)
            if metric == "accuracy":
                style = dict(markersize=3, color=colour, alpha=0.7)
                points, bars = curve(held_out, metric), interval_bars(held_out)
                axis.errorbar(*points, bars, fmt="o--", elinewidth=1, label=f"{name}, held out", **style)
                for gap, marker in (("blind_gap", "s:"), ("order_gap", "^:")):
                    if (points := curve(held_out, gap))[0]:
                        axis.plot(*points, marker, label=f"{name}, {gap.replace('_', ' ')}", **style)
        axis.set_title(f"{title}: share of the most frequent" if letters and several else title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0] and (several or letters or metric == "accuracy"):
            axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def plot_run(folder: str | Path) -> Path:
    """Draws the run's own curve.png and returns its path."""
    return plot_runs([folder], Path(folder) / "curve.png")


def main(arguments: list[str] | None = None) -> None:
    parser = OneLineParser(prog="evaluation.plot", description=__doc__)
    parser.add_argument("runs", nargs="+", help="Run folders: those with a metrics.jsonl.")
    parser.add_argument("--output", default="compare.png", help="Where to write the picture [compare.png].")
    given = parser.parse_args(arguments)
    for folder in given.runs:
        if not (Path(folder) / "metrics.jsonl").is_file():
            parser.error(f"{folder}: has no metrics.jsonl; give the folder of a run")
    print(plot_runs(given.runs, given.output))


if __name__ == "__main__":
    main()
