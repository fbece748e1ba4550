"""A rollout on its own processes: it receives prompts, returns answers, and receives new weights by name, in buckets.

Training processes use a `RemoteRollout`; the others `serve` it. Messages go through torch.distributed. Prompts and answers are exchanged as
objects among all processes; the first training process broadcasts weights to the rollout processes.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from verl import dist as processes
from verl import signals
from verl.config.ppo import PPOConfig, longest_sample
from verl.data.render import Renderer
from verl.errors import AbandonedError, UserError
from verl.rl.mapping import Layout
from verl.rollout import Completion, Options, Rollout, Sampling, load_rollout

BUCKET_BYTES = 2**28  # size of a message with weights; its last tensor may exceed it


@dataclass(frozen=True)
class _Request:
    """The prompts of a request from one training process."""

    prompts: list[list[int]]
    sampling: Sampling
    seeds: list[int] | None


@dataclass(frozen=True)
class _NewWeights:
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


class RemoteRollout:
    """The `Rollout` of a training process. All training processes make the same calls in the same order."""

    def __init__(self, bridge: Bridge):
        self._bridge, self._is_open = bridge, True
        answers = bridge.exchange(None)
        self.stop_ids, self.positions, self._device = answers[bridge.layout.rollout[0]]

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int] | None = None) -> list[Completion]:
        """See `Rollout.generate`."""
        numbers = None if seeds is None else list(seeds)
        try:
            with signals.held():  # the rollout processes give up, and tell all
                self._bridge.exchange(_Request([list(prompt) for prompt in prompts], sampling, numbers))
                answers = self._bridge.exchange(None)
        except AbandonedError:
            self._is_open = False  # they end
            raise
        mine: dict[int, list[Completion]] = {}
        for rank in self._bridge.layout.rollout:
            mine |= answers[rank].get(dist.get_rank(), {})
        return [completion for number in range(len(prompts)) for completion in mine[number]]

    def stream(
        self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int] | None = None
    ) -> Iterator[list[tuple[int, Completion]]]:
        """See `Rollout.stream`; yields all answers at once."""
        yield list(enumerate(self.generate(prompts, sampling, seeds)))

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See `Rollout.update_weights`."""
        self._bridge.exchange(_NewWeights(version))
        self._bridge.send(named_tensors)

    def sleep(self) -> None:
        """Do nothing: the rollout processes have GPUs of their own."""

    def wake(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Let the rollout processes end."""
        if self._is_open:
            self._bridge.exchange(None)

    def describe(self) -> str:
        return f"{self._device} × {len(self._bridge.layout.rollout)}"


def divide(layout: Layout, device: torch.device) -> Bridge | None:
    """Split the processes into training and rollout processes if the rollout has its own ranks. Every process calls it."""
    if not layout.is_split:
        return None
    bridge = Bridge(layout, device)
    processes.divide([layout.training, layout.rollout])
    return bridge


def serve_rollout(config: PPOConfig, bridge: Bridge, tokenizer: PreTrainedTokenizerBase) -> None:
    """Load the rollout and serve it: all that a rollout process does.

    Raises:
        UserError: the model cannot be loaded, or another process raised an error.
    """
    path, stop_ids, options = config.model.partial_pretrain, Renderer(tokenizer).stop_ids, rollout_options(config)
    with signals.held(), suppress(AbandonedError):  # after a signal, training processes need this one to end together
        serve(bridge, lambda: load_rollout(config.rollout.name, path, tokenizer, stop_ids, options))


def rollout_options(config: PPOConfig) -> Options:
    return Options(
        max_sequences=config.rollout.max_sequences,
        max_positions=longest_sample(config),
        url=config.rollout.url,
        weights_folder=config.rollout.weights_folder,
        gpu_memory_utilization=config.rollout.gpu_memory_utilization,
        trust_remote_code=config.model.trust_remote_code,
        speculate=config.rollout.speculate,
    )


def serve(bridge: Bridge, load: Callable[[], Rollout]) -> None:
    """Answer requests and take new weights until the training processes are done."""
    rollout: Rollout = _or_raise_everywhere(bridge, load)
    bridge.exchange((rollout.stop_ids, rollout.positions, rollout.describe()))
    while (requests := bridge.exchange(None))[bridge.sender] is not None:
        if isinstance(requests[bridge.sender], _NewWeights):
            rollout.update_weights(bridge.receive(), requests[bridge.sender].version)
        else:
            bridge.exchange(_or_raise_everywhere(bridge, partial(_answer, rollout, bridge, requests)))
    rollout.close()


def _or_raise_everywhere(bridge: Bridge, work: Callable[[], Any]) -> Any:
    """Return the result of `work`. If it raises UserError, all processes get the error in place of the message they wait for."""
    try:
        return work()
    except UserError as error:
        bridge.exchange(error)
        raise


def _answer(rollout: Rollout, bridge: Bridge, requests: list[Any]) -> dict[int, dict[int, list[Completion]]]:
    """Answer this process's share of all prompts. Return completions by requesting rank and number of the prompt in its request."""
    place, ranks = bridge.layout.rollout.index(dist.get_rank()), bridge.layout.training
    share = [(rank, number) for rank in ranks for number in range(len(requests[rank].prompts))][place :: len(bridge.layout.rollout)]
    found: dict[int, dict[int, list[Completion]]] = {}
    for rank, entries in groupby(share, key=lambda entry: entry[0]):
        numbers, request = [number for _, number in entries], requests[rank]
        seeds = numbers if request.seeds is None else [request.seeds[number] for number in numbers]
        with signals.abandoning():
            done = rollout.generate([request.prompts[number] for number in numbers], request.sampling, seeds)
        n = request.sampling.n
        found[rank] = {number: done[i * n : (i + 1) * n] for i, number in enumerate(numbers)}
    return found


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
