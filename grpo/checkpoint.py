"""Checkpoints: a Hugging Face folder that `from_pretrained` loads, with what resuming needs beside it.

    checkpoint-120/  config.json, *.safetensors, tokenizer and processor files, run.json (the Config)
                     training/  state.json, and fp32 masters and both moments, each process's shard in a safetensors
                                file of its own (torch.distributed.checkpoint): any number of processes can load them

Written under a temporary name and renamed, so a checkpoint that exists is whole. Nothing in it is a pickle. Randomness
needs no saving: it is derived from seed, step and prompt; the data position is the step.
"""

import json
import shutil
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from grpo.config import save_config
from grpo.lora import merge, save_adapters
from grpo.model import save_model

PREFIX = "checkpoint-"
MOMENTS = ("exp_avg", "exp_avg_sq")


class CheckpointError(OSError):
    """A checkpoint that could not be written; the earlier ones are untouched."""


def checkpoints(folder):
    """The run folder's whole checkpoints, oldest first."""
    named = [p for p in Path(folder).glob(f"{PREFIX}*") if p.name.removeprefix(PREFIX).isdigit()]
    found = [p for p in named if (p / "training" / "state.json").exists()]
    return sorted(found, key=lambda p: int(p.name.removeprefix(PREFIX)))


def save_weights(folder, policy, processor, config, processes):
    """Writes a Hugging Face folder of the policy's weights, adapters merged in; every process must call it."""
    folder = Path(folder)
    with _whole_or_nothing(folder, processes) as partial:
        _export(partial, policy, processor, config, processes)


def save_checkpoint(folder, step, policy, optimizer, processor, config, state, processes):
    """Saves after `step` steps, keeps the last config.keep_checkpoints and the best, and returns its folder.

    state: plain values that resuming needs beside weights and moments; its "best" is that of `is_best`. Raises
    CheckpointError, with the reason.
    """
    target = Path(folder) / f"{PREFIX}{step}"
    with _whole_or_nothing(target, processes) as partial:
        if config.lora_rank:
            save_adapters(policy.model, partial, config, processes.is_main)
            if processes.is_main:
                processor.save_pretrained(partial)
                save_config(config, partial / "run.json")
        else:
            _export(partial, policy, processor, config, processes)
        writer = HuggingFaceStorageWriter(str(partial / "training"), save_distributed=True)
        dcp.save(_training_tensors(policy, optimizer), storage_writer=writer, no_dist=processes.mesh is None)
        if processes.is_main:
            steps = {name: int(optimizer.state[p]["step"]) for name, p in _trained(policy)}
            (partial / "training" / "state.json").write_text(json.dumps({**state, "step": step, "adam_steps": steps}))
    if processes.is_main:
        for old in checkpoints(folder)[: -config.keep_checkpoints]:
            if old.name != f"{PREFIX}{state.get('best', {}).get('step')}":
                shutil.rmtree(old)
    processes.barrier()
    return target


def is_best(state, step, summary):
    """Whether held-out accuracy after `step` steps is above all earlier ones; notes it in state["best"] if so."""
    if not summary or summary["trained"] <= state.get("best", {}).get("accuracy", -1.0):
        return False
    state["best"] = {"step": step, "accuracy": summary["trained"]}
    return True


class _whole_or_nothing:
    """A folder to write in that takes its name only when all processes have written their part."""

    def __init__(self, folder, processes):
        self.folder, self.processes = folder, processes
        self.partial = folder.with_name(folder.name + ".partial")

    def __enter__(self):
        if self.processes.is_main:
            shutil.rmtree(self.partial, ignore_errors=True)
            self.partial.mkdir(parents=True)
        self.processes.barrier()
        return self.partial

    def __exit__(self, kind, error, _):
        if error is not None:
            shutil.rmtree(self.partial, ignore_errors=True)
            if isinstance(error, dcp.api.CheckpointException):
                error = next(iter(error.failures.values()))[0]
            if isinstance(error, OSError) or "SafetensorError" in type(error).__name__:
                reason = " ".join(str(error).split())[:300]
                message = f"{self.folder} could not be saved, earlier checkpoints are whole: {reason}"
                raise CheckpointError(message) from error
            return
        self.processes.barrier()
        if self.processes.is_main:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.partial.rename(self.folder)
        self.processes.barrier()


def _export(folder, policy, processor, config, processes):
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(policy.model, options=options)
    if processes.is_main:
        weights = merge(weights, config.lora_alpha / max(config.lora_rank, 1))
    if policy.model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)  # gathered, it is a second copy of the embedding
    if processes.is_main:
        dtype = torch.bfloat16 if processes.device.type == "cuda" else torch.float32
        save_model(policy.model, processor, folder, {name: tensor.to(dtype) for name, tensor in weights.items()})
        save_config(config, folder / "run.json")


def _training_tensors(policy, optimizer):
    """{name: this process's tensor} of masters and moments, to be saved from or loaded into."""
    tensors = {}
    for name, parameter in _trained(policy):
        tensors[f"master.{name}"] = parameter.detach()
        tensors |= {f"{kind}.{name}": optimizer.state[parameter][kind] for kind in MOMENTS}
    return tensors


def _trained(policy):
    return [(name, parameter) for name, parameter in policy.named_parameters() if parameter.requires_grad]


def load_state(checkpoint):
    """The plain values of `save_checkpoint`, step included."""
    return json.loads((Path(checkpoint) / "training" / "state.json").read_text())


def load_training(checkpoint, policy, optimizer, processes):
    """Puts saved masters and moments into a policy and its optimizer, whatever the number of processes then and now."""
    tensors = _training_tensors(policy, optimizer)
    reader = HuggingFaceStorageReader(str(Path(checkpoint) / "training"))
    dcp.load(tensors, storage_reader=reader, no_dist=processes.mesh is None)
    steps = load_state(checkpoint)["adam_steps"]
    for name, parameter in _trained(policy):
        optimizer.state[parameter]["step"].fill_(steps[name])
