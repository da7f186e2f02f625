"""Ranks, collectives, and the model sharded over ranks with FSDP2. On one CPU process every function here is trivial.

torch's process group is global, so these are plain functions: nothing has to be handed around.
"""

import atexit
import copy
import os
import sys
import threading
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from grpo.errors import ConfigError

# Rank 0 may build the demo or write 15 GB while the others wait. `watch_ranks` notices a rank that dies.
TIMEOUT = timedelta(minutes=30)
GRACE = 3  # seconds for a rank to end by itself, with its own message, once another rank is gone
finished = threading.Event()  # set once every rank is done, or this one ends: from then on ranks may leave


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main():
    return rank() == 0


def compute_dtype(device):
    """What models are computed in: bf16 on a GPU, fp32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def reduce_sum(values):
    """{name: number} summed over all ranks; every rank must pass the same names."""
    if world_size() == 1:
        return dict(values)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    total = torch.tensor([float(values[name]) for name in sorted(values)], dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return dict(zip(sorted(values), total.tolist()))


def gather(item, group=None):
    """[item of rank 0, item of rank 1, ...] on every rank; items are plain Python values."""
    items = [item] * world_size()
    if world_size() > 1:
        dist.all_gather_object(items, item, group=group)
    return items


def barrier():
    if world_size() > 1:
        dist.barrier()


def start(device="auto", shard_size=0):
    """Joins torchrun's process group if there is one. Returns (device, mesh); the mesh is None on one CPU process.

    shard_size ranks (0: the ranks of one node) hold one copy of the weights; with more ranks, copies are replicated and
    only gradients cross nodes. Raises ConfigError if shard_size does not divide the world size.
    """
    size = shard_size or int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    backend = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if backend == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no GPU; install a CUDA build and driver, or give --device cpu")
    own, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world % size:
        raise ConfigError(f"--shard_size {size}: must divide the number of processes, {world}")
    device = torch.device("cpu")
    if backend == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    elif world == 1:
        return device, None
    store = dist.HashStore() if world == 1 else None  # None: torchrun's
    collectives = "nccl" if backend == "cuda" else "gloo"
    dist.init_process_group(collectives, store=store, rank=own, world_size=world, timeout=TIMEOUT)
    shape, names = ((world,), ("shard",)) if size == world else ((world // size, size), ("replicate", "shard"))
    mesh = init_device_mesh(backend, shape, mesh_dim_names=names)
    if world > 1:
        pids = [pid for node, pid in gather((_node(), os.getpid())) if node == _node()]
        watcher = threading.Thread(target=watch_ranks, args=(pids,), daemon=True)
        watcher.start()
        atexit.register(_end_watch, watcher)
    return device, mesh


def stop():
    """Leaves the process group, once every rank is done."""
    if dist.is_initialized():
        dist.barrier()
        finished.set()
        dist.destroy_process_group()


def watch_ranks(pids):
    """Ends this process with code 3, GRACE seconds after a rank of any node has died.

    It runs in a thread: NCCL's collectives wait for a dead rank for ever, and no signal handler runs meanwhile. pids
    are the processes of this node; nodes tell each other through torchrun's store.
    """
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    while not (any(_is_gone(pid) for pid in pids) or _is_lost(store)):
        if finished.wait(1):
            return
    with suppress(dist.DistError):  # the store may be gone, too
        store.set("a process is lost", "1")
    if not finished.wait(GRACE):
        name = Path(sys.argv[0]).name
        print(f"{name}: error: another process is gone, see its message or torchrun's", file=sys.stderr, flush=True)
        os._exit(3)  # the main thread may be inside a collective, out of reach


def _end_watch(watcher):
    """Ends the thread before Python ends: a thread that is inside the store just then would abort the process."""
    finished.set()
    watcher.join(GRACE)


def _node():
    return int(os.environ.get("GROUP_RANK", 0))  # torchrun's name for it


def _is_gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def _is_lost(store):
    try:
        return store.check(["a process is lost"])
    except dist.DistError:  # the process that holds the store is gone: torchrun on the first node
        return True


def shard(policy, mesh, dtype):
    """Shards a Policy that is still on the meta device, in place: each of its blocks, then the rest.

    Parameters stay fp32 masters; `dtype` is what is gathered and computed in; gradients are reduced in fp32.
    """
    object.__setattr__(policy, "plain", copy.deepcopy(policy))  # no submodule: it has no weights of its own
    # Inputs are not cast: the vision tower's rotary tables must stay in fp32.
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in policy.blocks():
        fully_shard(block, mesh=mesh, mp_policy=precision)
    fully_shard(policy, mesh=mesh, mp_policy=precision)
    policy.sharded = True


def reduce_between_nodes(policy, now):
    """Whether the next backward also sums gradients over copies of the weights: once a step, with the last batch."""
    if policy.sharded:
        policy.set_requires_all_reduce(now)


def clip_grad_norm(policy, max_norm):
    """Scales the gradient to a norm of at most max_norm over all ranks; returns the norm before clipping."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in policy.parameters() if p.grad is not None])
    value = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
    if value > max_norm:
        torch.nn.utils.clip_grads_with_norm_(policy.parameters(), max_norm, norm)
    return value


@contextmanager
def unsharded(policy):
    """Yields a Policy of plain modules for sampling, with all weights of `policy`, gathered once while it is in use.

    Nothing inside is collective, so ranks decode at their own pace, and no FSDP hook runs.
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
