"""Evaluates a checkpoint on video questions, greedily, with the frames and the prompt that it was trained with.

    python eval.py --ckpt runs/demo/run/checkpoint-400                      on the run's own held-out questions
    python eval.py --ckpt runs/demo/run/checkpoint-400 --controls --against runs/demo/run/warmup
    python eval.py --ckpt Qwen/Qwen2-VL-7B-Instruct --data FILE.jsonl --video_root FOLDER
    torchrun --nproc_per_node 4 eval.py --ckpt FOLDER --benchmark mvbench --benchmark_dir FOLDER

Accuracies come with 95% Wilson intervals, answers that cannot be parsed count as wrong, unreadable videos are reported
apart. Every answer goes to predictions.jsonl as it comes: a killed evaluation goes on where it stopped. report.html
shows each question with the frames that the model saw. Training evaluates with the same code, so its numbers are these.
"""

if __name__ == "__main__":
    from video.terminal import prepare_terminal

    prepare_terminal()  # before the slow imports

import argparse
import dataclasses
import functools
import json
import signal
import sys
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from evaluation.benchmarks import BENCHMARKS, benchmark_score, read_benchmark
from evaluation.evaluate import CONTROLS, Progress, paired, predict, summarise
from evaluation.plot import plot_runs
from evaluation.predictions import Predictions, checkpoint_identity, settings_of
from evaluation.report import evaluation_table, write_report
from grpo import distributed
from grpo.build import build_policy
from grpo.config import Config, ConfigError, OneLineParser, add_flag, check, load_config
from grpo.data import draw
from grpo.inputs import check_answers, say_text_only, sole_use, split_data
from grpo.metrics import quiet_libraries
from grpo.model import check_folder, read_processor
from grpo.selfcheck import choose_fast_paths
from grpo.stops import exit_code
from video.dataset import read_samples
from video.files import write_text
from video.formats import DataError
from video.loader import PromptLoader
from video.prompt import PromptEncoder

# Flags of training that also say how to evaluate; without them the checkpoint's own values hold.
SHARED = ("fps", "nframes", "min_frames", "max_frames", "min_pixels", "max_pixels", "total_pixels", "prompt_template",
          "max_prompt_tokens", "max_new_tokens", "eval_batch", "workers", "threads", "decode_timeout",
          "device", "decode_graph", "text_only")  # fmt: skip
DIRECT = "Answer with the letter of the option only."
DIRECT_BY_TYPE = dict.fromkeys(("numerical", "mra", "regression", "math"), "Answer with a number only.")
DIRECT_BY_TYPE |= dict.fromkeys(("OCR", "free-form"), "Answer with a word or a short phrase only.")
WEIGHTS = ("*.json", "*.safetensors", "*.jinja", "*.txt")


@dataclasses.dataclass(frozen=True)
class Variant:
    """One column of the table: which checkpoint answers, how it is asked, what is done to the video."""

    name: str
    folder: Path
    mode: str
    control: str | None


def find_checkpoint(flag, path):
    """The local folder of a checkpoint folder or hub name. Raises ConfigError, and as `read_processor`."""
    check_folder(flag, path)
    folder = Path(path)
    if not folder.exists():
        try:
            folder = Path(snapshot_download(path, allow_patterns=WEIGHTS))
        except (HfHubHTTPError, OSError, ValueError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigError(f"{flag} {path}: no such folder, and not on the hub ({reason})") from error
    if (folder / "adapter_config.json").is_file():
        raise ConfigError(f"{flag} {path}: holds adapters alone; give RUN/merged, which --lora_merge writes")
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"{flag} {path}: has no config.json; give the folder of a checkpoint, such as RUN/checkpoint-400"
        )
    read_processor(folder)
    return folder


def make_config(folder, arguments):
    """The checkpoint's Config (the defaults where it is none of this project), changed by the flags given."""
    saved = folder / "run.json"
    config = load_config(saved) if saved.exists() else Config()
    given = {name: value for name, value in vars(arguments).items() if name in SHARED}
    # Evaluation scores accuracy alone: a reward file of the training machine need not be here.
    config = dataclasses.replace(config, **given, reward=("accuracy:1",), gradient_checkpointing=False)
    check(config)
    for name, least in (("temperature", 0.0), ("samples", 1), ("report_samples", 0)):
        value = getattr(arguments, name)
        if value is not None and not least <= value < float("inf"):
            raise ConfigError(f"--{name} {value}: must be at least {least}, and finite")
    if arguments.output == "":
        raise ConfigError("--output: is empty; name a folder")
    return config


def find_samples(folder, config, arguments):
    """The questions: of --benchmark, of --data, or those that the checkpoint's run held out."""
    if arguments.benchmark:
        if not arguments.benchmark_dir or arguments.data:
            raise ConfigError(
                "--benchmark needs --benchmark_dir, the folder of its annotations and videos, and no --data"
            )
        samples = read_benchmark(arguments.benchmark, arguments.benchmark_dir)
    elif arguments.data:
        samples = read_samples(arguments.data, arguments.video_root, text_only=config.text_only)
    elif (folder / "run.json").exists():
        config.video_root = arguments.video_root or config.video_root
        if config.eval_data:  # held out of --data, more would be what the run was trained on
            config.eval_samples = arguments.samples or config.eval_samples
        try:
            samples = split_data(config, lambda line: None)[1]
        except DataError as error:
            raise DataError(f"{error}; {folder / 'run.json'} names that data; --data takes another") from error
    else:
        raise ConfigError(
            f"--ckpt {arguments.ckpt}: is of no run, so it has no held-out questions; give --data or --benchmark"
        )
    if not samples:
        raise ConfigError(f"--ckpt {arguments.ckpt}: its run held out no questions; give --data FILE")
    samples = draw(samples, arguments.samples or len(samples))
    check_answers(samples)
    return samples


def make_variants(arguments, folder, against):
    modes = ("think", "direct") if arguments.mode == "both" else (arguments.mode,)
    label = lambda mode, name: f"{mode} {name}".strip() if len(modes) > 1 else name or mode
    controls = (None, *CONTROLS) if arguments.controls else (None,)
    own = [Variant(label(mode, c or ""), folder, mode, c) for mode in modes for c in controls]
    return own + [Variant(label(mode, "against"), against, mode, None) for mode in modes if against]


def ask(samples, mode, config):
    """(prompt template, samples) of a mode: "think" asks as in training, "direct" for the answer alone."""
    if mode == "think":
        return config.prompt_template, samples
    asked = [f"{s.problem}\n{DIRECT_BY_TYPE.get(s.problem_type, DIRECT)}" for s in samples]
    return "{problem}", [dataclasses.replace(s, problem=problem) for s, problem in zip(samples, asked)]


def answer(variants, samples, config, temperature, predictions, processes):
    """{variant: records}. A model is loaded only where answers are missing."""
    records, loaded = {}, None
    for folder, mode in dict.fromkeys((v.folder, v.mode) for v in variants):
        template, asked = ask(samples, mode, config)
        encoder = PromptEncoder(folder, config.video_settings(), template, config.max_prompt_tokens)
        with PromptLoader(encoder, config.workers, config.decode_timeout) as loader:
            for variant in (v for v in variants if (v.folder, v.mode) == (folder, mode)):
                place = (checkpoint_identity(folder), mode, variant.control)
                done = predictions.done.get(place, {})
                if all(s.key in done for s in samples):
                    records[variant] = [done[s.key] for s in samples]
                    continue
                if loaded != folder:
                    policy, first = None, loaded is None  # None: the memory of the other checkpoint
                    processor = read_processor(folder)
                    # No masters: what is computed in is what is held, half the memory and the same numbers.
                    policy, loaded = build_policy(folder, config, processor, processes, trained=False), folder
                    if first:  # it decides for the other one too
                        say = print if processes.is_main else lambda line: None
                        choose_fast_paths(policy, loader, asked, config, processes, processor.tokenizer, say)
                save = functools.partial(predictions.add, place)
                with Progress(variant.name, len(samples) - len(done), processes, save=save) as progress:
                    records[variant] = predict(
                        policy, loader, asked, processor.tokenizer, processes, config.max_new_tokens, config.eval_batch,
                        temperature=temperature, control=variant.control, done=done, report=progress,
                    )  # fmt: skip
    return records


def compare(variants, records):
    """{mode: `evaluation.evaluate.paired`} of --ckpt and --against; {} without the latter."""
    plain = {(v.folder, v.mode): records[v] for v in variants if v.control is None}
    ours = variants[0].folder
    return {mode: paired(plain[ours, mode], theirs) for (folder, mode), theirs in plain.items() if folder != ours}


def evaluate(arguments):
    """Returns {"results": {column: summary}, "paired", "score"}, as written to results.json."""
    folder = find_checkpoint("--ckpt", arguments.ckpt)
    against = arguments.against and find_checkpoint("--against", arguments.against)
    if against and checkpoint_identity(against) == checkpoint_identity(folder):
        raise ConfigError(f"--against {arguments.against}: has the same weights as --ckpt; give another checkpoint")
    config = make_config(folder, arguments)
    samples = find_samples(folder, config, arguments)
    if config.threads:
        torch.set_num_threads(config.threads)
    processes = distributed.start(config.device)
    output = Path(arguments.output or default_output(arguments))
    if processes.is_main:
        say_text_only(samples, "to answer", print)
    settings = settings_of(config, samples, arguments.temperature, processes.device.type)
    variants = make_variants(arguments, folder, against)
    with sole_use(output, processes):
        predictions = Predictions(output, settings, processes)
        records = answer(variants, samples, config, arguments.temperature, predictions, processes)
        predictions.close()
    result = {"results": {v.name: summarise(rows) for v, rows in records.items()}, "paired": compare(variants, records)}
    if arguments.benchmark:
        result["score"] = {name: benchmark_score(arguments.benchmark, s) for name, s in result["results"].items()}
    if processes.is_main:
        write_text(output / "results.json", json.dumps(result, indent=2) + "\n")
        print(f"\n{evaluation_table(result)}")
        columns = {v.name: rows for v, rows in records.items()}
        path = show(arguments, config, output, folder, ask(samples, variants[0].mode, config), result, columns)
        print(f"answers: {output / 'predictions.jsonl'}; to look at: {path}")
    distributed.stop()
    return result


def show(arguments, config, output, folder, asked, result, columns):
    """Writes report.html, with the picture of the run that the checkpoint is of, and returns its path."""
    template, samples = asked
    run = folder.parent if (folder.parent / "metrics.jsonl").exists() else None
    picture = plot_runs([run], output / "training.png") if run else None
    title = f"{arguments.ckpt} on {arguments.benchmark or arguments.data or 'the questions that its run held out'}"
    encoder = PromptEncoder(folder, config.video_settings(), template, config.max_prompt_tokens)
    with PromptLoader(encoder, config.workers, config.decode_timeout) as loader:
        questions = [(s, {name: rows[i] for name, rows in columns.items()}) for i, s in enumerate(samples)]
        return write_report(output / "report.html", title, result, questions, loader, arguments.report_samples, picture)


def default_output(arguments):
    """Beside a local checkpoint, under runs/ for a hub name."""
    local = Path(arguments.ckpt).exists()
    stem = str(Path(arguments.ckpt).absolute()) if local else "runs/" + arguments.ckpt.replace("/", "--")
    questions = arguments.benchmark or (Path(arguments.data).stem if arguments.data else "")
    return f"{stem}-evaluation-{questions}".removesuffix("-")


def make_parser():
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        epilog="Frames, pixels and prompt are as in training; values in brackets hold where a checkpoint has none.",
    )  # fmt: skip
    add = parser.add_argument
    add("--ckpt", required=True, help="Checkpoint of a run, or any Hugging Face folder or hub name of this family.")
    add("--data", help="Questions, in place of the run's own held-out ones.")
    add("--video_root", help="Folder that video paths are under (default: that of the data file, or as in training).")
    add("--benchmark", choices=tuple(BENCHMARKS), help="A published benchmark, scored as it scores.")
    add("--benchmark_dir", help="Its folder: annotation files and videos as published.")
    add("--mode", choices=("think", "direct", "both"), default="think", help="As in training, or the answer only.")
    add("--controls", action="store_true", help="Also with the video shuffled, reversed and blank, and with no video.")
    add("--against", help="A second checkpoint for the same questions and settings: paired difference and its p-value.")
    add("--samples", type=int, help="Only so many questions, drawn from all, always the same.")
    add("--temperature", type=float, default=0.0, help="Sampling temperature; 0 is greedy. [0.0]")
    add("--report_samples", type=int, default=300, help="Most questions shown in report.html. [300]")
    add("--output", help="Folder of predictions.jsonl, results.json and report.html [CKPT-evaluation].")
    for item in dataclasses.fields(Config):
        if item.name in SHARED:
            add_flag(parser, item, item.default)
    return parser


def main(arguments=None):
    quiet_libraries()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        evaluate(make_parser().parse_args(arguments))
    except KeyboardInterrupt:
        print("eval.py: stopped; the same command goes on from the answers that there are", file=sys.stderr)
        return 130
    except Exception as error:
        return exit_code("eval.py", error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
