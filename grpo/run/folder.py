"""What a run needs before anything loads, and its folder: new, or the run's own to go on from."""

import fcntl
import importlib.util
import json
import os
import shutil
import socket
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from grpo.config import Config, as_typed, demo_makes, load_config
from grpo.engine.checkpoint import UNFINISHED, checkpoints, damage, step_of
from grpo.engine.distributed import gather, is_main
from grpo.engine.feature_cache import FeatureCache
from grpo.engine.optimizer import learning_rate
from grpo.errors import ConfigError
from grpo.run.tracker import check_tracker
from video.dataset import split_spec

DEMO_COMMAND = "python train.py --preset demo"


def check_inputs(config):
    """Raises ConfigError before anything loads if weights or data are missing: what, and how to get them. Raises
    DataError if the feature cache cannot be written to."""
    removed = {path.resolve() for path in files_of_run(config.output)} if config.resume == "no" else set()
    for name in ("model", "data", "eval_data", "sft_data", "skip_list", "video_root", "frame_cache", "feature_cache"):
        given = getattr(config, name)
        for path in [split_spec(spec)[0] for spec in given] if name == "data" else filter(None, [given]):
            if removed & {Path(path).resolve(), *Path(path).resolve().parents}:
                raise ConfigError(f"--resume no would remove --{name} {path}, which is in --output; choose another")
    if config.lora_rank and importlib.util.find_spec("peft") is None:
        raise ConfigError("--lora_rank needs peft: pip install peft")
    check_tracker(config.tracker)
    if config.feature_cache:
        FeatureCache(config.feature_cache)  # raises DataError now, not once weights have loaded
    missing = []
    made = demo_makes(config.seed, config.family) if config.demo else set()
    absent = [path for path, _ in map(split_spec, config.data) if path not in made and not Path(path).is_file()]
    for path in absent[:1]:
        get = f"a relative path starts at {os.getcwd()}"
        if path in Config.data:
            get = ("`hf download Xiaodong/open-r1-video-4k --repo-type dataset --local-dir data` gets it; its videos go"
                   " beside it or under --video_root")  # fmt: skip
        missing.append(f"--data {path}: no such file; {get}")
    is_path = config.model.count("/") > 1 or Path(config.model).parent.is_dir()  # no hub name, which is OWNER/NAME
    unsure = missing or is_path or os.environ.get("HF_HUB_OFFLINE")
    if unsure and config.model not in made and not on_this_machine(config.model):
        get = "there is no such folder" if is_path else f"`hf download {config.model}` gets it"
        missing.append(f"--model {config.model}: not on this machine; {get}")
    if missing:
        raise ConfigError("; ".join([*missing, f"or try `{DEMO_COMMAND}`, which makes its own model and data"]))


@contextmanager
def sole_use(folder):
    """Holds the folder of a run or an evaluation for this run's ranks; makes the folder if there is none. Raises
    ConfigError if another run holds it, or if it cannot be written to.

    Rank 0 holds a lock of the operating system, which ends with the process, whatever ends it. (torchrun must not hold
    it: a torchrun that was killed leaves its ranks training.)
    """
    with ExitStack() as stack:
        reason = None
        if is_main():
            try:
                reason = _lock(stack, Path(folder))
            except OSError as error:
                reason = f"cannot be written to ({error.strerror}); choose another"
        if reason := gather(reason)[0]:
            raise ConfigError(f"--output {folder}: {reason}")
        yield


def _lock(stack, folder):
    """Locks the file .lock in a folder until the stack is closed; returns why it could not, if another process has."""
    folder.mkdir(parents=True, exist_ok=True)
    file = stack.enter_context(open(folder / ".lock", "ab+", buffering=0))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        return f"{file.read().decode()} is writing there; wait for it, end it, or choose another"
    except OSError as error:  # some network file systems have no locks: they must not keep a run from starting
        print(f"{folder}: cannot be locked ({error.strerror}): take care that no other run uses it", file=sys.stderr)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())


# A run goes on even if these settings have changed; of --epochs, --steps says what it comes to.
FREE_TO_CHANGE = {"activation_checkpointing", "compile", "config", "controls", "decode_graph",
                  "decode_timeout", "device", "epochs", "eval_batch", "eval_every", "feature_cache",
                  "feature_cache_gb", "frame_cache", "frame_cache_gb", "gap_every", "gpu_memory",
                  "judge_cache", "judge_concurrency", "judge_url", "keep_checkpoints", "lora_merge",
                  "max_bad_updates", "output", "plan", "prompts_per_rollout", "resume", "reward_timeout",
                  "rollouts_every", "save_every", "sequence_parallel", "shard_size", "show_every",
                  "text_only", "threads", "tracker", "video_root", "workers"}  # fmt: skip


def on_this_machine(model):
    """Whether a folder or hub name can be loaded without the network."""
    try:
        return Path(model).exists() or isinstance(try_to_load_from_cache(model, "config.json"), str)
    except HFValidationError:  # neither a folder nor a possible hub name
        return False


def clear_run(folder, anew):
    """Removes what a run that was killed while saving has left in its folder; `anew`: all that a run leaves there."""
    for path in files_of_run(folder):
        if anew or path.name.endswith(UNFINISHED):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def files_of_run(folder):
    """What a run leaves in its folder, run.json last: a kill while they are removed leaves it what it says it is."""
    names = [name + UNFINISHED for name in ("checkpoint-*", "warmup", "merged")]
    names += [c.name for c in checkpoints(folder)] + ["warmup", "merged", "events.out.tfevents.*", "versions.json"]
    names += ["summary.json", "metrics.jsonl", "rollouts.jsonl", "tracker.json", "curve.png", "run.json"]
    return [path for name in names for path in Path(folder).glob(name)]


def made_before(first, last, warmed, phase, step):
    """Whether a line of metrics.jsonl belongs to the part of a run before step `first`, which is not made again."""
    if phase == "warmup":
        return warmed
    if phase == "train":
        return step < first
    # An evaluation after `step` steps is made before the checkpoint of that step; but the first and the last ones have
    # none of their own, and are made again.
    return step < first or 0 < step == first != last


def find_checkpoint(config):
    """The newest checkpoint in the run folder, None if there is none or the run is to start anew.

    Raises ConfigError if the folder belongs to a run with other settings, or the newest checkpoint is not whole.
    """
    found, path = checkpoints(config.output), Path(config.output) / "run.json"
    if found and not path.exists():
        raise ConfigError(f"--output {config.output}: holds {found[-1].name} but no run.json; choose another")
    if config.resume == "no" or not path.exists():
        return None
    saved = load_config(path)
    free = free_to_change(saved, config, step_of(found[-1]) if found else 0)
    other = [
        f"--{name} was {as_typed(old)}, is {as_typed(getattr(config, name))}"
        + f", and --lr_schedule {saved.lr_schedule} would have given the steps done other rates" * (name == "steps")
        for name, old in vars(saved).items()
        if name not in free and old != getattr(config, name)
    ]
    if other and (found or (path.parent / "warmup").exists()):
        raise ConfigError(
            f"--output {config.output} holds a run with other settings ({'; '.join(other)}); choose another --output "
            f"(and --model {found[-1] if found else path.parent / 'warmup'} to go on from its weights), or --resume no "
            "to start anew there"
        )
    if not found:
        return None
    newest = found[-1]
    if fault := damage(newest):
        whole = next((older for older in reversed(found) if not damage(older)), None)
        ways = f"remove it to go on from {whole}, which is whole" if whole else "--resume no starts anew"
        raise ConfigError(f"{newest}: {fault}; copy it again, or {ways}")
    if step_of(newest) > config.steps:
        raise ConfigError(f"--steps {config.steps}: {newest} has more; give it another --output")
    return newest


def free_to_change(saved, config, done):
    """The settings that a run of the `saved` ones, of which so many steps are done, may go on with as `config` has
    them: whatever leaves those steps as they are.

    --steps is one if the learning rates of these steps do not depend on it. --eval_data and --eval_samples are, if
    they take nothing from the questions to train on.
    """
    rates = lambda steps: [
        learning_rate(step, steps, 1.0, saved.lr_schedule, saved.lr_warmup_steps) for step in range(done)
    ]
    steps = {"steps"} if rates(saved.steps or 0) == rates(config.steps) else set()
    held_out = {"eval_data", "eval_samples"} if held_out_apart(saved) and held_out_apart(config) else set()
    return FREE_TO_CHANGE | steps | held_out


def held_out_apart(config):
    """Whether the questions to train on are the same whatever is held out."""
    return bool(config.eval_data) or not config.eval_samples


def data_before(config, digests, say):
    """The digests of other data, or of another model, that the run to go on with has had, oldest first, as its
    versions.json has them.

    Raises ConfigError if its last ones were other than `digests`; under --resume anyway says so instead. The held-out
    questions may change if they are `held_out_apart`.
    """
    path = Path(config.output) / "versions.json"
    found = checkpoints(config.output) or (path.parent / "warmup").exists()
    if config.resume == "no" or not path.exists() or not found:
        return []
    try:
        versions = json.loads(path.read_text())
        saved, before = dict(versions.get("data", digests)), list(versions.get("data_before", []))
    except (AttributeError, TypeError, ValueError) as error:
        if config.resume == "anyway":
            say(f"{path}: is damaged; goes on without it, as --resume anyway asks")
            return []
        raise ConfigError(f"{path}: is damaged; --resume anyway goes on without it, if the data is the same") from error
    other = {name: old for name, old in saved.items() if digests.get(name) != old}
    before += [saved] if other else []
    if held_out_apart(config):
        other.pop("held out", None)
    changed = [f"{name} was {old}, is {digests.get(name)}" for name, old in other.items()]
    if not changed:
        return before
    if config.resume == "auto":
        raise ConfigError(
            f"--output {config.output} holds a run whose data or model has changed since ({'; '.join(changed)}); "
            "--resume anyway goes on, --resume no starts anew there, another --output does elsewhere"
        )
    say(f"data or model has changed ({'; '.join(changed)}); goes on as --resume anyway asks")
    return before
