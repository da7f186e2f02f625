"""Evaluates a checkpoint on held-out video questions, greedily, with the settings it was trained with.

    python eval.py --ckpt runs/demo/run/checkpoint-300              on the run's own held-out questions
    python eval.py --ckpt FOLDER --data FILE.jsonl --controls       on other questions; also with the video changed

The same code evaluates while training, so the numbers are the same.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from transformers import AutoProcessor

from grpo import distributed
from grpo.config import ConfigError, OneLineParser, load_config
from grpo.evaluate import CONTROLS, predict, summarise
from grpo.metrics import quiet_transformers
from grpo.model import ModelError
from grpo.report import evaluation_table
from grpo.run import build_policy, check_answers, split_data
from video.dataset import DataError
from video.loader import PromptLoader
from video.prompt import PromptEncoder


def evaluate(arguments):
    """Returns {"as is" or control: summary}; writes every answer to predictions.jsonl where --output is given."""
    config = load_config(Path(arguments.ckpt) / "run.json")
    config.device, config.gradient_checkpointing = arguments.device, False
    if arguments.data:
        config.data, config.eval_data, config.video_root = arguments.data, arguments.data, arguments.video_root
    config.eval_samples = arguments.samples or config.eval_samples
    if config.threads:
        torch.set_num_threads(config.threads)
    _, samples = split_data(config)
    check_answers(samples)
    processes = distributed.start(config.device)
    processor = AutoProcessor.from_pretrained(arguments.ckpt)
    policy = build_policy(arguments.ckpt, config, processor, processes)
    encoder = PromptEncoder(arguments.ckpt, config.video_settings(), config.prompt_template, config.max_prompt_tokens)
    results = {}
    with PromptLoader(encoder, config.workers, config.decode_timeout) as loader:
        for control in (None, *(CONTROLS if arguments.controls else ())):
            records = predict(
                policy, loader, samples, processor.tokenizer, processes, config.max_new_tokens, config.eval_batch,
                control=control,
            )  # fmt: skip
            results[control or "as is"] = summarise(records)
            if arguments.output and processes.is_main:
                write_records(Path(arguments.output), control or "as is", records)
    if processes.is_main:
        print(evaluation_table(results))
    distributed.stop()
    return results


def write_records(folder, name, records):
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"predictions-{name.replace(' ', '-')}.jsonl", "w") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def main(arguments=None):
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--ckpt", required=True, help="Checkpoint folder of a run: weights, processor and run.json.")
    parser.add_argument("--data", help="Questions, in place of the run's own held-out ones.")
    parser.add_argument("--video_root", help="Folder that the video paths of --data are under.")
    parser.add_argument("--samples", type=int, help="How many questions, in place of the run's --eval_samples.")
    parser.add_argument("--controls", action="store_true", help="Also with frames shuffled, time reversed, video blank.")
    parser.add_argument("--output", help="Folder for predictions-*.jsonl: every answer.")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="Where to run.")
    quiet_transformers()
    try:
        evaluate(parser.parse_args(arguments))
    except (ConfigError, DataError, ModelError) as error:
        print(f"eval.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
