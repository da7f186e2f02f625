"""A tracker of experiments beside TensorBoard: wandb or swanlab, packages that a user may have installed.

Account, project and mode are what the tracker reads from its own environment, such as WANDB_PROJECT and
WANDB_MODE=offline, SWANLAB_PROJ_NAME and SWANLAB_MODE=offline.
"""

import importlib
import importlib.util
import json
import uuid
from dataclasses import asdict
from pathlib import Path

from grpo.errors import ConfigError, RunError
from video.files import write_text


def check_tracker(name):
    """Raises ConfigError if the package of a tracker is missing."""
    if name != "none":
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # wandb leaves a folder of its name, which Python takes for a package
            raise ConfigError(f"--tracker {name} needs the package {name}: pip install {name}")


def start_tracker(config):
    """The tracker of a run, None if it has none. A run that goes on is the same run there. Raises RunError, with the
    tracker's own words, if it does not start."""
    if config.tracker == "none":
        return None
    try:
        same_run = {"id": run_id(config), "resume": "allow"}
        return TRACKERS[config.tracker](Path(config.output), config=asdict(config), **same_run)
    except Exception as error:
        offline = f"{config.tracker.upper()}_MODE=offline writes to the run folder alone"
        raise RunError(f"--tracker {config.tracker}: {error}; {offline}") from error


def run_id(config):
    """What the tracker knows this run by: tracker.json in the run folder, made by its first start."""
    path = Path(config.output) / "tracker.json"
    if not path.exists():
        write_text(path, json.dumps({"id": uuid.uuid4().hex[:21]}) + "\n")
    return json.loads(path.read_text())["id"]


class Wandb:
    def __init__(self, folder, **named):
        self.run = importlib.import_module("wandb").init(dir=folder, name=folder.name, **named)
        for phase in ("warmup", "train", "eval"):
            self.run.define_metric(f"{phase}/*", step_metric=f"{phase}/step")

    def log(self, phase, step, line, values):
        """line: the number of the line in metrics.jsonl. wandb wants a number that only grows, as the steps of three
        phases do not, and drops a line that it has, as a run makes some again that goes on from a checkpoint."""
        self.run.log({f"{phase}/step": step, **{f"{phase}/{name}": value for name, value in values.items()}}, step=line)

    def finish(self):
        self.run.finish()


class Swanlab:
    def __init__(self, folder, **named):
        named |= {"logdir": str(folder / "swanlog"), "experiment_name": folder.name}
        self.run = importlib.import_module("swanlab").init(**named)

    def log(self, phase, step, line, values):
        """swanlab counts the steps of each metric for itself, and drops a step that it has."""
        self.run.log({f"{phase}/{name}": value for name, value in values.items()}, step=step)

    def finish(self):
        self.run.finish()


TRACKERS = {"wandb": Wandb, "swanlab": Swanlab}
