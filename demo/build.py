"""The demo's inputs: a tiny model of random weights and a procedural set of mp4 questions."""

import hashlib
import json
import os
import tempfile
from pathlib import Path

from demo.synthetic import DemoSpec, make_demo_set
from demo.tiny import CHAT_WORDS, build_tiny_model
from grpo.config import Config, demo_makes, preset_values
from video.dataset import split_spec

MARK = "demo.json"  # in a model folder that this file made and may make again


def build_demo(config: Config) -> None:
    """Makes the demo's data and model at the preset's paths, if they are missing, of another seed, family or texts,
    such as those of an older version.

    If config reads nothing from these paths, nothing is made. Other paths, and a model folder at the preset's path that
    this function did not make, belong to the user and stay as they are.
    """
    asked = {config.model, *(path for path, _ in map(split_spec, config.data)), config.eval_data, config.sft_data}
    if not asked & demo_makes(config.seed, config.family):
        return
    paths = preset_values("demo", config.seed, config.family)
    data = make_demo_set(Path(paths["eval_data"]).parent, DemoSpec(seed=config.seed))
    rows = [json.loads(line) for line in data["warmup"].read_text().splitlines()]
    texts = sorted({text for row in rows for text in (row["problem"], *row["completions"])})
    corpus = " ".join((CHAT_WORDS, *texts, config.prompt_template))
    digest = hashlib.sha256(corpus.encode()).hexdigest()
    model, mark = Path(paths["model"]), json.dumps({"family": config.family, "seed": config.seed, "texts": digest})
    if config.model != str(model) or model.exists() and not (model / MARK).exists():
        return
    if model.exists() and (model / MARK).read_text() == mark:
        return
    with tempfile.TemporaryDirectory(prefix=f"{model.name}-", dir=model.parent) as aside:  # a kill leaves no half model
        made = build_tiny_model(
            Path(aside) / model.name, family=config.family, seed=config.seed, corpus=corpus, vision={"patch_std": 0.03}
        )
        (made / MARK).write_text(mark)
        if model.exists():
            os.replace(model, Path(aside) / "replaced")
        os.replace(made, model)
