"""Checkpoints: a Hugging Face folder that `from_pretrained` loads, with what resuming needs beside it.

    checkpoint-120/  config.json, *.safetensors, tokenizer and processor files, run.json (the Config)
                     training/  state.json, and the fp32 masters, both moments and a reference that moves: each rank
                                writes its shards to safetensors files (torch.distributed.checkpoint), which any number
                                of ranks can load

Training stops while everything is copied to the host's memory, and goes on while a thread writes it. The folder has a
temporary name until it is synced to the disk, so a checkpoint that exists is whole. Nothing in it is a pickle.
Randomness needs no saving: it is derived from seed, step and prompt. The position in the data is the step, or, with
--dynamic_sampling, the state's "position".
"""

import copy
import errno
import json
import os
import shutil
import threading
from contextlib import contextmanager
from itertools import accumulate
from operator import itemgetter
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import ProcessorMixin

from grpo.config import Config, save_config
from grpo.engine.distributed import compute_dtype, gather, is_main
from grpo.engine.lora import merge, save_adapters
from grpo.engine.model import empty_model, save_model
from video.files import write_text

PREFIX, UNFINISHED = "checkpoint-", ".partial"
LOST = "could not be saved, earlier checkpoints are whole"
FILE_BYTES = 2**32  # of masters and moments, over all ranks
MOMENTS = ("exp_avg", "exp_avg_sq")


class CheckpointError(OSError):
    """A checkpoint that could not be written; the earlier ones are untouched."""


def checkpoints(folder: str | Path) -> list[Path]:
    """The run folder's checkpoints, oldest first."""
    named = [p for p in Path(folder).glob(f"{PREFIX}*") if p.name.removeprefix(PREFIX).isdigit()]
    return sorted((p for p in named if (p / "training" / "state.json").exists()), key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(PREFIX))


def damage(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be loaded. None if its state can be read and each safetensors file has the size that was
    written, and a header."""
    try:
        sizes, _, _ = itemgetter("files", "step", "adam_steps")(load_state(checkpoint))
    except (OSError, ValueError, TypeError, KeyError):
        return "training/state.json is damaged"
    for name, size in sizes.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} of {size} bytes"
        try:
            with safe_open(path, "pt"):
                pass
        except SafetensorError as error:
            return f"{name} is damaged ({error})"


class Saver:
    """Writes one checkpoint at a time, in a thread, so that training goes on meanwhile."""

    def __init__(self, device: torch.device, processor: ProcessorMixin, config: Config):
        """config.model has the form of what is written, config.output is the run folder."""
        self.processor, self.config = processor, config
        self.thread = None  # writes the checkpoint of `step`; a daemon: a second Ctrl-C must end the process at once
        self.error = None  # why the thread could not write it: a CheckpointError
        self.step = None  # of the last checkpoint begun
        # Weights are written through a model without any: the policy itself is at work meanwhile.
        self.empty = empty_model(config.model, compute_dtype(device))
        # A group of its own: what the thread exchanges must not meet what training does.
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None

    def save(self, step: int, policy: nn.Module, optimizer: Optimizer, state: dict, reference=None) -> Path:
        """Begins to write the checkpoint after `step` steps, once the one before is written. Returns its folder.

        The last config.keep_checkpoints and the best one stay. state: plain values that resuming needs beside weights
        and moments; `note_if_best` sets its "best". reference: a reference that moves. Raises CheckpointError if the
        checkpoint before could not be written.
        """
        # 1) Copy everything to the host. (dcp.async_save would copy each shard twice.)
        self.wait()
        folder, self.step = Path(self.config.output) / f"{PREFIX}{step}", step
        adam_steps = {name: int(optimizer.state[p]["step"]) for name, p in _trained(policy)}
        state = copy.deepcopy({**state, "step": step, "adam_steps": adam_steps})  # training counts on in it
        write_model = self._copy_model(policy, adapters=self.config.lora_rank > 0)
        own = _training_tensors(policy, optimizer, reference)
        tensors = {name: t.to("cpu", copy=True) for name, t in own.items()}

        # 2) Write it in a thread, then remove what is not kept
        def write_shards(partial):
            writer = HuggingFaceStorageWriter(str(partial / "training"), _files_of(tensors), save_distributed=True)
            writer.per_thread_copy_ahead = 0  # no stream of a GPU: the tensors are on the host
            dcp.save(tensors, storage_writer=writer, process_group=self.group, no_dist=self.group is None)

        def write(partial):
            write_model(partial)
            sizes = {str(file.relative_to(partial)): file.stat().st_size for file in partial.rglob("*.safetensors")}
            write_text(partial / "training" / "state.json", json.dumps({**state, "files": sizes}))

        def run():
            try:
                self._publish(folder, write, write_shards)
                with self._together(f"old checkpoints in {folder.parent} could not be removed") as main:
                    if main:
                        _remove_old(folder.parent, self.config.keep_checkpoints, state.get("best", {}).get("step"))
            except BaseException as error:  # `wait` raises it
                self.error = error if isinstance(error, CheckpointError) else CheckpointError(f"{folder}: {error}")

        thread = threading.Thread(target=run, daemon=True)
        thread.start()  # if the system refuses a thread, there is none to wait for
        self.thread = thread
        return folder

    def join(self) -> None:
        """Waits until the checkpoint in the making is written, or has failed."""
        if self.thread is not None:
            self.thread.join()

    def wait(self) -> None:
        """As `join`, but raises CheckpointError if it has failed."""
        self.join()
        error, self.error = self.error, None
        if error is not None:
            raise error

    def save_weights(self, folder: Path, policy: nn.Module) -> None:
        """Writes a Hugging Face folder of the policy's weights, adapters merged in. Collective; when it returns, the
        folder is written."""
        self.wait()
        self._publish(folder, self._copy_model(policy))

    def _copy_model(self, policy, adapters=False):
        """Copies the weights to rank 0's host memory, in the precision that they are computed in. Returns the function
        that writes them into a folder: the whole model, adapters merged in, or the `adapters` alone. Collective; rank 0
        alone calls what it returns."""
        config, dtype, weights = self.config, self.empty.dtype, {}
        for name, value in policy.model.state_dict().items():
            if ".lora_" in name or not adapters:
                if ".lora_" not in name:  # adapters are added in full precision
                    value = value.to(dtype)  # before it is gathered: each rank casts its shard
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

    def _publish(self, folder, write, write_shards=None):
        """Makes `folder` under a temporary name, which it loses once all is on the disk: a checkpoint that exists is
        whole. write_shards(partial) is called on every rank, then write(partial) on rank 0. Collective.
        """
        partial, failure = folder.with_name(folder.name + UNFINISHED), f"{folder} {LOST}"
        with self._together(failure) as main:
            if main:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
        try:
            if write_shards:
                with self._together(failure):
                    write_shards(partial)
            with self._together(failure) as main:
                if main:
                    write(partial)
                    _settle(partial)
                    shutil.rmtree(folder, ignore_errors=True)
                    partial.rename(folder)
                    _sync(folder.parent)
        except CheckpointError:
            shutil.rmtree(partial, ignore_errors=True)
            raise

    @contextmanager
    def _together(self, failure):
        """Yields whether this is rank 0. If the block fails on any rank, raises CheckpointError on all of them:
        `failure`, and the reason."""
        reason = None
        try:
            yield is_main()
        except (Exception, dcp.api.CheckpointException) as error:  # whatever it is, the other ranks must hear of it
            while isinstance(error, dcp.api.CheckpointException):
                error = next(iter(error.failures.values()))[0]
            reason = " ".join(str(error).split())[:300] or type(error).__name__
        if reasons := [r for r in gather(reason, self.group) if r]:
            raise CheckpointError(f"{failure}: {reasons[0]}")


def _settle(folder):
    """Puts a folder's files on the disk, and gives all of them the mode of run.json, which the user's umask set:
    safetensors writes its files for their owner alone."""
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


def note_if_best(state: dict, step: int, summary: dict) -> bool:
    """Whether held-out accuracy after `step` steps is above all earlier ones. If so, notes it in state["best"]."""
    if not summary or summary["trained"] <= state.get("best", {}).get("accuracy", -1.0):
        return False
    state["best"] = {"step": step, "accuracy": summary["trained"]}
    return True


def _files_of(tensors):
    """{name: number of the file that it goes to}, from 1. Files of a limited size: a file that is written is in memory
    once more."""
    ends = accumulate(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    return {name: 1 + end // FILE_BYTES for name, end in zip(tensors, ends)}


def _training_tensors(policy, optimizer, reference=None):
    """{name: tensor} of masters, moments and reference, sharded if the policy is: what is saved, and loaded into."""
    tensors = {}
    for name, parameter in _trained(policy):
        tensors[f"master.{name}"] = parameter.detach()
        tensors |= {f"{moment}.{name}": optimizer.state[parameter][moment] for moment in MOMENTS}
    named = reference.named_parameters() if reference is not None else ()
    return tensors | {f"reference.{name}": parameter.detach() for name, parameter in named}


def _trained(policy):
    return [(name, parameter) for name, parameter in policy.named_parameters() if parameter.requires_grad]


def load_state(checkpoint: Path) -> dict:
    """The plain values of `Saver.save`, step included."""
    return json.loads((checkpoint / "training" / "state.json").read_text())


def load_training(checkpoint: Path, policy: nn.Module, optimizer: Optimizer, reference=None) -> None:
    """Loads masters and moments into a policy and its optimizer, and a moving one into `reference`; the number
    of ranks may be another than at saving."""
    tensors = _training_tensors(policy, optimizer, reference)
    reader = HuggingFaceStorageReader(str(checkpoint / "training"))
    dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
    steps = load_state(checkpoint)["adam_steps"]
    for name, parameter in _trained(policy):
        optimizer.state[parameter]["step"].fill_(steps[name])
