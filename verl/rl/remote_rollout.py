"""A rollout on processes of its own: prompts go there and answers come back, and new weights are sent by name in buckets.

The processes that train have a `RemoteRollout`; the others `serve` it. Messages go through torch.distributed: prompts and answers as
objects among all processes, weights from the first process that trains to those that generate.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from verl import dist as processes
from verl.config.ppo import PPOConfig, longest_sample
from verl.data.render import Renderer
from verl.errors import UserError
from verl.rl.mapping import Layout
from verl.rollout import Completion, Options, Rollout, Sampling, load_rollout
from verl.run import first_signals_ignored

BUCKET_BYTES = 2**28  # of weights in one message


@dataclass(frozen=True)
class _Questions:
    """What one process that trains wants answered."""

    prompts: list[list[int]]
    sampling: Sampling
    seeds: list[int] | None


@dataclass(frozen=True)
class _NewWeights:
    version: int


@dataclass(frozen=True)
class _Entry:
    """A tensor of a bucket: the next elements of its bytes."""

    name: str
    shape: torch.Size
    dtype: torch.dtype


class Bridge:
    """The way between the processes that train and those that generate. Every process makes it, at the same time."""

    def __init__(self, layout: Layout, device: torch.device):
        self.layout, self.device = layout, device
        self.sender = layout.training[0]
        self.weights_group = dist.new_group([self.sender, *layout.rollout], timeout=processes.TIMEOUT)

    @property
    def trains(self) -> bool:
        """Whether this process is one of those that train."""
        return dist.get_rank() in self.layout.training

    def exchange(self, value: object) -> list[Any]:
        """Every process's value, by rank.

        Raises:
            UserError: on all processes, one that a process gave for its value.
        """
        values: list[Any] = [None] * dist.get_world_size()
        try:
            dist.all_gather_object(values, value)
        except RuntimeError as error:
            raise UserError("another process has ended", where="mapping", fix=f"look at what it said; {error}") from error
        for found in values:
            if isinstance(found, UserError):
                raise found
        return values

    def send(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Weights, from the process that sends; the others that train only help to gather them."""
        for bucket in _buckets(named_tensors):
            if dist.get_rank() == self.sender:
                self._broadcast([_Entry(name, tensor.shape, tensor.dtype) for name, tensor in bucket])
                dist.broadcast(_bytes(bucket).to(self.device), self.sender, group=self.weights_group)
        if dist.get_rank() == self.sender:
            self._broadcast(None)

    def received(self) -> Iterator[tuple[str, Tensor]]:
        """The weights that are sent, on this process's device."""
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
    """The `Rollout` of a process that trains. Every such process makes the same calls in the same order."""

    def __init__(self, bridge: Bridge):
        self._bridge = bridge
        answers = bridge.exchange(None)
        self.stop_ids, self.positions, self._device = answers[bridge.layout.rollout[0]]

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int] | None = None) -> list[Completion]:
        """See `Rollout.generate`."""
        numbers = None if seeds is None else list(seeds)
        self._bridge.exchange(_Questions([list(prompt) for prompt in prompts], sampling, numbers))
        answers = self._bridge.exchange(None)
        mine: dict[int, list[Completion]] = {}
        for rank in self._bridge.layout.rollout:
            mine |= answers[rank].get(dist.get_rank(), {})
        return [completion for number in range(len(prompts)) for completion in mine[number]]

    def stream(
        self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int] | None = None
    ) -> Iterator[list[tuple[int, Completion]]]:
        """See `Rollout.stream`; all of them come at once."""
        yield list(enumerate(self.generate(prompts, sampling, seeds)))

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See `Rollout.update_weights`."""
        self._bridge.exchange(_NewWeights(version))
        self._bridge.send(named_tensors)

    def sleep(self) -> None:
        """Nothing: the others have their memory to themselves."""

    def wake(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Let the others end."""
        self._bridge.exchange(None)

    def describe(self) -> str:
        return f"{self._device} × {len(self._bridge.layout.rollout)}"


def divide(layout: Layout, device: torch.device) -> Bridge | None:
    """Let the processes work in two parts where the rollout has ranks of its own. Every process calls it."""
    if not layout.is_split:
        return None
    bridge = Bridge(layout, device)
    processes.divide([layout.training, layout.rollout])
    return bridge


def generate_for_others(config: PPOConfig, bridge: Bridge, tokenizer: PreTrainedTokenizerBase) -> None:
    """What a process does that only generates.

    Raises:
        UserError: the model cannot be loaded, or another process says what is wrong.
    """
    path, stop_ids, options = config.model.partial_pretrain, Renderer(tokenizer).stop_ids, rollout_options(config)
    with first_signals_ignored():  # those that train end their step with these answers, and then this process
        serve(bridge, lambda: load_rollout(config.rollout.name, path, tokenizer, stop_ids, options))


def rollout_options(config: PPOConfig) -> Options:
    return Options(
        max_sequences=config.rollout.max_sequences,
        max_positions=longest_sample(config),
        url=config.rollout.url,
        weights_folder=config.rollout.weights_folder,
        gpu_memory_utilization=config.rollout.gpu_memory_utilization,
        trust_remote_code=config.model.trust_remote_code,
    )


def serve(bridge: Bridge, load: Callable[[], Rollout]) -> None:
    """What a process that generates does until those that train are done."""
    rollout: Rollout = _told(bridge, load)
    bridge.exchange((rollout.stop_ids, rollout.positions, rollout.describe()))
    while (order := bridge.exchange(None))[bridge.sender] is not None:
        if isinstance(order[bridge.sender], _NewWeights):
            rollout.update_weights(bridge.received(), order[bridge.sender].version)
        else:
            bridge.exchange(_told(bridge, partial(_answers, rollout, bridge, order)))
    rollout.close()


def _told(bridge: Bridge, work: Callable[[], Any]) -> Any:
    """What the work gives. An error of it is handed to all processes in the place of what they wait for."""
    try:
        return work()
    except UserError as error:
        bridge.exchange(error)
        raise


def _answers(rollout: Rollout, bridge: Bridge, orders: list[Any]) -> dict[int, dict[int, list[Completion]]]:
    """This process's share of all prompts, answered: by rank that asked and number of its prompt."""
    place, ranks = bridge.layout.rollout.index(dist.get_rank()), bridge.layout.training
    asked = [(rank, number) for rank in ranks for number in range(len(orders[rank].prompts))][place :: len(bridge.layout.rollout)]
    found: dict[int, dict[int, list[Completion]]] = {}
    for rank, entries in groupby(asked, key=lambda entry: entry[0]):
        numbers, order = [number for _, number in entries], orders[rank]
        seeds = numbers if order.seeds is None else [order.seeds[number] for number in numbers]
        done = rollout.generate([order.prompts[number] for number in numbers], order.sampling, seeds)
        n = order.sampling.n
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
