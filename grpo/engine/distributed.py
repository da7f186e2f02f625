"""Ranks, collectives, and the model sharded over ranks with FSDP2. On one CPU process every function here is trivial.

torch's process group is global, so these are plain functions: nothing has to be handed around.
"""

import atexit
import copy
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from grpo import sequence
from grpo.errors import ConfigError

# Rank 0 may build the demo or write 15 GB while the others wait. `watch_ranks` notices a rank that dies.
TIMEOUT = timedelta(minutes=30)
GRACE = 3  # seconds for a rank to end by itself, with its own message, once another rank is gone
LOST = "a process is lost"  # key of torchrun's store
finished = threading.Event()  # set once every rank is done, or this one ends: from then on ranks may leave


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def data_rank() -> int:
    """Which share of the prompts is this rank's; the ranks of a sequence group (`grpo.sequence`) have the same one."""
    return rank() // sequence.size()


def data_size() -> int:
    """Into how many shares the prompts are split."""
    return world_size() // sequence.size()


def is_main() -> bool:
    return rank() == 0


def compute_dtype(device: torch.device) -> torch.dtype:
    """The precision that a model computes in: bf16 on a GPU, fp32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def reduce_sum(values: dict[str, float]) -> dict[str, float]:
    """{name: number} summed over all ranks, once for each sequence group, whose ranks have the same numbers; every rank
    must pass the same names."""
    if world_size() == 1:
        return dict(values)
    device, counts = "cuda" if dist.get_backend() == "nccl" else "cpu", sequence.rank() == 0
    own = [float(values[name]) if counts else 0.0 for name in sorted(values)]
    total = torch.tensor(own, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return dict(zip(sorted(values), total.tolist()))


def gather(item: object, group: dist.ProcessGroup | None = None) -> list:
    """[item of rank 0, item of rank 1, ...] on every rank; items are plain Python values."""
    items = [item] * world_size()
    if world_size() > 1:
        dist.all_gather_object(items, item, group=group)
    return items


def gather_data(item: object) -> list:
    """[item of data rank 0, item of data rank 1, ...] on every rank."""
    return gather(item)[:: sequence.size()]


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def start(
    device: str = "auto", shard_size: int = 0, sequence_parallel: int = 1
) -> tuple[torch.device, DeviceMesh | None]:
    """Joins torchrun's process group if there is one. Returns (device, mesh); the mesh is None on one CPU process.

    shard_size ranks (0: the ranks of one node) hold one copy of the weights; with more ranks, copies are replicated and
    only gradients cross nodes. sequence_parallel neighbouring ranks share each prompt. Raises ConfigError if either
    does not divide the world size.
    """
    world, size = _number("WORLD_SIZE", 1), shard_size or _number("LOCAL_WORLD_SIZE", 1)
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if on_gpu and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no GPU; install a CUDA build and driver, or give --device cpu")
    for flag, count in (("shard_size", size), ("sequence_parallel", sequence_parallel)):
        if world % count:
            hint = f"`torchrun --nproc_per_node {count} train.py ...` starts {count}"
            raise ConfigError(f"--{flag} {count}: must divide the number of processes, {world}; {hint}")
    if not on_gpu and world == 1:
        return torch.device("cpu"), None
    place = torch.device("cuda", _number("LOCAL_RANK")) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(place)
    store = dist.HashStore() if world == 1 else None  # None: torchrun's
    collectives = "nccl" if on_gpu else "gloo"
    dist.init_process_group(collectives, store=store, rank=_number("RANK"), world_size=world, timeout=TIMEOUT)
    shape, names = ((world,), ("shard",)) if size == world else ((world // size, size), ("replicate", "shard"))
    mesh = init_device_mesh(place.type, shape, mesh_dim_names=names)
    sequence.join(sequence_parallel, place.type)
    if world > 1:
        node = _number("GROUP_RANK")  # torchrun's name for it
        pids = [pid for other, pid in gather((node, os.getpid())) if other == node]
        watcher = threading.Thread(target=watch_ranks, args=(pids,), daemon=True)
        watcher.start()
        atexit.register(_end_watch, watcher)
    return place, mesh


def _number(name, default=0):
    """A number that torchrun sets in the environment."""
    return int(os.environ.get(name, default))


def stop() -> None:
    """Leaves the process group, once every rank is done."""
    if dist.is_initialized():
        dist.barrier()
        finished.set()
        dist.destroy_process_group()


def watch_ranks(pids: list[int]) -> None:
    """Ends this process with code 3, GRACE seconds after a rank of any node has died.

    It runs in a thread: NCCL's collectives wait for a dead rank for ever, and no signal handler runs meanwhile. pids
    are the processes of this node. Nodes tell each other through torchrun's store.
    """
    store = dist.TCPStore(os.environ["MASTER_ADDR"], _number("MASTER_PORT"), is_master=False)
    with suppress(ProcessLookupError, dist.DistError):  # a rank of this node is gone, or torchrun, which has the store
        while not store.check([LOST]):
            for pid in pids:
                os.kill(pid, 0)  # signal 0 is not delivered: it asks whether the process is there
            if finished.wait(1):
                return
    with suppress(dist.DistError):
        store.set(LOST, "1")
    if not finished.wait(GRACE):
        name = Path(sys.argv[0]).name
        print(f"{name}: error: another process is gone, see its message or torchrun's", file=sys.stderr, flush=True)
        os._exit(3)  # the main thread may be inside a collective, out of reach


def _end_watch(watcher):
    """Ends the thread before Python ends: a thread that is inside the store just then would abort the process."""
    finished.set()
    watcher.join(GRACE)


def shard(policy: nn.Module, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """Shards a Policy that is still on the meta device, in place: each of its blocks, then the rest.

    Parameters keep their precision (fp32 masters). They are gathered and computed in `dtype`; gradients are reduced in
    fp32.
    """
    object.__setattr__(policy, "plain", copy.deepcopy(policy))  # no submodule: it has no weights of its own
    # Inputs are not cast: the vision tower's rotary tables must stay in fp32.
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in policy.blocks():
        fully_shard(block, mesh=mesh, mp_policy=precision)
    fully_shard(policy, mesh=mesh, mp_policy=precision)
    policy.sharded = True


def reduce_between_nodes(policy: nn.Module, now: bool) -> None:
    """Sets whether the next backward also sums gradients over the copies of the weights: once a step, at its end."""
    if policy.sharded:
        policy.set_requires_all_reduce(now)


def clip_grad_norm(policy: nn.Module, max_norm: float) -> float:
    """Scales the gradient to a norm of at most max_norm over all ranks; returns the norm before clipping."""
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), max_norm)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


@contextmanager
def unsharded(policy: nn.Module) -> Iterator[nn.Module]:
    """Gathers all weights of `policy`, and yields a Policy of plain modules that has them, for sampling.

    The plain modules have no FSDP hooks, so nothing inside is collective beyond a sequence group: groups decode at
    their own pace.
    """
    if not policy.sharded:
        yield policy
        return
    modules = [m for m in policy.modules() if isinstance(m, FSDPModule)]
    for module in modules:
        module.unshard()
    for name, module in policy.named_modules():
        twin = policy.plain.get_submodule(name)
        twin._parameters.update(module._parameters)
        twin._buffers.update(module._buffers)
    try:
        yield policy.plain
    finally:
        for module in modules:
            module.reshard()
