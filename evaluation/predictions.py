"""Every answer of an evaluation in one file, written as it comes, so that a killed evaluation goes on where it stopped.

FOLDER/settings.json       what the answers depend on, beside checkpoint, mode and control
FOLDER/predictions.jsonl   one line an answer: checkpoint, mode, control, key, completion, prediction, score, ...
"""

import dataclasses
import hashlib
import json
from pathlib import Path

from grpo.engine.distributed import barrier, is_main, rank
from grpo.errors import ConfigError
from grpo.run.data import digest
from video.files import append_rows, read_rows, write_rows, write_text

VARIANT = ("checkpoint", "mode", "control")  # what tells apart two answers to one question in one file


class Predictions:
    """The answers in a folder: `done[variant][key]` from before, `add` for new ones. Every process writes a file of its
    own, which `close` merges. Raises ConfigError where the folder's answers were given under other settings."""

    def __init__(self, folder, settings):
        self.folder = Path(folder)
        self.own = self.folder / f"predictions-{rank()}.jsonl"
        path, settings = self.folder / "settings.json", json.loads(json.dumps(settings))
        _check_settings(path, settings)
        barrier()
        if is_main():
            write_text(path, json.dumps(settings, indent=2) + "\n")
            self._merge()
        barrier()
        self.done = {}
        for record in read_rows(self.folder / "predictions.jsonl", (*VARIANT, "key")):
            self.done.setdefault(tuple(record.pop(name) for name in VARIANT), {})[record["key"]] = record
        barrier()

    def add(self, variant, records):
        append_rows(self.own, [{**dict(zip(VARIANT, variant)), **record} for record in records])

    def close(self):
        barrier()
        if is_main():
            self._merge()

    def _merge(self):
        """One line for each answer in predictions.jsonl; an answer whose line is damaged is made again."""
        parts, names = sorted(self.folder.glob("predictions*.jsonl")), (*VARIANT, "key")
        rows = {tuple(row[name] for name in names): row for part in parts for row in read_rows(part, names)}
        write_rows(self.folder / "predictions.jsonl", [rows[place] for place in sorted(rows, key=repr)])
        for part in parts:
            if part.name != "predictions.jsonl":
                part.unlink()


def _check_settings(path, settings):
    try:
        saved = dict(json.loads(path.read_text()) if path.exists() else settings)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"--output {path.parent}: settings.json is damaged; choose another --output") from error
    other = [
        f"{name} was {old!r}, is {settings.get(name)!r}" for name, old in saved.items() if settings.get(name) != old
    ]
    if other:
        raise ConfigError(
            f"--output {path.parent} holds answers under other settings ({'; '.join(other)}); choose another --output"
        )


def settings_of(config, samples, temperature, device):
    """What answers depend on beside checkpoint, mode and control: plain values under their flags' names."""
    return {
        **dataclasses.asdict(config.video_settings()),
        "prompt_template": config.prompt_template,
        "max_prompt_tokens": config.max_prompt_tokens,
        "max_new_tokens": config.max_new_tokens,
        "eval_batch": config.eval_batch,
        "temperature": temperature,
        "device": device,
        "questions": digest(samples),
    }


def checkpoint_identity(folder):
    """The folder's name and a digest of its weights: the size and both ends (1 MiB each) of every file of them, so that
    15 GB need not be read."""
    digest = hashlib.sha256()
    for path in sorted([*Path(folder).glob("*.safetensors"), Path(folder) / "config.json"]):
        if path.name == "optimizer.safetensors":
            continue
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            digest.update(file.read(2**20))
            file.seek(max(0, size - 2**20))
            digest.update(file.read())
    return f"{Path(folder).name}@{digest.hexdigest()[:12]}"
