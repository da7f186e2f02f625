"""The demo's inputs: a tiny Qwen2-VL of random weights and a procedural set of mp4 questions."""

import json
import os
import tempfile
from pathlib import Path

from demo.synthetic import DemoSpec, make_demo_set
from demo.tiny import CHAT_WORDS, build_tiny_model
from grpo.config import demo_makes, preset_values
from video.dataset import split_spec

MARK = "demo.json"  # in a model folder that this file made and may make again


def build_demo(config):
    """Makes the demo's model and data at the preset's own paths, where they are missing or of another seed and config
    asks for any of them. Whatever other paths hold is the user's, and is neither made nor changed."""
    asked = {config.model, *(path for path, _ in map(split_spec, config.data)), config.eval_data, config.sft_data}
    if not asked & demo_makes(config.seed):
        return
    paths = preset_values("demo", config.seed)
    data = make_demo_set(Path(paths["eval_data"]).parent, DemoSpec(seed=config.seed, train=2048, val=200))
    model, mark = Path(paths["model"]), json.dumps({"seed": config.seed})
    if config.model != str(model) or model.exists() and not (model / MARK).exists():
        return
    if model.exists() and (model / MARK).read_text() == mark:
        return
    with open(data["warmup"]) as file:
        rows = [json.loads(line) for line in file]
    corpus = " ".join({text for row in rows for text in (row["problem"], *row["completions"])})
    corpus = f"{CHAT_WORDS} {corpus} {config.prompt_template}"
    with tempfile.TemporaryDirectory(prefix=f"{model.name}-", dir=model.parent) as aside:  # a kill leaves no half model
        made = build_tiny_model(Path(aside) / model.name, seed=config.seed, corpus=corpus, patch_std=0.03)
        (made / MARK).write_text(mark)
        if model.exists():
            os.replace(model, Path(aside) / "replaced")
        os.replace(made, model)
