"""Every answer of an evaluation in one file, written as it comes, so that a killed evaluation goes on where it stopped.

FOLDER/settings.json       what the answers depend on, beside checkpoint, mode and control
FOLDER/predictions.jsonl   one line an answer: checkpoint, mode, control, key, completion, prediction, score, ...
"""

import dataclasses
import hashlib
import json
import os
from pathlib import Path

from grpo.config import ConfigError
from grpo.data import digest

VARIANT = ("checkpoint", "mode", "control")  # what tells apart two answers to one question in one file


class Predictions:
    """The answers in a folder: `done[variant][key]` from before, `add` for new ones. Every process writes a file of its
    own, which `close` merges. Raises ConfigError where the folder's answers were given under other settings."""

    def __init__(self, folder, settings, processes):
        self.folder, self.processes = Path(folder), processes
        self.own = self.folder / f"predictions-{processes.rank}.jsonl"
        path, settings = self.folder / "settings.json", json.loads(json.dumps(settings))
        _check_settings(path, settings)
        processes.barrier()
        if processes.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(settings, indent=2) + "\n")
            self._merge()
        processes.barrier()
        self.done = {}
        for record in _read(self.folder / "predictions.jsonl"):
            self.done.setdefault(tuple(record.pop(name) for name in VARIANT), {})[record["key"]] = record
        processes.barrier()
        self.file = open(self.own, "a")  # open as long as the evaluation runs

    def add(self, variant, records):
        lines = [json.dumps({**dict(zip(VARIANT, variant)), **record}) + "\n" for record in records]
        self.file.write("".join(lines))
        self.file.flush()

    def close(self):
        self.file.close()
        self.processes.barrier()
        if self.processes.is_main:
            self._merge()

    def _merge(self):
        """One line for each answer in predictions.jsonl; what a kill cut short is dropped, and made again."""
        parts = sorted(self.folder.glob("predictions*.jsonl"))
        rows = {tuple(r[name] for name in (*VARIANT, "key")): r for part in parts for r in _read(part)}
        partial = self.folder / "predictions.partial"
        partial.write_text("".join(json.dumps(rows[place]) + "\n" for place in sorted(rows, key=repr)))
        os.replace(partial, self.folder / "predictions.jsonl")
        for part in parts:
            if part.name != "predictions.jsonl":
                part.unlink()


def _read(path):
    """The whole lines of a file of records; none where there is no file."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _check_settings(path, settings):
    saved = json.loads(path.read_text()) if path.exists() else settings
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
