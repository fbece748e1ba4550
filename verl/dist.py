"""Processes, devices and collectives. The same code runs in one process and in many under torchrun."""

import os
import shutil
import socket
from collections.abc import Callable, Sequence
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from verl.errors import RankError, Stopped, UserError

if TYPE_CHECKING:
    from verl.peers import Peers

Result = TypeVar("Result")
UNLIMITED = timedelta(days=100)  # of collectives: `verl.peers` sees which ranks are dead, and which are only busy

_store: dist.Store | None = None  # torchrun's rendezvous store
_joined = 0  # number of times that this process has joined a process group
_peers: "Peers | None" = None  # watches the other ranks; None: there are none
_group: dist.ProcessGroup | None = None  # the group of this process; None: all processes
_context_size = 1  # ranks that share a micro-batch
_context_groups: dict[str, dist.ProcessGroup] = {}  # this process's context-parallel groups by name


def start(*, large_pages: bool = False, timeout_seconds: float = 600.0) -> torch.device:
    """Join the process group (a group of one without torchrun) and choose the device: CUDA if available, else the CPU.

    Args:
        timeout_seconds: see `verl.config.shared.DistConfig`.
        large_pages: allocate host memory in pages of 2 MiB. Offloaded gradients are new tensors in each step, and their allocation is
            four times as fast as with pages of 4 KiB (12 GB/s, not 3).
    Raises:
        UserError: torchrun's environment variables are wrong, or the other ranks are not found; this node has more processes than GPUs; or
            the calling program has created a process group without gloo.
    """
    if large_pages:
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # PyTorch reads it at the first allocation, in init_process_group
    device = _device()
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store, rank, processes = _rendezvous(timeout_seconds)
        dist.init_process_group(backend, store=store, rank=rank, world_size=processes, timeout=UNLIMITED)
    elif "cpu" not in (backend := dist.get_backend_config()):
        fix = 'create it with init_process_group("cpu:gloo,cuda:nccl"), or let verl create it'
        raise UserError(f"this process has a process group of {backend!r}, which cannot send CPU tensors", fix=fix)
    return device


def _rendezvous(timeout_seconds: float) -> tuple[dist.Store, int, int]:
    """Return the rendezvous store, this process's rank and the world size.

    Each call returns a store with a new prefix: a process that joins a second group must not read the addresses of the first.
    """
    global _store, _joined, _peers
    if "RANK" not in os.environ:
        return dist.HashStore(), 0, 1
    from verl import rendezvous  # a single process needs none

    place = rendezvous.read_place()
    if place.ranks == 1:
        return dist.HashStore(), 0, 1
    if _store is None:
        _store = rendezvous.open_store(place)
    _joined += 1
    from verl.peers import Peers

    _peers = Peers(_store, _joined, place, timeout_seconds)
    return dist.PrefixStore(f"verl {_joined}", _store), place.rank, place.ranks


def has_compiler() -> bool:
    """Return whether there is a C compiler, which torch.compile and Triton need."""
    return any(shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang"))


HAS_TRITON = find_spec("triton") is not None and has_compiler()  # CPU builds of PyTorch come without Triton


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank = 0
    if "LOCAL_RANK" in os.environ:
        from verl.rendezvous import read_local_rank

        local_rank = read_local_rank(torch.cuda.device_count())
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def describe_device(device: torch.device) -> str:
    """Return the device's name and the number of processes."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {(n := torch.get_num_threads())} thread{'s' * (n > 1)}"
    return f"{name} × {world_size()}" if world_size() > 1 else name


def host_memory() -> int:
    """Return the memory of this machine, or the container's limit, in bytes."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(memory, int(text)) if text.isdigit() else memory


def stop(error: BaseException | None = None) -> None:
    """Leave the process group, and wait until gloo's threads are idle.

    Args:
        error: what ends the run; other ranks are told. None: it is done.
    """
    global _peers
    forget_parts()
    if _peers is not None:
        _peers.leave(error)
        _peers = None
    if dist.is_initialized():
        is_alone = isinstance(error, RankError) or not (error is None or isinstance(error, UserError | Stopped))
        if is_alone and world_size() > 1:
            return  # other ranks do not answer, and the process ends
        from verl.rendezvous import wait_until_idle

        dist.destroy_process_group()
        wait_until_idle()


def forget_parts() -> None:
    """Undo `divide` and `share_micro_batches`: all processes are one group again, and each has its own micro-batches."""
    global _group
    _group = None
    share_micro_batches(1)
    _context_groups.clear()


def is_started() -> bool:
    """Return whether this process is in a process group."""
    return dist.is_initialized()


def divide(parts: Sequence[Sequence[int]]) -> None:
    """Divide the processes into groups. Afterwards, this module's ranks and collectives are those within this process's group.

    Every process calls this.

    Args:
        parts: the global ranks of each group; each rank is in one group.
    """
    global _group
    _group, _ = dist.new_subgroups_by_enumeration([list(part) for part in parts], timeout=UNLIMITED)


def group() -> dist.ProcessGroup | None:
    """Return the group of this process for torch.distributed; None means all processes."""
    return _group


def rank() -> int:
    return dist.get_rank(_group) if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size(_group) if dist.is_initialized() else 1


def is_main() -> bool:
    """Return whether this is rank 0, which prints, logs and writes shared files."""
    return rank() == 0


def mesh(device: torch.device, size: int | None = None) -> DeviceMesh:
    """Return a one-dimensional mesh of all ranks, or a mesh [replicate, shard] of groups of `size` consecutive ranks."""
    if _group is not None:
        assert size in (None, world_size()), "a part of the processes cannot be divided again"
        return DeviceMesh.from_group(_group, device.type, mesh_dim_names=("shard",))
    if size is None or size == world_size():
        return init_device_mesh(device.type, (world_size(),), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (world_size() // size, size), mesh_dim_names=("replicate", "shard"))


def share_micro_batches(processes: int) -> None:
    """Set up context parallelism: groups of `processes` consecutive ranks share each micro-batch. Every rank calls it.

    Raises:
        UserError: the world size is not a multiple of `processes`.
    """
    global _context_size
    if world_size() % processes:
        fix = f"set it to 1, or start a multiple of {processes} processes (torchrun --nproc_per_node={processes})"
        raise UserError(f"{world_size()} processes are not a multiple of {processes}", where="model.context_parallel_size", fix=fix)
    _context_size = processes
    if processes > 1 and context_name() not in _context_groups:
        _context_groups[context_name()], _ = dist.new_subgroups(processes, timeout=UNLIMITED)


def context_size() -> int:
    """Return the number of ranks that share a micro-batch."""
    return _context_size


def context_rank() -> int:
    """Return the index of this rank's slice of a micro-batch."""
    return rank() % _context_size


def context_name() -> str:
    """Return the name of this rank's context-parallel group."""
    return f"context of {_context_size}"


def context_group(name: str) -> dist.ProcessGroup:
    """Return this rank's context-parallel group of that name."""
    return _context_groups[name]


def data_rank() -> int:
    """Return the data-parallel rank: ranks that share micro-batches have the same one."""
    return rank() // _context_size


def data_size() -> int:
    """Return the data-parallel size."""
    return world_size() // _context_size


def barrier() -> None:
    """Wait until every rank has called this."""
    any_rank(False)


def any_rank(flag: bool) -> bool:
    """Return whether the flag is set on any rank. It runs on the CPU, so that no rank waits for its device."""
    return most(int(flag)) > 0


def most(number: int) -> int:
    """Return the maximum over all ranks. It runs on the CPU, so that no rank waits for its device."""
    if world_size() == 1:
        return number
    numbers = torch.tensor(number)
    _wait(dist.all_reduce(numbers, op=dist.ReduceOp.MAX, group=_group, async_op=True))
    return int(numbers)


def total(values: Sequence[float]) -> list[float]:
    """Return the sums over all ranks, in float64, computed on the CPU."""
    sums = torch.tensor(values, dtype=torch.float64)
    if world_size() > 1:
        _wait(dist.all_reduce(sums, group=_group, async_op=True))
    return [float(value) for value in sums]


def gathered(value: Result, *, everywhere: bool = False) -> list[Result]:
    """Return the values of all ranks, in rank order, on every rank.

    Args:
        everywhere: of all processes, also those of other groups (see `divide`).
    """
    group = None if everywhere else _group
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return [value]
    from verl import exchange  # a single process needs none

    return exchange.gathered(value, group, _peers)


def from_main(value: Result) -> Result:
    """Return rank 0's value on every rank."""
    if world_size() == 1:
        return value
    from verl import exchange

    return exchange.broadcast(value, _group, _peers)


def _wait(work: Any) -> None:
    """Wait for a collective on the CPU, see `verl.exchange.wait`."""
    from verl.exchange import wait

    wait(work, _peers)


def cause_of(error: BaseException) -> BaseException:
    """Return what explains an error: if a collective broke, the RankError that names the rank; else the error itself."""
    return error if _peers is None else _peers.cause_of(error)


def check_others() -> None:
    """Raise RankError if another rank has died, hangs or has failed."""
    if _peers is not None:
        _peers.check()


def moved() -> None:
    """Note that the run gets on, so that no rank takes this one for hung."""
    from verl import signals

    signals.moved()


def main_first(work: Callable[[], Result]) -> Result:
    """Run the work on the first process of each node, and then on the others, which find its files.

    Raises:
        UserError: on all ranks if one raised it, so that none waits for another.
    """
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    result, error = _attempt(work) if first else (None, None)
    _raise_together(error)
    if not first:
        result, error = _attempt(work)
    _raise_together(error)
    return result  # type: ignore[return-value]


def together(work: Callable[[], object]) -> None:
    """Run the work on every rank.

    Raises:
        UserError: on all ranks if one raised it, so that none waits for another.
    """
    _, error = _attempt(work)
    _raise_together(error)


def check_same(value: object, *, what: str, where: str) -> None:
    """Check that all ranks have the same value, because each computes with its own.

    Args:
        what: name of the value in the error message, such as "the rows".
        where: config key that the value comes from.
    Raises:
        UserError: on all ranks: a node has another value than the first node.
    """
    first = from_main(value)

    def compare() -> None:
        if value != first:
            fix = "give all nodes the same files under the same names"
            raise UserError(f"{what} on {socket.gethostname()} differ from those on the first node", where=where, fix=fix)

    together(compare)


def _attempt(work: Callable[[], Result]) -> tuple[Result | None, UserError | None]:
    try:
        return work(), None
    except UserError as error:
        return None, error


def _raise_together(error: UserError | None) -> None:
    if world_size() == 1:
        if error is not None:
            raise error
        return
    for found in gathered(error):
        if found is not None:
            raise found
