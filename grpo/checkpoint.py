"""Checkpoints: a Hugging Face folder that `from_pretrained` loads, with what resuming needs beside it.

    checkpoint-120/  config.json, *.safetensors, tokenizer and processor files, run.json (the Config), state.json,
                     optimizer.safetensors (two moments for each parameter)

Written under a temporary name and renamed, so a checkpoint that exists is whole. Nothing in it is a pickle. Randomness
needs no saving: it is derived from seed, step and prompt.
"""

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from grpo.config import save_config

PREFIX = "checkpoint-"


def checkpoints(folder):
    """The run folder's whole checkpoints, oldest first."""
    found = [p for p in Path(folder).glob(f"{PREFIX}*") if p.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix(PREFIX)))


def save_weights(folder, policy, processor, config, processes):
    """Writes a Hugging Face folder of the policy's weights; every process must call it."""
    partial = _write_weights(Path(folder), policy, processor, config, processes)
    if processes.is_main:
        _finish(partial, Path(folder))
    processes.barrier()


def _write_weights(folder, policy, processor, config, processes):
    """As `save_weights`, under a temporary name, which it returns (None in processes that write nothing)."""
    weights = get_model_state_dict(policy.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if processes.is_main:
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        policy.model.save_pretrained(partial, state_dict=weights)
        processor.save_pretrained(partial)
        save_config(config, partial / "run.json")
        return partial
    return None


def _finish(partial, folder):
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def save_checkpoint(folder, step, policy, optimizer, processor, config, state, processes):
    """Saves after `step` steps, keeps the last config.keep_checkpoints, and returns the checkpoint's folder.

    state: plain values that resuming needs beside weights and moments.
    """
    target = Path(folder) / f"{PREFIX}{step}"
    partial = _write_weights(target, policy, processor, config, processes)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    moments = get_optimizer_state_dict(policy, optimizer, options=options)["state"]
    if processes.is_main:
        flat = {f"{kind}:{name}": value for name, kinds in moments.items() for kind, value in kinds.items()}
        save_file({name: value.contiguous() for name, value in flat.items()}, partial / "optimizer.safetensors")
        (partial / "state.json").write_text(json.dumps({"step": step, **state}))
        _finish(partial, target)
        for old in checkpoints(folder)[: -config.keep_checkpoints]:
            shutil.rmtree(old)
    processes.barrier()
    return target


def load_state(checkpoint):
    """The plain values of `save_checkpoint`, step included."""
    return json.loads((Path(checkpoint) / "state.json").read_text())


def load_optimizer(checkpoint, policy, optimizer):
    """Puts the saved moments into a fresh optimizer of the same policy."""
    options = StateDictOptions(full_state_dict=True)
    whole = get_optimizer_state_dict(policy, optimizer, options=options)
    state = {}
    for name, value in load_file(Path(checkpoint) / "optimizer.safetensors").items():
        kind, _, parameter = name.partition(":")
        state.setdefault(parameter, {})[kind] = value
    set_optimizer_state_dict(policy, optimizer, {"state": state, "param_groups": whole["param_groups"]}, options=options)
