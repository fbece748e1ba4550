"""Messages between training processes and rollout processes.

They go through torch.distributed. Prompts and answers are exchanged as objects among all processes; the first training process broadcasts
weights to the rollout processes.
"""

import os
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from verl import dist as processes
from verl import signals
from verl.errors import AbandonedError, UserError
from verl.rl.mapping import Layout
from verl.rollout import Completion, Sampling

Answers = dict[int, dict[int, list[Completion]]]  # by the rank that asked, and the number of the prompt in its request
POLL_SECONDS = 0.002
LOOK_SECONDS = 1.0  # between two looks at whether rollout processes are there
BUCKET_BYTES = 2**28  # size of a message with weights; its last tensor may exceed it


@dataclass(frozen=True)
class Request:
    """The prompts of a request from one training process."""

    prompts: list[list[int]]
    sampling: Sampling
    seeds: list[int] | None


@dataclass(frozen=True)
class Begin:
    """A request whose answers are fetched later, by `Finish`.

    Attributes:
        so_far: what its answers have already, by the number of the prompt; empty: nothing.
        is_again: whether they were begun before, by a run that this one resumes.
    """

    request: Request
    so_far: dict[int, list[Completion]] = field(default_factory=dict)
    is_again: bool = False


@dataclass(frozen=True)
class Finish:
    """Asks for the answers that were begun; those of the first message if of several."""


@dataclass(frozen=True)
class Cut:
    """Asks for what all answers that were begun have so far. They stop, and go on from there."""


@dataclass(frozen=True)
class Replay:
    """The events of a run that is to be repeated, see `verl.rl.schedule`."""

    events: list[dict[str, Any]]


@dataclass(frozen=True)
class NewWeights:
    version: int


@dataclass(frozen=True)
class _Entry:
    """Name, shape and dtype of a tensor in a bucket. The bucket's bytes hold the tensors in the order of the entries."""

    name: str
    shape: torch.Size
    dtype: torch.dtype


class Bridge:
    """Communication between training and rollout processes. Every process makes one, at the same time."""

    def __init__(self, layout: Layout, device: torch.device):
        self.layout, self.device = layout, device
        self.sender = layout.training[0]
        self._calls, self._store = 0, dist.distributed_c10d._get_default_store()
        self._processes: list[tuple[str, int]] = processes.gathered((socket.gethostname(), os.getpid()), everywhere=True)
        self.weights_group = dist.new_group([self.sender, *layout.rollout], timeout=processes.UNLIMITED)

    @property
    def trains(self) -> bool:
        """Return whether this is a training process."""
        return dist.get_rank() in self.layout.training

    def exchange(self, value: object) -> list[Any]:
        """Return every process's value, by rank.

        Raises:
            UserError: on all processes, if a process passed it as its value, or has ended.
        """
        values: list[Any] = processes.gathered(value, everywhere=True)
        for found in values:
            if isinstance(found, UserError):
                raise found
        return values

    def call(self) -> None:
        """Let rollout processes that draw meanwhile know of the message that is exchanged next. Every training process calls it."""
        processes.barrier()  # none of them is late, so that the rollout does not wait long
        if dist.get_rank() == self.sender:
            self._store.set(f"rollout call {self._calls}", "")
            if self._calls > 0:
                self._store.delete_key(f"rollout call {self._calls - 1}")
        self._calls += 1

    def is_called(self) -> bool:
        """Return whether a message comes that this rollout process has not taken."""
        return bool(self._store.check([f"rollout call {self._calls}"]))

    def take(self, value: object) -> list[Any]:
        """Return the next message of each training process, on a rollout process that was called, or has nothing else to do."""
        values = self.exchange(value)
        self._calls += 1
        return values

    def report(self, number: int | None) -> None:
        """Let the training processes know that this rollout process has finished its answers of the `Begin` of this number.

        Args:
            number: counted from 0; None: an error is to be exchanged next.
        """
        self._store.set("rollout failed" if number is None else f"rollout {dist.get_rank()} finished {number}", "")

    def wait_for(self, number: int) -> None:
        """Wait until all rollout processes have finished the answers of the `Begin` of this number. Every training process calls it.

        Raises:
            AbandonedError: on all of them: a signal came before.
        """
        is_stopped, looked = False, time.monotonic()
        if dist.get_rank() == self.sender:
            keys = [f"rollout {rank} finished {number}" for rank in self.layout.rollout]
            while not (self._store.check(keys) or self._store.check(["rollout failed"]) or (is_stopped := signals.received() is not None)):
                processes.check_others()
                time.sleep(POLL_SECONDS)
                if time.monotonic() - looked > LOOK_SECONDS:
                    if self._has_lost_one():  # no connection breaks in this loop; the next exchange says which
                        break
                    looked = time.monotonic()
            for key in keys if not is_stopped else ():
                self._store.delete_key(key)
        if processes.from_main(is_stopped):
            raise AbandonedError("given up, because the run stops")

    def send(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Broadcast weights from the first training process. The other training processes take part in gathering sharded weights."""
        for bucket in _buckets(named_tensors):
            if dist.get_rank() == self.sender:
                self._broadcast([_Entry(name, tensor.shape, tensor.dtype) for name, tensor in bucket])
                dist.broadcast(_bytes(bucket).to(self.device), self.sender, group=self.weights_group)
        if dist.get_rank() == self.sender:
            self._broadcast(None)

    def receive(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights that `send` broadcasts, on this process's device."""
        while (entries := self._broadcast(None)) is not None:
            sizes = [entry.shape.numel() * entry.dtype.itemsize for entry in entries]
            buffer = torch.empty(sum(sizes), dtype=torch.uint8, device=self.device)
            dist.broadcast(buffer, self.sender, group=self.weights_group)
            for entry, part in zip(entries, buffer.split(sizes), strict=True):
                yield entry.name, part.clone().view(entry.dtype).view(entry.shape)

    def _broadcast(self, entries: list[_Entry] | None) -> list[_Entry] | None:
        box = [entries]
        dist.broadcast_object_list(box, self.sender, group=self.weights_group)
        return box[0]

    def _has_lost_one(self) -> bool:
        """Return whether the process of a rollout rank on this host has ended. On other hosts, its heartbeat tells, later."""
        here = socket.gethostname()
        return any(host == here and _has_ended(number) for host, number in (self._processes[rank] for rank in self.layout.rollout))


def _has_ended(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
    except OSError:
        return Path("/proc/self").exists()  # else this system has no such files
    return state in ("Z", "X")


def share_of(layout: Layout, requests: dict[int, Request], rank: int) -> list[tuple[int, int]]:
    """Return what a rollout process answers: pairs of a training rank and the number of a prompt in its request.

    Args:
        requests: request of each training rank.
    """
    everything = [(trainer, number) for trainer in layout.training for number in range(len(requests[trainer].prompts))]
    return everything[layout.rollout.index(rank) :: len(layout.rollout)]


def prompts_of(layout: Layout, messages: Sequence[Any], rank: int) -> list[int] | None:
    """Return the numbers of the prompts that a message asks a rollout process to answer; None if it asks for no answers.

    Args:
        messages: of each process, by rank.
    """
    if not isinstance(messages[layout.training[0]], Begin | Request):
        return None
    requests = {trainer: found.request if isinstance(found := messages[trainer], Begin) else found for trainer in layout.training}
    share = share_of(layout, requests, rank)
    return [number if (seeds := requests[trainer].seeds) is None else seeds[number] for trainer, number in share]


def _buckets(named_tensors: Iterable[tuple[str, Tensor]]) -> Iterator[list[tuple[str, Tensor]]]:
    bucket: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in named_tensors:
        bucket.append((name, tensor))
        size += tensor.numel() * tensor.dtype.itemsize
        if size >= BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket


def _bytes(bucket: list[tuple[str, Tensor]]) -> Tensor:
    return torch.cat([tensor.detach().contiguous().view(-1).view(torch.uint8) for _, tensor in bucket])
