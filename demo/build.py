"""The demo's inputs: a tiny Qwen2-VL of random weights and a procedural set of mp4 questions."""

import json
from pathlib import Path

from demo.synthetic import DemoSpec, make_demo_set
from demo.tiny import CHAT_WORDS, build_tiny_model

MARK = "demo.json"  # in a model folder that this file made and may make again


def build_demo(config):
    """Makes config.model and the folder of config.data where they are missing or of another seed. A model folder that
    was not made here is never touched."""
    make_demo_set(Path(config.data[0]).parent, DemoSpec(seed=config.seed, train=2048, val=200))
    model, mark = Path(config.model), json.dumps({"seed": config.seed})
    if model.exists() and not (model / MARK).exists():
        return
    if model.exists() and (model / MARK).read_text() == mark:
        return
    with open(config.sft_data) as file:
        rows = [json.loads(line) for line in file]
    corpus = " ".join({text for row in rows for text in (row["problem"], *row["completions"])})
    build_tiny_model(model, seed=config.seed, corpus=f"{CHAT_WORDS} {corpus} {config.prompt_template}", patch_std=0.03)
    (model / MARK).write_text(mark)
