"""Evaluates a checkpoint on video questions, greedily, with the frames and the prompt that it was trained with.

    python eval.py --ckpt runs/demo/run/checkpoint-200                      on the run's own held-out questions
    python eval.py --ckpt runs/demo/run/checkpoint-200 --controls --against runs/demo/run/warmup
    python eval.py --ckpt Qwen/Qwen2-VL-7B-Instruct --data FILE.jsonl --video_root FOLDER
    torchrun --nproc_per_node 4 eval.py --ckpt FOLDER --benchmark mvbench --benchmark_dir FOLDER

Accuracies come with 95% Wilson intervals. An answer that cannot be parsed counts as wrong; a question whose video
cannot be read is counted apart. Every answer goes to predictions.jsonl as it comes, so a killed evaluation goes on
where it stopped. report.html shows each question with the frames that the model saw. Training evaluates with the same
code, so it logs the same numbers.
"""

if __name__ == "__main__":
    from video.terminal import prepare_terminal

    prepare_terminal()  # before the slow imports, as is the next: --help and a wrong flag answer at once
    from evaluation.flags import parse_flags
    from grpo.config import parse_or_exit

    parse_or_exit(lambda: parse_flags(__doc__))

import argparse
import functools
import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from evaluation.benchmarks import benchmark_score, read_benchmark
from evaluation.flags import SHARED, parse_flags
from evaluation.plot import plot_runs
from evaluation.predictions import Predictions, settings_of
from evaluation.report import evaluation_table, write_report
from evaluation.significance import paired, with_intervals
from grpo.config import Config, check, load_config
from grpo.engine import distributed
from grpo.engine.build import build_policy
from grpo.engine.distributed import is_main
from grpo.engine.evaluate import CONTROLS, EvalSettings, predict, show_progress, summarise
from grpo.engine.fast_paths import choose_fast_paths
from grpo.engine.model_files import find_model, model_identity, read_processor
from grpo.errors import ConfigError
from grpo.run.data import check_answers, digest, draw, say_free_text, say_text_only, split_data
from grpo.run.folder import sole_use
from grpo.run.log import quiet_libraries
from grpo.run.run import make_encoder
from grpo.run.stops import exit_code
from grpo.sampler import SamplingSettings
from rewards.grounding import OVERLAPS
from rewards.judge import Judge
from video.dataset import read_samples
from video.files import write_text
from video.formats import DataError, Sample
from video.loader import PromptLoader
from video.settings import answer_form
from video.terminal import run_program

STOPPED = "stopped; the same command goes on from the answers that there are"  # after Ctrl-C
DIRECT = "Answer with the letter of the option only."
DIRECT_BY_TYPE = dict.fromkeys(("numerical", "mra", "regression", "math"), "Answer with a number only.")
DIRECT_BY_TYPE |= dict.fromkeys(("OCR", "free-form", "open-ended"), "Answer with a word or a short phrase only.")


@dataclass(frozen=True)
class Variant:
    """One column of the table: every question, answered by one checkpoint in one way."""

    name: str  # of the column, e.g. "think shuffled"
    folder: Path  # the checkpoint
    mode: str  # "think": asked as in training; "direct": asked for the answer only
    control: str | None  # what is done to the video, one of CONTROLS


def evaluate(arguments: argparse.Namespace) -> dict:
    """Returns {"results": {column: summary}, "paired": {mode: gain}, "score": {column: share}}, as in results.json.

    `score` is there for a benchmark only, `paired` is {} without --against.
    """
    # 1) The checkpoints
    folder = find_checkpoint("--ckpt", arguments.ckpt)
    against = arguments.against and find_checkpoint("--against", arguments.against)
    if against and model_identity(against) == model_identity(folder):
        raise ConfigError(f"--against {arguments.against}: has the same weights as --ckpt; give another checkpoint")

    # 2) The settings, the questions, and the ways in which they are asked
    config = make_config(folder, arguments)
    samples = find_samples(folder, config, arguments)
    variants = make_variants(arguments, folder, against)
    device, build, say = start(config, samples)
    sampling = SamplingSettings(arguments.temperature, max_new_tokens=config.max_new_tokens)
    asking = EvalSettings(sampling, config.eval_batch, judge=Judge.of(config))

    # 3) The answers: those that the folder has, and the others
    output = Path(arguments.output or default_output(arguments))
    settings = settings_of(config, samples, sampling, device.type)
    with sole_use(output):
        predictions = Predictions(output, settings)
        columns = answer(variants, samples, config, asking, predictions, build, say)
        predictions.merge()

    # 4) Accuracies, and the comparison of the two checkpoints on the videos as they are
    own = {v.mode: columns[v.name] for v in variants if v.folder == folder and v.control is None}
    gains = {v.mode: paired(own[v.mode], columns[v.name]) for v in variants if v.folder == against}
    result = {
        "results": {n: with_intervals(summarise(records), records) for n, records in columns.items()},
        "paired": gains,
    }
    if arguments.benchmark:
        result["score"] = {name: benchmark_score(arguments.benchmark, s) for name, s in result["results"].items()}

    # 5) What there is to read and to look at
    if is_main():
        write_text(output / "results.json", json.dumps(result, indent=2) + "\n")
        print(f"\n{evaluation_table(result)}")
        asked = ask(samples, variants[0].mode)
        questions = [(s, {name: records[i] for name, records in columns.items()}) for i, s in enumerate(asked)]
        path = show(arguments, config, output, variants[0], questions, result)
        print(f"answers: {output / 'predictions.jsonl'}; to look at: {path}")
    distributed.stop()
    return result


def find_checkpoint(flag: str, path: str) -> Path:
    """The folder of a checkpoint, given as folder or hub name. Raises ModelError."""
    folder = find_model(path, flag)
    read_processor(folder, flag)
    return folder


def make_config(folder: Path, arguments: argparse.Namespace, names: tuple[str, ...] = SHARED) -> Config:
    """The Config of the checkpoint's run (the defaults if no run made it), with the flags of `names` that are given."""
    saved = folder / "run.json"
    config = load_config(saved) if saved.exists() else Config()
    given = {name: value for name, value in vars(arguments).items() if name in names}
    given = {"sequence_parallel": Config.sequence_parallel, **given}
    # Evaluation scores accuracy alone: reward files and the frame cache of the training machine need not be here.
    config = replace(config, **given, reward=("accuracy:1",), frame_cache=None, activation_checkpointing="none")
    check(config)
    return config


def start(config: Config, samples: list[Sample]) -> tuple[torch.device, Callable, Callable]:
    """(this rank's device, what builds the policy of (folder, processor=...), what prints a line on the main process).

    Says of the samples what a user may not expect.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    device, mesh = distributed.start(config.device, sequence_parallel=config.sequence_parallel)
    say = print if is_main() else lambda line: None
    say_text_only(samples, "to answer", say)
    say_free_text(samples, "to answer", config, say)
    return device, functools.partial(build_policy, config=config, device=device, mesh=mesh, trained=False), say


def find_samples(folder: Path, config: Config, arguments: argparse.Namespace) -> list[Sample]:
    """The questions: of --benchmark, of --data, or those that the checkpoint's run held out."""
    if arguments.benchmark:
        if not arguments.benchmark_dir or arguments.data:
            raise ConfigError("--benchmark needs --benchmark_dir, its annotations and videos, and no --data")
        samples = read_benchmark(arguments.benchmark, arguments.benchmark_dir)
    elif arguments.data:
        samples = read_samples(arguments.data, arguments.video_root, text_only=config.text_only)
    else:
        samples = held_out_samples(folder, config, arguments)
    samples = draw(samples, arguments.samples or len(samples))
    check_answers(samples)
    return samples


def held_out_samples(folder: Path, config: Config, arguments: argparse.Namespace) -> list[Sample]:
    """The questions that the checkpoint's run held out of its data."""
    if not (folder / "run.json").exists():
        raise ConfigError(f"--ckpt {arguments.ckpt}: no run made it and held out questions; give --data or --benchmark")
    config = replace(config, video_root=arguments.video_root or config.video_root)
    if config.eval_data and arguments.samples:  # without a file of their own, more would be what the run was trained on
        config = replace(config, eval_samples=arguments.samples)
    try:
        samples = split_data(config, lambda line: None)[1]
    except DataError as error:
        raise DataError(f"{error}; {folder / 'run.json'} names that data; --data takes another") from error
    if not samples:
        raise ConfigError(f"--ckpt {arguments.ckpt}: its run held out no questions; give --data FILE")
    if not config.eval_data and (was := held_out_by(folder.parent)) not in (None, digest(samples)):
        raise ConfigError(
            f"--ckpt {arguments.ckpt}: its run held out {was}, of data that has changed since: what would be held out "
            f"now ({digest(samples)}) may have been trained on; give --data FILE"
        )
    return samples


def held_out_by(run: Path) -> str | None:
    """The digest of the questions that a run held out, as its folder says; None if it does not."""
    try:
        return json.loads((run / "versions.json").read_text())["data"]["held out"]
    except (OSError, ValueError, TypeError, KeyError):
        return None


def make_variants(arguments: argparse.Namespace, folder: Path, against: Path | None) -> list[Variant]:
    """The columns in the order of the table. Their names have the mode if there are two: "think shuffled", "direct
    shuffled"; else "shuffled", and the mode alone for the video as it is."""
    modes = ("think", "direct") if arguments.mode == "both" else (arguments.mode,)
    controls = (None, *CONTROLS) if arguments.controls else (None,)
    label = lambda mode, name: f"{mode} {name}".strip() if len(modes) > 1 else name or mode
    own = [Variant(label(mode, control or ""), folder, mode, control) for mode in modes for control in controls]
    return own + [Variant(label(mode, "against"), against, mode, None) for mode in modes if against]


def answer(
    variants: list[Variant],
    samples: list[Sample],
    config: Config,
    asking: EvalSettings,
    predictions: Predictions,
    build: Callable,
    say: Callable,
) -> dict[str, list[dict]]:
    """{name of a variant: one record for each sample}. A checkpoint is loaded only if answers of it are missing.

    asking: how the questions are asked, but for the control, which is each variant's. build: returns the policy of
    (folder, processor=...); say: takes a line for the user.
    """
    places = {v: (model_identity(v.folder), v.mode, v.control) for v in variants}
    done = {v: predictions.done.get(place, {}) for v, place in places.items()}
    missing = [v for v in variants if any(s.key not in done[v] for s in samples)]
    policy = loaded = None
    for (folder, mode), group in itertools.groupby(missing, lambda v: (v.folder, v.mode)):
        questions = ask(samples, mode)
        with open_loader(folder, mode, config) as loader:
            tokenizer = loader.encoder.processor.tokenizer
            if loaded != folder:
                policy = None  # frees the memory of the other checkpoint
                policy = build(folder, processor=loader.encoder.processor)
                if loaded is None:  # the first checkpoint decides for the other one too
                    choose_fast_paths(policy, loader, questions, config, tokenizer, say)
                loaded = folder
            for v in group:
                save = functools.partial(predictions.add, places[v])
                settings = replace(asking, control=v.control)
                with show_progress(v.name, len(samples) - len(done[v]), save=save) as report:
                    records = predict(policy, loader, questions, tokenizer, settings, done=done[v], report=report)
                done[v] = {record["key"]: record for record in records}
    return {v.name: [done[v][s.key] for s in samples] for v in variants}


def ask(samples: list[Sample], mode: str) -> list[Sample]:
    """The samples with the questions of a mode: "direct" adds which form the answer must have."""
    if mode == "think":
        return samples
    return [replace(s, problem=f"{s.problem}\n{direct_form(s)}") for s in samples]


def direct_form(sample: Sample) -> str:
    """The sentence that asks for the answer alone."""
    if sample.problem_type in OVERLAPS:
        return f"Answer only with {answer_form(sample)}."
    return DIRECT_BY_TYPE.get(sample.problem_type, DIRECT)


def open_loader(folder: Path, mode: str, config: Config) -> PromptLoader:
    """Encodes questions for a checkpoint: in the template of training, or, in the mode "direct", as they are."""
    template = config.prompt_template if mode == "think" else "{problem}"
    return PromptLoader(make_encoder(config, template, folder), config.workers, config.decode_timeout)


def show(
    arguments: argparse.Namespace, config: Config, output: Path, first: Variant, questions: list, result: dict
) -> Path:
    """Writes report.html, with the curve of the run that the checkpoint is of, and returns its path.

    first: the variant whose answers are shown in full. questions: as for `write_report`.
    """
    run, picture = first.folder.parent, None
    if (run / "metrics.jsonl").exists():
        picture = plot_runs([run], output / "training.png")
    title = f"{arguments.ckpt} on {arguments.benchmark or arguments.data or 'the questions that its run held out'}"
    with open_loader(first.folder, first.mode, replace(config, sequence_parallel=1)) as loader:  # of whole videos
        return write_report(output / "report.html", title, result, questions, loader, arguments.report_samples, picture)


def default_output(arguments: argparse.Namespace) -> str:
    """The folder CKPT-evaluation beside a local checkpoint, or under runs/ for a hub name."""
    local = Path(arguments.ckpt).exists()
    stem = str(Path(arguments.ckpt).absolute()) if local else "runs/" + arguments.ckpt.replace("/", "--")
    questions = arguments.benchmark or Path(arguments.data or "").stem
    return f"{stem}-evaluation-{questions}".removesuffix("-")


def main(arguments: list[str] | None = None) -> int:
    quiet_libraries()
    return run_program("eval.py", lambda: evaluate(parse_flags(__doc__, arguments)), STOPPED, exit_code)


if __name__ == "__main__":
    sys.exit(main())
