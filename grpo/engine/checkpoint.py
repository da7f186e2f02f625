"""Checkpoints: a Hugging Face folder that `from_pretrained` loads, with what resuming needs beside it.

    checkpoint-120/  config.json, *.safetensors, tokenizer and processor files, run.json (the Config)
                     training/  state.json, and fp32 masters, both moments and a reference that moves, each process's
                                shard in a safetensors file of its own (torch.distributed.checkpoint): any number of
                                processes can load them

Everything is copied to the host's memory first, and written by a thread while training goes on. Written under a
temporary name, synced to the disk and renamed, so a checkpoint that exists is whole. Nothing in it is a pickle.
Randomness needs no saving: it is derived from seed, step and prompt. The position in the data is the step, or, with
--dynamic_sampling, the state's "position".
"""

import errno
import json
import os
import shutil
import threading
from itertools import accumulate
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor

from grpo.config import save_config
from grpo.engine.distributed import compute_dtype, gather, is_main
from grpo.engine.lora import merge, save_adapters
from grpo.engine.model import empty_model, save_model
from video.files import write_text

PREFIX, UNFINISHED = "checkpoint-", ".partial"
LOST = "could not be saved, earlier checkpoints are whole"
FILE_BYTES = 2**32  # of masters or moments, over all processes
MOMENTS = ("exp_avg", "exp_avg_sq")


class CheckpointError(OSError):
    """A checkpoint that could not be written; the earlier ones are untouched."""


def checkpoints(folder):
    """The run folder's checkpoints, oldest first."""
    named = [p for p in Path(folder).glob(f"{PREFIX}*") if p.name.removeprefix(PREFIX).isdigit()]
    return sorted((p for p in named if (p / "training" / "state.json").exists()), key=step_of)


def step_of(checkpoint):
    return int(checkpoint.name.removeprefix(PREFIX))


def damage(checkpoint):
    """What keeps a checkpoint from being loaded; None if it is whole: its state can be read, and each file of tensors,
    of the model and of every process, has the size that was written."""
    try:
        sizes = load_state(checkpoint)["files"]
    except (OSError, ValueError, TypeError, KeyError):
        return "training/state.json is damaged"
    for name, size in sizes.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} of {size} bytes"


class Saver:
    """Writes one checkpoint at a time, in a thread. `failed` once one could not be: `wait` then raises the reason.
    `step` is that of the last one begun."""

    def __init__(self, device, processor, config):
        """config.model is the form of what is exported, config.output the run folder."""
        self.processor, self.config = processor, config
        self.thread, self.error, self.step = None, None, None
        # An empty one, for the policy itself is at work while its weights are written.
        self.empty = empty_model(config.model, compute_dtype(device))
        # Its own group: what the thread exchanges must not meet what training does.
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None

    @property
    def failed(self):
        return self.error is not None

    def save(self, step, policy, optimizer, state, reference=None):
        """Begins to save what there is after `step` steps, once the checkpoint before is written; returns its folder.

        The last config.keep_checkpoints and the best are kept. state: plain values that resuming needs beside weights
        and moments; its "best" is that of `note_if_best`. reference: one that moves. Raises CheckpointError, where the
        one before failed.
        """
        self.wait()
        folder, best = Path(self.config.output), state.get("best", {}).get("step")
        target, self.step = folder / f"{PREFIX}{step}", step
        steps = {name: int(optimizer.state[p]["step"]) for name, p in _trained(policy)}
        state = {**state, "step": step, "adam_steps": steps}
        write_model = self._export(policy, adapters=self.config.lora_rank > 0)
        partial = self._prepare(target)
        # Copied here, once: dcp.async_save copies each shard twice.
        own = _training_tensors(policy, optimizer, reference)
        tensors = {name: t.to("cpu", copy=True) for name, t in own.items()}

        def write_shards():
            writer = HuggingFaceStorageWriter(str(partial / "training"), _files_of(tensors), save_distributed=True)
            writer.per_thread_copy_ahead = 0  # what is on the host already needs no stream of a GPU
            dcp.save(tensors, storage_writer=writer, process_group=self.group, no_dist=self.group is None)

        def write(partial):
            write_model(partial)
            sizes = {str(file.relative_to(partial)): file.stat().st_size for file in partial.rglob("*.safetensors")}
            write_text(partial / "training" / "state.json", json.dumps({**state, "files": sizes}))

        def finish():
            try:
                self._publish(target, write, write_shards)
                remove = lambda: _remove_old(folder, self.config.keep_checkpoints, best)
                self._together(f"old checkpoints in {folder} could not be removed", remove)
            except BaseException as error:  # of a thread: raised by `wait`
                self.error = error if isinstance(error, CheckpointError) else CheckpointError(f"{target}: {error}")

        thread = threading.Thread(target=finish, daemon=True)
        thread.start()  # where the system refuses it, there is nothing to wait for
        self.thread = thread
        return target

    def join(self):
        """Waits until what is being written exists, or could not be."""
        if self.thread is not None:
            self.thread.join()

    def wait(self):
        """As `join`, but raises CheckpointError where it could not be."""
        self.join()
        error, self.error = self.error, None
        if error is not None:
            raise error

    def save_weights(self, folder, policy):
        """Writes a Hugging Face folder of the policy's weights, adapters merged in; every process must call it, and
        none returns before it is written."""
        self.wait()
        write = self._export(policy)
        self._prepare(folder)
        self._publish(folder, write)

    def _export(self, policy, adapters=False):
        """Gathers the weights on the main process, in the precision they are computed in; returns what writes them
        into a folder: the whole model, adapters merged in, or the `adapters` alone. Every process must call it, the
        main one alone what it returns."""
        config, dtype, weights = self.config, self.empty.dtype, {}
        for name, value in policy.model.state_dict().items():
            if ".lora_" in name or not adapters:
                if ".lora_" not in name:  # adapters are added in full precision
                    value = value.to(dtype)  # on the device, each process its shard
                whole = value.full_tensor() if isinstance(value, DTensor) else value
                if is_main():
                    weights[name] = whole.to("cpu", copy=True)
        if not adapters:
            weights = merge(weights, config.lora_alpha / max(config.lora_rank, 1), dtype)
        if policy.model.config.tie_word_embeddings:
            weights.pop("lm_head.weight", None)  # a second copy of the embedding

        def write(folder):
            if adapters:
                save_adapters(weights, config, folder)
                self.processor.save_pretrained(folder)
            else:
                save_model(self.empty, self.processor, folder, weights)
            save_config(config, folder / "run.json")

        return write

    def _prepare(self, folder):
        """Makes the empty folder that becomes `folder`, once; returns it."""
        partial = _unfinished(folder)

        def make():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

        self._together(f"{folder} {LOST}", make)
        return partial

    def _publish(self, folder, write, ready=None):
        """Has the main process write(folder) under its temporary name, once ready() has returned in all, where there is
        one; then the folder takes its name."""
        partial, failure = _unfinished(folder), f"{folder} {LOST}"

        def publish():
            write(partial)
            _settle(partial)
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
            _sync(folder.parent)

        try:
            if ready:
                self._together(failure, ready, everywhere=True)
            self._together(failure, publish)
        except CheckpointError:
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def _together(self, failure, action, everywhere=False):
        """Runs action() on the main process, or everywhere; where it fails in any, raises CheckpointError, which says
        `failure` and the reason, in all."""
        reason = None
        try:
            if everywhere or is_main():
                action()
        except (Exception, dcp.api.CheckpointException) as error:  # whatever it is, the others must hear of it
            cause = error
            while isinstance(cause, dcp.api.CheckpointException):
                cause = next(iter(cause.failures.values()))[0]
            reason = " ".join(str(cause).split())[:300] or type(cause).__name__
        reasons = [r for r in gather(reason, self.group) if r]
        if reasons:
            raise CheckpointError(f"{failure}: {reasons[0]}")


def _settle(folder):
    """Puts a folder's files on the disk before it takes its name, and gives all of them the mode of run.json, which the
    user's umask set: safetensors writes its files for their owner alone."""
    mode = (folder / "run.json").stat().st_mode
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_mode != mode:
            path.chmod(mode)
        _sync(path)
    _sync(folder)


def _sync(path):
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems cannot sync a folder
            raise
    finally:
        os.close(number)


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


def _training_tensors(policy, optimizer, reference=None):
    """{name: this process's tensor} of masters, moments and reference, to be saved from or loaded into."""
    tensors = {}
    for name, parameter in _trained(policy):
        tensors[f"master.{name}"] = parameter.detach()
        tensors |= {f"{kind}.{name}": optimizer.state[parameter][kind] for kind in MOMENTS}
    named = reference.named_parameters() if reference is not None else ()
    return tensors | {f"reference.{name}": parameter.detach() for name, parameter in named}


def _trained(policy):
    return [(name, parameter) for name, parameter in policy.named_parameters() if parameter.requires_grad]


def load_state(checkpoint):
    """The plain values of `Saver.save`, step included."""
    return json.loads((Path(checkpoint) / "training" / "state.json").read_text())


def load_training(checkpoint, policy, optimizer, reference=None):
    """Puts saved masters and moments into a policy and its optimizer, and a reference that moves into `reference`,
    whatever the number of processes then and now."""
    reader = HuggingFaceStorageReader(str(Path(checkpoint) / "training"))
    tensors = _training_tensors(policy, optimizer, reference)
    dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
    steps = load_state(checkpoint)["adam_steps"]
    for name, parameter in _trained(policy):
        optimizer.state[parameter]["step"].fill_(steps[name])
