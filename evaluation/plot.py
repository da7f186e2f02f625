"""Curves of one or several training runs in one PNG.

python -m evaluation.plot runs/a runs/b [--output compare.png]
"""

import argparse
import sys
from pathlib import Path

from grpo.config import OneLineParser
from video.files import read_rows

# (title, what of a step's metrics it shows, what of an evaluation's is drawn beside it)
PANELS = (
    ("reward", lambda row: row.get("reward"), None),
    ("accuracy", lambda row: row.get("accuracy"), lambda row: row.get("accuracy")),
    ("KL to the reference", lambda row: row.get("kl"), None),
    ("completion length", lambda row: row.get("length"), None),
    ("entropy", lambda row: row.get("entropy"), None),
    ("clip share", lambda row: row.get("clip_low_share", 0) + row.get("clip_high_share", 0), None),
    ("sampler gap", lambda row: row.get("sampler_gap"), None),
    ("answer letters", lambda row: max(letters(row).values(), default=None), None),
    ("seconds waiting for data", lambda row: row.get("seconds_waiting"), None),
)


def read_metrics(folder, phase):
    """The rows of one phase of a run's metrics.jsonl."""
    return [row for row in read_rows(Path(folder) / "metrics.jsonl", ("phase", "step")) if row["phase"] == phase]


def letters(row):
    """{letter: share of the step's completions that answer it}."""
    return {name.removeprefix("letter_"): share for name, share in row.items() if name.startswith("letter_")}


def curve(rows, value):
    """(steps, values) of the rows that have the value."""
    points = [(row["step"], v) for row in rows if (v := value(row)) is not None]
    return [step for step, _ in points], [v for _, v in points]


def plot_runs(folders, path):
    """Writes reward, accuracy and held-out accuracy, KL, length, entropy, clip share, sampler gap, letters, data wait
    by step to `path`, and returns it. Of the letters, one run shows all, several show their most frequent one each."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(3, 3, figsize=(14, 9.5), constrained_layout=True)
    for number, folder in enumerate(folders):
        name = "/".join(Path(folder).parts[-2:]) if len(folders) > 1 else "training"
        train, held_out = read_metrics(folder, "train"), read_metrics(folder, "eval")
        for axis, (title, value, evaluated) in zip(axes.flat, PANELS):
            colour = f"C{number}"
            if title == "answer letters" and len(folders) == 1:
                for letter in sorted({letter for row in train for letter in letters(row)}):
                    share = lambda row, letter=letter: letters(row).get(letter, 0.0)
                    axis.plot(*curve(train, share), linewidth=1, label=letter)
            else:
                axis.plot(*curve(train, value), linewidth=1, color=colour, label=name)
            if evaluated:
                points = curve(held_out, evaluated)
                axis.plot(*points, "o--", markersize=3, color=colour, alpha=0.7, label=f"{name}, held out")
    for axis, (title, _, _) in zip(axes.flat, PANELS):
        several = title == "answer letters" and len(folders) > 1
        axis.set_title(f"{title}: share of the most frequent" if several else title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0] and (len(folders) > 1 or title in ("accuracy", "answer letters")):
            axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def plot_run(folder):
    """Writes the run's own curve.png and returns its path."""
    return plot_runs([folder], Path(folder) / "curve.png")


def main(arguments=None):
    layout = argparse.RawDescriptionHelpFormatter
    parser = OneLineParser(prog="evaluation.plot", description=__doc__, formatter_class=layout)
    parser.add_argument("runs", nargs="+", help="Run folders: those with a metrics.jsonl.")
    parser.add_argument("--output", default="compare.png", help="Where to write the picture [compare.png].")
    given = parser.parse_args(arguments)
    for folder in given.runs:
        if not (Path(folder) / "metrics.jsonl").is_file():
            print(f"evaluation.plot: error: {folder}: has no metrics.jsonl; give the folder of a run", file=sys.stderr)
            return 2
    print(plot_runs(given.runs, given.output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
