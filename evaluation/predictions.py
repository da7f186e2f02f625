"""Every answer of an evaluation in one file, written as it comes, so that a killed evaluation goes on where it stopped.

FOLDER/settings.json       what the answers depend on, besides checkpoint, mode and control
FOLDER/predictions.jsonl   one line an answer: checkpoint, mode, control, key, completion, prediction, score, ...
"""

import dataclasses
import json
from pathlib import Path

from grpo.config import Config
from grpo.engine.distributed import barrier, is_main, rank
from grpo.errors import ConfigError
from grpo.run.data import digest
from grpo.sampler import SamplingSettings
from video.dataset import Sample
from video.files import append_rows, read_rows, write_rows, write_text
from video.settings import VideoSettings

VARIANT = ("checkpoint", "mode", "control")  # the fields that tell two answers to one question apart


class Predictions:
    """The answers in a folder: `done` holds those of an earlier evaluation that have a score, `add` saves new ones.

    While the model answers, every rank writes a file of its own; `merge` joins them in predictions.jsonl.
    """

    def __init__(self, folder: Path, settings: dict):
        """Raises ConfigError if the answers in the folder were given under other settings."""
        self.folder = Path(folder)
        self.part_path = self.folder / f"predictions-{rank()}.jsonl"
        text = json.dumps(settings, indent=2) + "\n"
        check_settings(self.folder / "settings.json", json.loads(text))
        if is_main():
            write_text(self.folder / "settings.json", text)
        self.merge()
        self.done = {}  # {(checkpoint, mode, control): {key of a sample: record}}
        for record in read_rows(self.folder / "predictions.jsonl", (*VARIANT, "key")):
            if "unjudged" in record:
                continue
            self.done.setdefault(tuple(record.pop(name) for name in VARIANT), {})[record["key"]] = record

    def add(self, variant: tuple, records: list[dict]) -> None:
        append_rows(self.part_path, [{**dict(zip(VARIANT, variant)), **record} for record in records])

    def merge(self) -> None:
        """Moves the answers of all ranks to predictions.jsonl, one line each. A damaged line is left out, so that
        its question is asked again. Every process must call it."""
        barrier()
        if is_main():
            parts, names = sorted(self.folder.glob("predictions*.jsonl")), (*VARIANT, "key")
            rows = {tuple(row[name] for name in names): row for part in parts for row in read_rows(part, names)}
            write_rows(self.folder / "predictions.jsonl", [rows[place] for place in sorted(rows, key=repr)])
            for part in parts:
                if part.name != "predictions.jsonl":
                    part.unlink()
        barrier()


def check_settings(path: Path, settings: dict) -> None:
    """Raises ConfigError if the settings.json of an evaluation is damaged or has other values than `settings`."""
    try:
        saved = dict(json.loads(path.read_text()) if path.exists() else settings)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"--output {path.parent}: settings.json is damaged; choose another --output") from error
    changed = [
        f"{name} was {old!r}, is {settings.get(name)!r}" for name, old in saved.items() if settings.get(name) != old
    ]
    if changed:
        raise ConfigError(
            f"--output {path.parent} holds answers under other settings ({'; '.join(changed)}); choose another --output"
        )


def settings_of(config: Config, samples: list[Sample], sampling: SamplingSettings, device: str) -> dict:
    """What answers depend on, besides checkpoint, mode and control: plain values under the names of their flags."""
    names = "judge_model judge_prompt prompt_template answer_form max_prompt_tokens max_new_tokens eval_batch".split()
    asked = {name: getattr(config, name) for name in names}
    own = {"temperature": sampling.temperature, "device": device, "questions": digest(samples)}
    return {**dataclasses.asdict(VideoSettings.of(config)), **asked, **own}
