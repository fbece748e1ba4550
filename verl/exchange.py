"""Messages among several ranks on the CPU. They wait for work of one rank alone, however long it takes, as long as that rank lives."""

import pickle
import time
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from verl.peers import Peers

Result = TypeVar("Result")
ONE_SECOND = timedelta(seconds=1)

waited = 0.0  # seconds that this process has waited for other ranks' messages so far


def wait(work: Any, peers: Peers | None) -> None:
    """Wait for a collective.

    Args:
        work: its handle.
        peers: the other ranks, as this one sees them; None: nobody watches them.
    Raises:
        RankError: another rank has died, hangs or has failed.
    """
    global waited
    since = time.perf_counter()
    try:
        while True:
            try:
                work.wait(timeout=ONE_SECOND)  # comes back to Python, which then runs the handlers of signals
                return
            except RuntimeError as error:
                if work.is_completed() or "timed out" not in str(error).lower():
                    raise (error if peers is None else peers.explain(error)) from None
            if peers is not None:
                peers.check()
    finally:
        waited += time.perf_counter() - since


def gathered(value: Result, group: dist.ProcessGroup | None, peers: Peers | None) -> list[Result]:
    """Return the values of all ranks of a group, in rank order, on each of them."""
    ranks, data = dist.get_world_size(group), _packed(value)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(ranks)]
    wait(dist.all_gather(sizes, torch.tensor([len(data)]), group=group, async_op=True), peers)
    longest = int(max(sizes))
    parts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(ranks)]
    padded = torch.cat([data, torch.zeros(longest - len(data), dtype=torch.uint8)])
    wait(dist.all_gather(parts, padded, group=group, async_op=True), peers)
    return [_unpacked(part[: int(size)]) for part, size in zip(parts, sizes, strict=True)]


def broadcast(value: Result, group: dist.ProcessGroup | None, peers: Peers | None) -> Result:
    """Return the value of the group's first rank on each of its ranks."""
    is_first = dist.get_rank(group) == 0
    data = _packed(value) if is_first else torch.zeros(0, dtype=torch.uint8)
    size = torch.tensor(len(data))
    wait(dist.broadcast(size, group=group, group_src=0, async_op=True), peers)
    data = data if is_first else torch.zeros(int(size), dtype=torch.uint8)
    wait(dist.broadcast(data, group=group, group_src=0, async_op=True), peers)
    return value if is_first else _unpacked(data)


def _packed(value: object) -> Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)


def _unpacked(data: Tensor) -> Any:
    return pickle.loads(data.numpy().tobytes())  # noqa: S301 - from a rank of this run
