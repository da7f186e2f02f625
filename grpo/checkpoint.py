"""Checkpoints: a Hugging Face folder that `from_pretrained` loads, with what resuming needs beside it.

    checkpoint-120/  config.json, *.safetensors, tokenizer and processor files, run.json (the Config)
                     training/  state.json, and fp32 masters and both moments, each process's shard in a safetensors
                                file of its own (torch.distributed.checkpoint): any number of processes can load them

Everything is copied to the host's memory first, and written by a thread while training goes on. Written under a
temporary name and renamed, so a checkpoint that exists is whole. Nothing in it is a pickle. Randomness needs no saving:
it is derived from seed, step and prompt; the data position is the step.
"""

import json
import shutil
import threading
from itertools import accumulate
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor

from grpo.config import save_config
from grpo.lora import merge, save_adapters
from grpo.model import empty_model, save_model

PREFIX, UNFINISHED = "checkpoint-", ".partial"
LOST = "could not be saved, earlier checkpoints are whole"
FILE_BYTES = 2**32  # of masters or moments, over all processes
MOMENTS = ("exp_avg", "exp_avg_sq")


class CheckpointError(OSError):
    """A checkpoint that could not be written; the earlier ones are untouched."""


def checkpoints(folder):
    """The run folder's whole checkpoints, oldest first."""
    named = [p for p in Path(folder).glob(f"{PREFIX}*") if p.name.removeprefix(PREFIX).isdigit()]
    found = [p for p in named if (p / "training" / "state.json").exists()]
    return sorted(found, key=lambda p: int(p.name.removeprefix(PREFIX)))


class Saver:
    """Writes one checkpoint at a time, in a thread. `failed` once one could not be: `wait` then raises the reason.
    `step` is that of the last one begun."""

    def __init__(self, processes, model):
        """model: folder or hub name that the policy was built from, for the form of what is exported."""
        self.processes, self.thread, self.error, self.step = processes, None, None, None
        dtype = torch.bfloat16 if processes.device.type == "cuda" else torch.float32
        self.empty = empty_model(model, dtype)  # the policy itself is at work while its weights are written
        # Its own group: what the thread exchanges must not meet what training does.
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None

    @property
    def failed(self):
        return self.error is not None

    def save(self, folder, step, policy, optimizer, processor, config, state):
        """Begins to save what there is after `step` steps, once the checkpoint before is written; returns its folder.

        The last config.keep_checkpoints and the best are kept. state: plain values that resuming needs beside weights
        and moments; its "best" is that of `note_if_best`. Raises CheckpointError, where the one before failed.
        """
        self.wait()
        target, self.step = Path(folder) / f"{PREFIX}{step}", step
        is_main, state, best = self.processes.is_main, dict(state), state.get("best", {}).get("step")
        if is_main:
            steps = {name: int(optimizer.state[p]["step"]) for name, p in _trained(policy)}
            state = json.dumps({**state, "step": step, "adam_steps": steps})
        export = _adapters if config.lora_rank else self._whole_model
        write_model = export(policy, processor, config, is_main)
        partial = _prepare(target, self._gather, is_main)
        tensors = _training_tensors(policy, optimizer)
        writer = HuggingFaceStorageWriter(str(partial / "training"), _files_of(tensors), save_distributed=True)
        shards = dcp.async_save(
            tensors, storage_writer=writer, process_group=self.group, no_dist=self.group is None
        )  # fmt: skip

        def write():
            shards.result()
            if is_main:
                write_model(partial)
                (partial / "training" / "state.json").write_text(state)

        def finish():
            try:
                _publish(target, write, self._gather, is_main)
                remove = (lambda: _remove_old(folder, config.keep_checkpoints, best)) if is_main else None
                _together(f"old checkpoints in {folder} could not be removed", remove, self._gather)
            except BaseException as error:  # of a thread: raised by `wait`
                self.error = error if isinstance(error, CheckpointError) else CheckpointError(f"{target}: {error}")

        self.thread = threading.Thread(target=finish, daemon=True)
        self.thread.start()
        return target

    def join(self):
        """Waits until what is being written exists, or could not be."""
        if self.thread is not None:
            self.thread.join()
        self.thread = None

    def wait(self):
        """As `join`, but raises CheckpointError where it could not be."""
        self.join()
        error, self.error = self.error, None
        if error is not None:
            raise error

    def save_weights(self, folder, policy, processor, config):
        """Writes a Hugging Face folder of the policy's weights, adapters merged in; every process must call it, and
        none returns before it is written."""
        self.wait()
        folder, is_main = Path(folder), self.processes.is_main
        write_model = self._whole_model(policy, processor, config, is_main)
        partial = _prepare(folder, self._gather, is_main)
        _publish(folder, (lambda: write_model(partial)) if is_main else None, self._gather, is_main)

    def _whole_model(self, policy, processor, config, is_main):
        """Gathers the weights, adapters merged in, on the main process, in the precision they are computed in; returns
        what writes them into a folder. Every process must call it, the main one alone what it returns."""
        weights, dtype = {}, self.empty.dtype
        for name, value in policy.model.state_dict().items():
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            if is_main:  # adapters are added in full precision
                weights[name] = whole.detach().to("cpu", value.dtype if ".lora_" in name else dtype, copy=True)
        weights = merge(weights, config.lora_alpha / max(config.lora_rank, 1), dtype)
        if policy.model.config.tie_word_embeddings:
            weights.pop("lm_head.weight", None)  # a second copy of the embedding

        def write(folder):
            save_model(self.empty, processor, folder, weights)
            save_config(config, folder / "run.json")

        return write

    def _gather(self, item):
        items = [item] * (self.processes.world if self.group else 1)
        if self.group is not None:
            dist.all_gather_object(items, item, group=self.group)
        return items


def remove_unfinished(folder):
    """Removes what a run that was killed while saving has left in its folder."""
    for unfinished in ("checkpoint-*", "warmup", "merged"):
        for path in Path(folder).glob(f"{unfinished}{UNFINISHED}"):
            shutil.rmtree(path)


def _remove_old(folder, keep, best):
    for old in checkpoints(folder)[:-keep]:
        if old.name != f"{PREFIX}{best}":
            shutil.rmtree(old)


def note_if_best(state, step, summary):
    """Whether held-out accuracy after `step` steps is above all earlier ones; notes it in state["best"] if so."""
    if not summary or summary["trained"] <= state.get("best", {}).get("accuracy", -1.0):
        return False
    state["best"] = {"step": step, "accuracy": summary["trained"]}
    return True


def _files_of(tensors):
    """{name: number of the file it goes to}, from 1: each file is once more in memory while it is written."""
    ends = accumulate(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    return {name: 1 + end // FILE_BYTES for name, end in zip(tensors, ends)}


def _unfinished(folder):
    return folder.with_name(folder.name + UNFINISHED)


def _prepare(folder, gather, is_main):
    """Makes the empty folder that becomes `folder`, once; returns it."""
    partial = _unfinished(folder)

    def make():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    _together(f"{folder} {LOST}", make if is_main else None, gather)
    return partial


def _publish(folder, write, gather, is_main):
    """Runs write(), where there is one; the folder takes its name only when all processes have written their part."""
    partial = _unfinished(folder)

    def rename():
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)

    try:
        _together(f"{folder} {LOST}", write, gather)
        _together(f"{folder} {LOST}", rename if is_main else None, gather)
    except CheckpointError:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _together(failure, action, gather):
    """Runs action(), where there is one; where it fails in any process, raises CheckpointError, which says `failure`
    and the reason, in all."""
    reason = None
    try:
        if action is not None:
            action()
    except (Exception, dcp.api.CheckpointException) as error:  # whatever it is, the others must hear of it
        cause = error
        while isinstance(cause, dcp.api.CheckpointException):
            cause = next(iter(cause.failures.values()))[0]
        reason = " ".join(str(cause).split())[:300] or type(cause).__name__
    reasons = [r for r in gather(reason) if r]
    if reasons:
        raise CheckpointError(f"{failure}: {reasons[0]}")


def _adapters(policy, processor, config, is_main):
    """As `Saver._whole_model`, of the adapters alone."""
    write_adapters = save_adapters(policy.model, config, is_main)

    def write(folder):
        write_adapters(folder)
        processor.save_pretrained(folder)
        save_config(config, folder / "run.json")

    return write


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
    """The plain values of `Saver.save`, step included."""
    return json.loads((Path(checkpoint) / "training" / "state.json").read_text())


def load_training(checkpoint, policy, optimizer, processes):
    """Puts saved masters and moments into a policy and its optimizer, whatever the number of processes then and now."""
    tensors = _training_tensors(policy, optimizer)
    reader = HuggingFaceStorageReader(str(Path(checkpoint) / "training"))
    dcp.load(tensors, storage_reader=reader, no_dist=processes.mesh is None)
    steps = load_state(checkpoint)["adam_steps"]
    for name, parameter in _trained(policy):
        optimizer.state[parameter]["step"].fill_(steps[name])
