"""Processes, and the model sharded over them with FSDP2. With one process on a CPU nothing here does anything."""

import copy
import os
import sys
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from grpo import model as models
from grpo.config import ConfigError

# For others: one process may build the demo or write 15 GB alone. `watch_others` notices one that dies.
PATIENCE = timedelta(minutes=30)
GRACE = 3  # seconds for a process to end by itself, with a message of its own, once another one is gone
finished = threading.Event()  # every process is done: from now on they may leave


@dataclass
class Processes:
    """This process among its peers. `mesh` is None where the model is not sharded: one process on a CPU."""

    rank: int
    world: int
    device: torch.device
    mesh: DeviceMesh | None

    @property
    def is_main(self):
        return self.rank == 0

    @property
    def dtype(self):
        """What models are computed in."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def sum(self, values):
        """{name: number} summed over processes; every process must pass the same names."""
        if self.world == 1:
            return dict(values)
        total = torch.tensor([float(values[name]) for name in sorted(values)], dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return dict(zip(sorted(values), total.tolist()))

    def gather(self, item, group=None):
        """[item of rank 0, ...] on every process; items are plain Python values. group: where not the default one."""
        items = [item] * self.world
        if self.world > 1:
            dist.all_gather_object(items, item, group=group)
        return items

    def barrier(self):
        if self.world > 1:
            dist.barrier()


def start(device="auto", shard_size=0):
    """Joins torchrun's processes where there are any, else stands alone. Returns the `Processes`.

    shard_size processes (0: those of one node) hold one copy of the weights; with more, copies are replicated and only
    gradients cross nodes. Raises ConfigError where it does not divide their number.
    """
    size = shard_size or int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no GPU; install a CUDA build and driver, or give --device cpu")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world % size:
        raise ConfigError(f"--shard_size {size}: must divide the number of processes, {world}")
    device = torch.device("cpu")
    if kind == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if kind == "cpu" and world == 1:
        return Processes(0, 1, device, None)
    backend = "nccl" if kind == "cuda" else "gloo"
    store = dist.HashStore() if world == 1 else None  # None: torchrun's
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=PATIENCE)
    shape, names = ((world,), ("shard",)) if size == world else ((world // size, size), ("replicate", "shard"))
    processes = Processes(rank, world, device, init_device_mesh(kind, shape, mesh_dim_names=names))
    if world > 1:
        pids = [pid for node, pid in processes.gather((_node(), os.getpid())) if node == _node()]
        threading.Thread(target=watch_others, args=(pids,), daemon=True).start()
    return processes


def stop():
    """Leaves the process group, once every process is done."""
    if dist.is_initialized():
        dist.barrier()
        finished.set()
        dist.destroy_process_group()


def watch_others(pids):
    """Ends this process with code 3, GRACE seconds after a process of any node has died, of whatever.

    For a thread: NCCL's collectives wait for a dead process for ever, and no signal handler runs meanwhile. pids are
    those of this node; processes tell each other of other nodes through torchrun's store.
    """
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    while not (any(_is_gone(pid) for pid in pids) or _is_lost(store)):
        time.sleep(1)
    with suppress(dist.DistError):  # the store may be gone, too
        store.set("a process is lost", "1")
    if not finished.wait(GRACE):
        name = Path(sys.argv[0]).name
        print(f"{name}: error: another process is gone, see its message or torchrun's", file=sys.stderr, flush=True)
        os._exit(3)  # the main thread may be inside a collective, out of reach


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
    except dist.DistError:  # of the process that holds it: torchrun's on the first node
        return True


def shard(policy, processes, dtype=None):
    """Shards a Policy in place: each vision block and decoder layer, then the rest; returns it.

    Parameters stay as loaded (fp32 masters), `dtype` (bf16 on a GPU) is what is gathered and computed in; gradients
    are reduced in fp32. The policy must be on the meta device still.
    """
    if processes.mesh is None:
        return policy
    object.__setattr__(policy, "plain", copy.deepcopy(policy))  # no submodule: it has no weights of its own
    # Inputs are not cast: the vision tower's rotary tables must stay in fp32.
    reduce = torch.float32 if dtype else None
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=reduce, cast_forward_inputs=False)
    options = {"mesh": processes.mesh, "mp_policy": precision}
    for block in [*models.vision_tower(policy.model).blocks, *models.decoder(policy.model).layers]:
        fully_shard(block, **options)
    fully_shard(policy, **options)
    policy.sharded = True
    return policy


def reduce_between_nodes(policy, now):
    """Whether the next backward also sums gradients over copies of the weights: once a step, with its last chunk."""
    if policy.sharded:
        policy.set_requires_all_reduce(now)


def clip_gradients(policy, limit):
    """Scales the gradient, over all processes, to a norm of at most `limit`; returns the norm it had."""
    gradients = [p.grad for p in policy.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    told = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
    if told > limit:
        torch.nn.utils.clip_grads_with_norm_(policy.parameters(), limit, norm)
    return told


@contextmanager
def gathered(policy):
    """Yields a Policy of plain modules for sampling: all weights of `policy`, gathered once for as long as it is used.

    Nothing inside is collective, so processes decode at their own pace, and no hook of FSDP runs.
    """
    if not policy.sharded:
        yield policy
        return
    sharded = [m for m in policy.modules() if isinstance(m, FSDPModule)]
    for module in sharded:
        module.unshard()
    for name, module in policy.named_modules():
        twin = policy.plain.get_submodule(name)
        twin._parameters.update(module._parameters)
        twin._buffers.update(module._buffers)
    try:
        yield policy.plain
    finally:
        for module in sharded:
            module.reshard()
