"""The command lines of eval.py and evaluation/filter.py. Imports no torch and no transformers: --help and a wrong flag
answer at once."""

import argparse
import math
from dataclasses import fields

from evaluation.benchmarks import BENCHMARKS
from grpo.config import SYNONYMS, Config, add_flag
from grpo.errors import ConfigError
from video.terminal import OneLineParser

# Flags of training that also say how to evaluate; without a flag, the value that the checkpoint was trained with holds,
# but for --sequence_parallel, which is about this machine.
SHARED = ("fps", "nframes", "min_frames", "max_frames", "min_pixels", "max_pixels", "total_pixels", "prompt_template",
          "answer_form", "max_prompt_tokens", "max_new_tokens", "eval_batch", "workers", "threads", "decode_timeout",
          "device", "decode_graph", "text_only", "sequence_parallel", "judge_url", "judge_model", "judge_prompt",
          "judge_cache", "judge_concurrency", "reward_timeout")  # fmt: skip
SAMPLING = ("temperature", "top_k", "top_p")  # likewise, of what samples as training does


def parse_flags(description: str, arguments: list[str] | None = None) -> argparse.Namespace:
    """The checked flags of eval.py's command line; of SHARED only those that are given. `description`: what --help
    begins with.

    An unknown flag, a value of the wrong type and an unknown choice exit with code 2; a value out of range raises
    ConfigError.
    """
    parser = _parser(description)
    add = parser.add_argument
    add("--data", help="Questions, in place of the run's own held-out ones.")
    add("--benchmark", choices=tuple(BENCHMARKS), help="A published benchmark, scored as it scores.")
    add("--benchmark_dir", help="Its folder: annotation files and videos as published.")
    add("--mode", choices=("think", "direct", "both"), default="think", help="As trained, or the answer only. [think]")
    add("--controls", action="store_true", help="Also with the video shuffled, reversed and blank, and with no video.")
    add("--against", help="A second checkpoint for the same questions and settings: paired difference and its p-value.")
    add("--temperature", type=float, default=0.0, help="Sampling temperature; 0 is greedy. [0.0]")
    add("--report_samples", type=int, default=300, help="Most questions shown in report.html. [300]")
    add("--output", help="Folder of predictions.jsonl, results.json and report.html [CKPT-evaluation].")
    return _parse(parser, SHARED, arguments, {"temperature": (0.0,), "samples": (1,), "report_samples": (0,)})


def parse_filter_flags(description: str, arguments: list[str] | None = None) -> argparse.Namespace:
    """As `parse_flags`, for evaluation/filter.py; of SHARED and SAMPLING only those that are given."""
    parser = _parser(description, "evaluation.filter")
    add = parser.add_argument
    add("--data", required=True, help="The file of questions to filter, of any known format.")
    add("--output", required=True, help="Folder of predictions.jsonl, rates.jsonl and the rows that are kept.")
    add("--group_size", type=int, default=16, help="Completions of each question, with the video and without. [16]")
    add("--min_rate", type=float, default=0.0, help="Drop a row if no more than this share is right. [0.0]")
    add("--max_rate", type=float, default=1.0, help="Drop a row if at least this share is right. [1.0]")
    add("--blind_p", type=float, default=0.01, help="Drop a row if guessing makes as many right without the video with "
        "at most this probability. [0.01]")  # fmt: skip
    add("--open_chance", type=float, default=0.25, help="How often a guess is right if there are no options. [0.25]")
    parser.set_defaults(benchmark=None)
    shares = dict.fromkeys(("min_rate", "max_rate", "blind_p", "open_chance"), (0.0, 1.0))
    return _parse(parser, (*SHARED, *SAMPLING), arguments, {"samples": (1,), "group_size": (2,), **shares})


def _parse(parser, names, arguments, limits):
    """Adds the flags `names` of training to the parser. Returns the flags of a command line, and raises ConfigError if
    one is out of `limits`, {flag: (least,) or (least, most)}."""
    for item in fields(Config):
        if item.name in names:
            add_flag(parser, item, item.default)
    given = parser.parse_args(arguments)
    for name, (least, *most) in limits.items():
        value = getattr(given, name)
        if value is not None and not least <= value < math.inf:
            raise ConfigError(f"--{name} {value}: must be at least {least}, and finite")
        if value is not None and most and value > most[0]:
            raise ConfigError(f"--{name} {value}: must be at most {most[0]}")
    if given.output == "":
        raise ConfigError("--output: is empty; name a folder")
    return given


def _parser(description, prog=None):
    """A parser of the flags that both programs have, but for those of training."""
    note = "Frames, pixels and prompt are as in training; a value in brackets holds if the checkpoint has none."
    parser = OneLineParser(prog=prog, description=description, allow_abbrev=False, epilog=note, synonyms=SYNONYMS)
    add = parser.add_argument
    add("--ckpt", required=True, help="Checkpoint of a run, or any Hugging Face folder or hub name of a known family.")
    add("--video_root", help="Folder that video paths are under (default: that of the data file, or as in training).")
    add("--samples", type=int, help="Only so many questions, drawn from all, always the same.")
    return parser
