"""Finds the rows of a data file that are worth training on, by how often a checkpoint is right with and without video.

    python -m evaluation.filter --ckpt runs/demo/run/warmup --data runs/demo/data/train.jsonl --output runs/demo/filter
    torchrun --nproc_per_node 4 -m evaluation.filter --ckpt FOLDER --data FILE --video_root FOLDER --output FOLDER

It samples --group_size completions of each question as training does, first with the video, then with none. A row is
dropped if its completions are never right, always right, or right without the video more often than by luck.

    OUTPUT/kept/NAME          the other rows, unchanged, in a file of the type and the name of --data
    OUTPUT/rates.jsonl        a line for each row: its rates, and why it was dropped
    OUTPUT/predictions.jsonl  scores as they come, so that a killed filter goes on where it stopped; the same command
                              with other thresholds samples nothing again
"""

if __name__ == "__main__":
    from video.terminal import prepare_terminal

    prepare_terminal()  # before the slow imports, as is the next: --help and a wrong flag answer at once
    from evaluation.flags import parse_filter_flags
    from grpo.config import parse_or_exit

    parse_or_exit(lambda: parse_filter_flags(__doc__))

import argparse
import math
import re
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from string import ascii_uppercase

from eval import STOPPED, Variant, answer, find_checkpoint, find_samples, make_config, start
from evaluation.flags import SAMPLING, SHARED, parse_filter_flags
from evaluation.predictions import Predictions, settings_of
from grpo.engine import distributed
from grpo.engine.distributed import is_main
from grpo.engine.evaluate import NO_VIDEO, EvalSettings
from grpo.errors import ConfigError
from grpo.run.folder import sole_use
from grpo.run.log import quiet_libraries
from grpo.run.stops import exit_code
from grpo.sampler import SamplingSettings
from rewards.judge import Judge
from video.dataset import copy_rows
from video.files import write_rows
from video.formats import MULTIPLE_CHOICE, Sample
from video.terminal import run_program

RIGHT = 0.5  # a score from which a completion counts as right: times, boxes and free text have scores between 0 and 1
VERDICTS = ("kept", "right when blind", "always right", "always wrong", "unreadable", "unjudged")
LABEL = re.compile(r"(?:^|\s)\(?([A-Z])[.):]\s")  # of an option in a question


def filter_rows(given: argparse.Namespace) -> dict[str, int]:
    """{verdict: number of rows}. Writes the files that the top of this file lists."""
    # 1) Checkpoint, settings and questions, as eval.py has them
    folder = find_checkpoint("--ckpt", given.ckpt)
    config = make_config(folder, given, (*SHARED, *SAMPLING))
    samples = find_samples(folder, config, given)
    check_thresholds(samples, given)
    device, build, say = start(config, samples)

    # 2) Scores: those that the folder has, and the others
    sampling = SamplingSettings.of(config)
    asking = EvalSettings(sampling, config.eval_batch, judge=Judge.of(config), group_size=given.group_size)
    variants = [Variant(name, folder, "think", control) for name, control in (("video", None), (NO_VIDEO, NO_VIDEO))]
    own = {**asdict(sampling), "group_size": given.group_size}
    output = Path(given.output)
    with sole_use(output):
        predictions = Predictions(output, settings_of(config, samples, sampling, device.type) | own)
        seen, blind = answer(variants, samples, config, asking, predictions, build, say).values()
        predictions.merge()

        # 3) Verdicts, and the rows that are kept
        rates = [rates_of(*row, given) for row in zip(samples, seen, blind)]
        counts = Counter(row["verdict"] for row in rates)
        if is_main():
            write_rows(output / "rates.jsonl", rates)
            (output / "kept").mkdir(exist_ok=True)
            kept = output / "kept" / Path(given.data).name
            copy_rows(given.data, kept, {int(r["key"].rpartition(":")[2]) for r in rates if r["verdict"] == "kept"})
            dropped = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS[1:])
            say(f"kept {counts['kept']} of {len(rates)} rows; dropped: {dropped}; {output / 'rates.jsonl'} has each")
            if counts["kept"]:
                say(f"to train on them: --data {kept} --video_root {given.video_root or Path(given.data).parent}")
    distributed.stop()
    return dict(counts)


def check_thresholds(samples: list[Sample], given: argparse.Namespace) -> None:
    """Raises ConfigError if the rates say nothing: if every row is dropped, or luck explains any blind rate."""
    if given.min_rate >= given.max_rate:
        raise ConfigError(f"--min_rate {given.min_rate}: must be below --max_rate {given.max_rate}")
    size, chance = given.group_size, max(chance_of(sample, given.open_chance) for sample in samples)
    if not 0 < given.blind_p < 1 or not 0 < chance < 1 or chance**size <= given.blind_p:
        return
    least = math.ceil(math.log(given.blind_p) / math.log(chance))
    raise ConfigError(
        f"--group_size {size}: guesses that are right at {chance:.2g} may all be right (p = {chance**size:.2g}), so no "
        f"blind answer stands out; give at least {least}, or raise --blind_p"
    )


def rates_of(sample: Sample, seen: dict, blind: dict, given: argparse.Namespace) -> dict:
    """A line of rates.jsonl: {"key", "category", "rate", "blind_rate", "chance", "blind_p", "verdict"}; key, verdict
    and why (`skipped` or `unjudged`) if the video could not be read, or the judge failed.

    seen, blind: the records (`grpo.engine.evaluate.predict`) with and without the video. blind_p: the probability that
    as many guesses are right, see `luck`. The first verdict that holds is given, in the order of VERDICTS.
    """
    for name, verdict in (("skipped", "unreadable"), ("unjudged", "unjudged")):
        for record in (seen, blind):
            if name in record:
                return {"key": sample.key, name: record[name], "verdict": verdict}
    count, chance = len(seen["scores"]), chance_of(sample, given.open_chance)
    rate, blind_rate = (sum(score >= RIGHT for score in record["scores"]) / count for record in (seen, blind))
    p = luck(round(blind_rate * count), count, chance)
    reasons = {
        "right when blind": p <= given.blind_p,
        "always right": rate >= given.max_rate,
        "always wrong": rate <= given.min_rate,
        "kept": True,
    }
    verdict = next(reason for reason, holds in reasons.items() if holds)
    rates = {"rate": rate, "blind_rate": blind_rate, "chance": chance, "blind_p": p}
    return {"key": sample.key, "category": seen["category"], **rates, "verdict": verdict}


def luck(right: int, count: int, chance: float) -> float:
    """P(X >= right) of X ~ Binomial(count, chance): how often so many guesses, or more, are right.

    luck(2, 2, 0.25) is 1 / 16
    """
    return sum(math.comb(count, n) * chance**n * (1 - chance) ** (count - n) for n in range(right, count + 1))


def chance_of(sample: Sample, open_chance: float) -> float:
    """How often a guess is right: 1 / number of options; `open_chance` if the row has none.

    Options that are only in the question count by their labels: "Which? A. left B. right" has two.
    """
    count = len(sample.options)
    if not count and sample.problem_type == MULTIPLE_CHOICE:
        labels = set(LABEL.findall(sample.problem))
        count = next(number for number, letter in enumerate(ascii_uppercase + "0") if letter not in labels)
    return 1 / count if count > 1 else open_chance


def main(arguments: list[str] | None = None) -> int:
    quiet_libraries()
    work = lambda: filter_rows(parse_filter_flags(__doc__, arguments))
    return run_program("evaluation.filter", work, STOPPED, exit_code)


if __name__ == "__main__":
    sys.exit(main())
