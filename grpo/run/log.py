"""What a run leaves to look at: metrics.jsonl, rollouts.jsonl, TensorBoard events, and a progress bar. Only rank 0
writes."""

import html
import json
import platform
import resource
import subprocess
import sys
import threading
import warnings
from collections import defaultdict
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

from grpo import sequence
from grpo.config import save_config
from grpo.engine.distributed import gather, gather_data, is_main
from grpo.engine.evaluate import category_of, gaps, mean
from grpo.run.tracker import start_tracker
from rewards.diagnostics import answer_stats, pass_at_k
from video.files import append_rows, naming, read_rows, write_rows, write_text
from video.formats import printable
from video.pictures import frames_of, strip

SHOWN = 2  # groups of a step in TensorBoard
ON_THE_BAR = {"tokens_per_second": "tokens/s", "peak_memory_gib": "GiB"}  # shorter names of metrics


def quiet_libraries():
    """Leaves the terminal to this project's own progress bars and messages."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # saving from one process
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # TensorBoard's thread also hands a full disk to the next call, which ends the run with one line.
    unseen = lambda end: isinstance(end.exc_value, OSError)
    threading.excepthook = lambda end: None if unseen(end) else threading.__excepthook__(end)


class RunLog:
    """Writes the metrics of each step.

    metrics.jsonl gets one line a step, with a `phase` ("warmup", "train" or "eval"); TensorBoard gets the same names
    under the phase, and so does a tracker, which `describe` starts. rollouts.jsonl gets the completions of some steps:
    `rollout_rows`. `keep(phase, step)` says which lines of an interrupted run stay; the run makes the others again.
    """

    def __init__(self, folder, keep):
        self.folder, self.bar, self.accuracies, self.tracker = Path(folder), tqdm(disable=True), {}, None
        if not is_main():
            return
        from torch.utils.tensorboard import SummaryWriter  # slow to import; only here

        self.folder.mkdir(parents=True, exist_ok=True)
        self.file, self.rollouts = self.folder / "metrics.jsonl", self.folder / "rollouts.jsonl"
        kept = [row for row in read_rows(self.file, ("phase", "step")) if keep(row["phase"], row["step"])]
        self.accuracies = {row["step"]: row.get("accuracy") for row in kept if row["phase"] == "eval"}
        self.lines = len(kept)
        made = [row["step"] for row in kept if row["phase"] == "train"]
        write_rows(self.file, kept)
        if self.rollouts.exists():
            rows = read_rows(self.rollouts, ("step",))
            write_rows(self.rollouts, (row for row in rows if keep("train", row["step"])))
        self.board = SummaryWriter(self.folder, purge_step=1 + max(made) if made else None)

    def describe(self, config, versions):
        """Writes run.json, the whole configuration, and versions.json: command, versions, git revision, data. Starts
        the tracker."""
        if is_main():
            save_config(config, self.folder / "run.json")
            write_text(self.folder / "versions.json", json.dumps(versions, indent=2) + "\n")
            self.tracker = start_tracker(config)

    def start(self, title, total, first=0):
        """Begins the progress bar of a phase."""
        self.bar = tqdm(
            total=total, initial=first, desc=title, dynamic_ncols=True, mininterval=0.5, disable=not is_main()
        )

    def step(self, phase, step, metrics, shown=()):
        """shown: names of the metrics that the progress bar shows."""
        self.write(phase, step, metrics)
        values = {ON_THE_BAR.get(name, name): f"{metrics[name]:.3g}" for name in shown if name in metrics}
        self.bar.set_postfix(values, refresh=False)
        self.bar.update()

    def write(self, phase, step, metrics):
        if not is_main():
            return
        append_rows(self.file, [{"phase": phase, "step": step, **metrics}])
        numbers = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
        with naming(f"{self.folder}/events.out.tfevents.*"):
            for name, value in numbers.items():
                self.board.add_scalar(f"{phase}/{name}", value, step)
        if self.tracker:
            self.tracker.log(phase, step, self.lines, numbers)
        self.lines += 1

    def evaluation(self, step, summary, controls):
        """Held-out accuracy of a `grpo.engine.evaluate.summarise`: of what is trained, with its 95% interval, overall,
        and by category; and the `gaps` to the evaluations under controls."""
        if summary:
            low, high = summary["trained_interval"]
            categories = {f"accuracy_{category}": value for category, value in summary["categories"].items()}
            totals = {"accuracy": summary["trained"], "accuracy_overall": summary["overall"]}
            totals |= {"interval_low": low, "interval_high": high}
            located = summary.get("grounding", {})
            found = {f"{kind} {at}": value for kind, row in located.items() for at, value in row.items()}
            lost = gaps(summary, controls)
            failed = {"unjudged": summary["unjudged"]} if "unjudged" in summary else {}
            parts = [", ".join(f"{name} {value:.1%}" for name, value in summary["categories"].items())]
            parts += [f"{name.replace('_', ' ')} {value:.1%}" for name, value in lost.items()]
            parts += [f"the judge failed on {count}, scored 0" for count in failed.values()]
            self.write(
                "eval", step, {**totals, **categories, **found, "unparsed": summary["unparsed"], **lost, **failed}
            )
            self.say(
                f"step {step}: held-out accuracy {summary['trained']:.1%} ({100 * low:.1f}-{high:.1%}) of the "
                f"categories trained on, {summary['overall']:.1%} of all {summary['count']} questions; "
                f"{summary['skipped']} unreadable" + "".join(f"; {part}" for part in parts if part)
            )

    def show_failures(self, step, groups):
        """Names the user's own rewards that failed on this rank, and accuracy if the judge did; once for a sequence
        group."""
        failures = defaultdict(list)
        for name, messages in (item for group in groups for item in group.errors.items()):
            failures[name].append(messages[0])
        for name, messages in failures.items():
            where = f"{len(messages)} of {len(groups)} groups"
            line = f"step {step}: reward {name} failed in {where}, scored 0: {messages[0]}"
            self.say(line, everywhere=sequence.rank() == 0)

    def write_rollouts(self, step, groups):
        """Adds the groups of a step to rollouts.jsonl, those of all ranks, in the order in which the step drew their
        prompts."""
        rows = sum(gather_data(rollout_rows(step, groups)), [])
        if is_main():
            append_rows(self.rollouts, sorted(rows, key=lambda row: row["slot"]))

    def show_groups(self, step, groups, processor):
        """Shows the first groups of a step in TensorBoard: frames side by side, completions as a table."""
        for number, group in enumerate(groups[: SHOWN * is_main()]):
            for frames in frames_of(group.prompt, processor)[:1]:
                self.board.add_image(f"rollouts/{number}", strip(frames), step)
            self.board.add_text(f"rollouts/{number}", completions_table(group), step)

    def say(self, text, everywhere=False):
        """Prints a line above the progress bar; `everywhere`: also on ranks other than 0."""
        if is_main() or everywhere:
            tqdm.write(printable(text))

    def stop(self):
        """Ends the progress bar of a phase."""
        self.bar.close()

    def close(self):
        self.stop()
        if is_main():
            with naming(f"{self.folder}/events.out.tfevents.*"):
                self.board.close()
        if self.tracker:
            self.tracker.finish()


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


def describe_groups(groups):
    """Means over the step's completions on all ranks: rewards and their parts, accuracy by category, pass@k, lengths,
    what was answered."""
    accuracies = [group.parts["accuracy"] for group in groups if "accuracy" in group.parts]
    columns = {
        "reward": [r for group in groups for r in group.rewards],
        "length": [n for group in groups for n in group.lengths],
        "truncated_frac": [not done for group in groups for done in group.finished],
        "reward_std": [torch.tensor(group.rewards).std().item() for group in groups],
        "rewards_failed": [sum(map(len, group.errors.values())) for group in groups],
        "frac_groups_all_correct": [min(a) == 1 for a in accuracies],
        "frac_groups_all_wrong": [max(a) == 0 for a in accuracies],
    }
    for group in groups:
        for name, values in (*group.parts.items(), *group.logs.items()):
            columns.setdefault(name, []).extend(values)
        kind, accuracies = category_of(group.prompt.sample), group.parts.get("accuracy", [])
        columns.setdefault(f"accuracy_{kind}", []).extend(accuracies)
        for k in (2**power for power in range(1, len(accuracies).bit_length())):
            columns.setdefault(f"pass@{k}", []).append(pass_at_k(accuracies, k))
    texts = [text for group in groups for text in group.texts]
    samples = [group.prompt.sample for group in groups for _ in group.texts]
    merged, all_texts, all_samples = defaultdict(list), [], []
    for columns, texts, samples in gather_data((columns, texts, samples)):
        for name, values in columns.items():
            merged[name] += values
        all_texts += texts
        all_samples += samples
    answers, count = answer_stats(all_texts, all_samples), max(len(all_texts), 1)
    return {
        **{name: mean(values) for name, values in merged.items() if values},  # a metric that nobody measured is absent
        **{f"{name}_frac": answers[name] for name in ("no_answer", "several_answers")},
        **{f"letter_{letter}": number / count for letter, number in answers["letters"].items()},
    }


def describe_usage(groups, seconds, device):
    """{"tokens_per_second": completion tokens of all ranks by the `seconds` of the step, "peak_memory_gib"}."""
    tokens, peaks = zip(*gather((sum(n for group in groups for n in group.lengths), peak_memory(device))))
    return {"tokens_per_second": sum(tokens[:: sequence.size()]) / seconds, "peak_memory_gib": max(peaks)}


def peak_memory(device):
    """The most memory that this process has held so far, in GiB: what torch allocated on its GPU, or on a CPU the
    process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes on a Mac, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def rollout_rows(step, groups):
    """A row of rollouts.jsonl for each group: the question, its files and its answer; and for each of its G completions
    the text, length in tokens, reward, the parts of it, what rewards log of their own, and the advantage. "advantages"
    is None for a group that the dynamic filter left out."""
    return [
        {
            "step": step,
            "slot": group.prompt.sample.slot,
            **{name: getattr(group.prompt.sample, name) for name in ("key", "problem", "videos", "images", "answer")},
            "completions": group.texts,
            **{name: getattr(group, name) for name in ("lengths", "rewards", "parts", "logs")},
            "advantages": None if group.advantages is None else group.advantages.tolist(),
        }
        for group in groups
    ]


def completions_table(group):
    """A group's completions with reward, its parts and advantage, as Markdown."""
    plain = lambda text: " ".join(html.escape(text).replace("|", "&#124;").split())
    sample, names = group.prompt.sample, ["reward", "advantage", *group.parts]
    advantages = [0.0] * len(group.texts) if group.advantages is None else group.advantages  # None: filtered out
    columns = [group.rewards, advantages, *group.parts.values()]
    lines = [f"{plain(sample.problem)} (answer: {plain(sample.answer)})", ""]
    lines += ["| " + " | ".join([*names, "completion"]) + " |", "|---" * (len(names) + 1) + "|"]
    for text, *values in zip(group.texts, *columns):
        lines.append("| " + " | ".join([*(f"{float(v):.3g}" for v in values), plain(text)]) + " |")
    return "\n".join(lines)
