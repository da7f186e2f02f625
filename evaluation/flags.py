"""The command line of eval.py. Imports no torch and no transformers: --help and a wrong flag answer at once."""

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


def parse_flags(description: str, arguments: list[str] | None = None) -> argparse.Namespace:
    """The checked flags of a command line; of SHARED only those that are given. `description`: what --help begins with.

    An unknown flag, a value of the wrong type and an unknown choice exit with code 2; a value out of range raises
    ConfigError.
    """
    given = _parser(description).parse_args(arguments)
    for name, least in (("temperature", 0.0), ("samples", 1), ("report_samples", 0)):
        value = getattr(given, name)
        if value is not None and not least <= value < math.inf:
            raise ConfigError(f"--{name} {value}: must be at least {least}, and finite")
    if given.output == "":
        raise ConfigError("--output: is empty; name a folder")
    return given


def _parser(description):
    layout = argparse.RawDescriptionHelpFormatter
    note = "Frames, pixels and prompt are as in training; a value in brackets holds if the checkpoint has none."
    parser = OneLineParser(
        description=description, formatter_class=layout, allow_abbrev=False, epilog=note, synonyms=SYNONYMS
    )
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
    for item in fields(Config):
        if item.name in SHARED:
            add_flag(parser, item, item.default)
    return parser
