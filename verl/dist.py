"""Processes and devices: one process on a laptop and many under torchrun run the same code."""

import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from verl.errors import UserError

Result = TypeVar("Result")
TIMEOUT = timedelta(minutes=10)

_store: dist.Store | None = None  # torchrun's, through which processes find each other
_joined = 0  # how often this process has joined them
_group: dist.ProcessGroup | None = None  # of the processes that work with this one; None: all of them
_context_size = 1  # processes that share a micro-batch
_context_groups: dict[str, dist.ProcessGroup] = {}  # this process's, by name


def start(*, large_pages: bool = False) -> torch.device:
    """Join the process group (a group of one without torchrun) and choose the device: CUDA, else the CPU.

    Args:
        large_pages: take host memory in pages of 2 MiB, for gradients that arrive there in new tensors in each step: the system hands
            it out four times as fast as in pages of 4 KiB (12 GB/s, not 3).
    Raises:
        UserError: torchrun's variables are incomplete, there are more processes than GPUs on this node, or this process is in a group
            that another program made, and it lacks gloo.
    """
    if large_pages:
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # PyTorch reads it before its first tensor; the group's first words are one
    device = _device()
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store, rank, processes = _rendezvous()
        dist.init_process_group(backend, store=store, rank=rank, world_size=processes, timeout=TIMEOUT)
    elif "cpu" not in (backend := dist.get_backend_config()):
        fix = 'make it with init_process_group("cpu:gloo,cuda:nccl"), or leave it to verl'
        raise UserError(f"this process has a process group of {backend!r}, which carries nothing in host memory", fix=fix)
    return device


def _rendezvous() -> tuple[dist.Store, int, int]:
    """Where the processes find each other, this one's rank, and their number.

    Each time under names of its own: a process that joins its second group must not find the addresses of the first.
    """
    global _store, _joined
    if "RANK" not in os.environ:
        return dist.HashStore(), 0, 1
    missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(f"RANK is set but {', '.join(missing)} is not", fix="start with torchrun, or unset RANK")
    if _store is None:
        _store, _, _ = next(rendezvous("env://", timeout=TIMEOUT))
    _joined += 1
    return dist.PrefixStore(f"verl {_joined}", _store), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if local_rank >= gpus:
        raise UserError(f"process {local_rank} of this node has no GPU of its own", fix=f"torchrun --nproc_per_node={gpus}")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def describe_device(device: torch.device) -> str:
    """The device's name, and how many processes have one each."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return f"{name} × {world_size()}" if world_size() > 1 else name


def host_memory() -> int:
    """Bytes that this machine's processes may take together: its memory, or a container's limit."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(memory, int(text)) if text.isdigit() else memory


def stop() -> None:
    """Leave the process group, and wait until gloo's threads are at rest."""
    forget_parts()
    if dist.is_initialized():
        dist.destroy_process_group()
        _rest()


def forget_parts() -> None:
    """From now on all processes work together again, each on micro-batches of its own."""
    global _group
    _group = None
    share_micro_batches(1)
    _context_groups.clear()


def is_started() -> bool:
    """Whether this process is in a process group."""
    return dist.is_initialized()


def _rest() -> None:
    """Wait until none of gloo's threads runs, which takes them a moment after their last message.

    They let go of its tensors then, for which they need the interpreter's lock; an interpreter that is ending does not give it, and aborts
    the process (https://github.com/pytorch/pytorch/issues/190489). Who waits for that lock has it before the second look.
    """
    if sys.platform != "linux":
        time.sleep(0.1)
        return
    looks_at_rest = 0
    while looks_at_rest < 2:
        time.sleep(0.002)
        looks_at_rest = 0 if "R" in _states_of_threads("pt_gloo_runloop") else looks_at_rest + 1


def _states_of_threads(name: str) -> list[str]:
    """One letter for each of this process's threads of that name: R runs or would, S sleeps."""
    states = []
    for thread in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            number_and_name, rest = (thread / "stat").read_text().rsplit(")", 1)
            if number_and_name.endswith(f"({name}"):
                states.append(rest.split()[0])
    return states


def divide(parts: Sequence[Sequence[int]]) -> None:
    """From now on the processes of each part work among themselves, and all that is said here of ranks is said of theirs.

    Every process calls it, and is in one part.
    """
    global _group
    _group, _ = dist.new_subgroups_by_enumeration([list(part) for part in parts], timeout=TIMEOUT)


def group() -> dist.ProcessGroup | None:
    """The processes that work with this one, for calls of torch.distributed; None: all of them."""
    return _group


def rank() -> int:
    return dist.get_rank(_group) if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size(_group) if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process prints, logs and writes what is written once."""
    return rank() == 0


def mesh(device: torch.device, size: int | None = None) -> DeviceMesh:
    """All processes in one dimension, or in groups of `size` neighbours: which of the groups, and where in it."""
    if _group is not None:
        assert size in (None, world_size()), "parts of processes are not divided again"
        return DeviceMesh.from_group(_group, device.type, mesh_dim_names=("shard",))
    if size is None or size == world_size():
        return init_device_mesh(device.type, (world_size(),), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (world_size() // size, size), mesh_dim_names=("replicate", "shard"))


def share_micro_batches(processes: int) -> None:
    """From now on so many neighbours take the same micro-batches, each a part of their tokens. Every process calls it.

    Raises:
        UserError: the number of processes is not a multiple.
    """
    global _context_size
    if world_size() % processes:
        fix = f"set it to 1, or start a multiple of {processes} processes (torchrun --nproc_per_node={processes})"
        raise UserError(f"{world_size()} processes are not a multiple of {processes}", where="model.context_parallel_size", fix=fix)
    _context_size = processes
    if processes > 1 and context_name() not in _context_groups:
        _context_groups[context_name()], _ = dist.new_subgroups(processes, timeout=TIMEOUT)


def context_size() -> int:
    """Processes that share a micro-batch."""
    return _context_size


def context_rank() -> int:
    """The number of this process's part of a micro-batch."""
    return rank() % _context_size


def context_name() -> str:
    """Of the group of processes that share this one's micro-batches."""
    return f"context of {_context_size}"


def context_group(name: str) -> dist.ProcessGroup:
    """The group of that name that this process is in."""
    return _context_groups[name]


def data_rank() -> int:
    """The number of this process's group among those that take different rows."""
    return rank() // _context_size


def data_size() -> int:
    """Groups of processes that take different rows."""
    return world_size() // _context_size


def barrier() -> None:
    any_rank(False)


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank. On host memory, so that no device is waited for."""
    return most(int(flag)) > 0


def most(number: int) -> int:
    """The largest of the ranks' numbers, on every rank. On host memory, so that no device is waited for."""
    if world_size() == 1:
        return number
    numbers = torch.tensor(number)
    dist.all_reduce(numbers, op=dist.ReduceOp.MAX, group=_group)
    return int(numbers)


def total(values: Sequence[float]) -> list[float]:
    """The sums of the ranks' numbers, in float64, on every rank. On host memory."""
    sums = torch.tensor(values, dtype=torch.float64)
    if world_size() > 1:
        dist.all_reduce(sums, group=_group)
    return [float(value) for value in sums]


def gathered(value: Result) -> list[Result]:
    """The ranks' values, in the order of the ranks, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=_group)
    return values


def from_main(value: Result) -> Result:
    """Rank 0's value, on every rank."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, group=_group, group_src=0)
    return values[0]


def main_first(work: Callable[[], Result]) -> Result:
    """Run the work on each node's first process and then on the others, which find its files.

    Raises:
        UserError: on all ranks if it was raised on one, so that none waits for another.
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
        UserError: on all ranks if it was raised on one, so that none waits for another.
    """
    _, error = _attempt(work)
    _raise_together(error)


def check_same(value: object, *, what: str, where: str) -> None:
    """Whether all ranks have the same, where each goes by its own.

    Args:
        what: the value is, such as "the rows".
        where: the key that it comes from.
    Raises:
        UserError: on all ranks: a node has another value than the first.
    """
    first = from_main(value)

    def compare() -> None:
        if value != first:
            fix = "give all nodes the same files under the same names"
            raise UserError(f"{what} that {socket.gethostname()} finds are not those of the first node", where=where, fix=fix)

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


def sum_over_parts(part: Tensor, parts: int) -> Tensor:
    """A sum over the processes that share this one's batch, the same on each, with a gradient.

    Args:
        part: this process's summand, of one shape on each.
        parts: how many processes they are (`Batch.parts`).
    """
    total: Tensor = part if parts == 1 else _SumOverParts.apply(part)
    return total


class _SumOverParts(torch.autograd.Function):
    """What each process makes of the sum depends on every summand, so that the gradients are added up likewise."""

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        total = part.clone()
        dist.all_reduce(total, group=context_group(context_name()))
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _SumOverParts.forward(ctx, gradients[0])
