"""What a run leaves to look at: metrics.jsonl, TensorBoard events, a curve as PNG, and a progress bar."""

import json
import platform
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

from grpo.config import save_config
from video.files import append_rows, naming, read_rows, write_rows, write_text
from video.formats import printable


def quiet_libraries():
    """Leaves the terminal to this project's own progress bars and messages."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # saving from one process
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # TensorBoard's thread also hands a full disk to the next call, which ends the run with one line.
    unseen = lambda end: isinstance(end.exc_value, OSError)
    threading.excepthook = lambda end: None if unseen(end) else threading.__excepthook__(end)


class RunLog:
    """Writes a step's metrics everywhere; in processes other than the first it does nothing.

    metrics.jsonl gets one line a step, with a `phase` ("warmup", "train" or "eval"); TensorBoard the same names under
    the phase. `keep(phase, step)` says which lines of an earlier part of the run stay: the others are made again.
    """

    def __init__(self, folder, is_main, keep):
        self.folder, self.is_main, self.bar = Path(folder), is_main, tqdm(disable=True)
        if not is_main:
            return
        from torch.utils.tensorboard import SummaryWriter  # slow to import; only here

        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = self.folder / "metrics.jsonl"
        kept = [row for row in read_rows(self.file, ("phase", "step")) if keep(row["phase"], row["step"])]
        made = [row["step"] for row in kept if row["phase"] == "train"]
        write_rows(self.file, kept)
        self.board = SummaryWriter(self.folder, purge_step=1 + max(made) if made else None)

    def describe(self, config, versions):
        """run.json: the whole configuration; versions.json: command, versions, git revision."""
        if self.is_main:
            save_config(config, self.folder / "run.json")
            write_text(self.folder / "versions.json", json.dumps(versions, indent=2) + "\n")

    def start(self, title, total, first=0):
        self.bar = tqdm(
            total=total, initial=first, desc=title, dynamic_ncols=True, mininterval=0.5, disable=not self.is_main
        )

    def step(self, phase, step, metrics, shown=()):
        """shown: names of the metrics that the progress bar shows."""
        self.write(phase, step, metrics)
        self.bar.set_postfix({name: f"{metrics[name]:.3g}" for name in shown if name in metrics}, refresh=False)
        self.bar.update()

    def write(self, phase, step, metrics):
        if not self.is_main:
            return
        append_rows(self.file, [{"phase": phase, "step": step, **metrics}])
        with naming(f"{self.folder}/events.out.tfevents.*"):
            for name, value in metrics.items():
                if isinstance(value, (int, float)):
                    self.board.add_scalar(f"{phase}/{name}", value, step)

    def evaluation(self, step, summary):
        """Held-out accuracy of a `evaluation.evaluate.summarise`: of the kinds trained on, overall, and by kind."""
        if summary:
            kinds = {f"accuracy_{kind}": value for kind, value in summary["kinds"].items()}
            totals = {"accuracy": summary["trained"], "accuracy_overall": summary["overall"]}
            self.write("eval", step, {**totals, **kinds, "unparsed": summary["unparsed"]})
            self.say(
                f"step {step}: held-out accuracy {summary['trained']:.1%} of the kinds trained on, "
                f"{summary['overall']:.1%} of all {summary['count']} questions; {summary['skipped']} unreadable"
            )

    def say(self, text, everywhere=False):
        """Prints a line above the progress bar; `everywhere`: also in processes other than the first."""
        if self.is_main or everywhere:
            tqdm.write(printable(text))

    def stop(self):
        """Ends the phase's progress bar."""
        self.bar.close()

    def close(self):
        self.stop()
        if self.is_main:
            with naming(f"{self.folder}/events.out.tfevents.*"):
                self.board.close()


def describe_run():
    """{what a reader needs to run this again}: command, versions, git revision ("" without a checkout or git)."""
    describe = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        revision = subprocess.run(describe, capture_output=True, timeout=20).stdout.decode(errors="replace").strip()
    except (OSError, subprocess.SubprocessError):  # many machines have no git
        revision = ""
    return {
        "command": " ".join(sys.argv),
        "revision": revision,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
