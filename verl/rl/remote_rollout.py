"""A rollout on its own processes: it receives prompts, returns answers, and receives new weights by name, in buckets.

Training processes use a `RemoteRollout`; the others serve it (`verl.rl.rollout_server`). All training processes send the same kinds of
messages in the same order.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from verl import dist as processes
from verl import signals
from verl.config.ppo import PPOConfig, longest_sample
from verl.errors import AbandonedError
from verl.rl.bridge import Begin, Bridge, Finish, NewWeights, Request, share_of
from verl.rl.mapping import Layout
from verl.rl.schedule import Schedule
from verl.rollout import Completion, Options, Sampling


class RemoteRollout:
    """The `Rollout` of a training process. All training processes make the same calls in the same order.

    Attributes:
        version: version of the weights that the rollout has.
        schedule: is told what the rollout processes do; None: nobody asks.
    """

    def __init__(self, bridge: Bridge):
        self._bridge, self._is_open = bridge, True
        self._begun: int | None = None  # number of prompts whose answers were begun and not fetched
        self.version = 0
        self.schedule: Schedule | None = None
        answers = bridge.exchange(None)
        self.stop_ids, self.positions, self._device = answers[bridge.layout.rollout[0]]

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int] | None = None) -> list[Completion]:
        """See `Rollout.generate`."""
        self._ask(_request(prompts, sampling, seeds), "answered")
        return self._answers(len(prompts))

    def begin(self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int]) -> None:
        """Begin to generate. `finish` returns the answers; until then, no other method may be called."""
        self._ask(Begin(_request(prompts, sampling, seeds)), "drawn")
        self._begun = len(prompts)

    def finish(self) -> list[Completion]:
        """Wait for the answers that were begun, and return them as `generate` does."""
        assert self._begun is not None
        number, self._begun = self._begun, None
        self._bridge.exchange(Finish())
        return self._answers(number)

    def _ask(self, message: Request | Begin, event: str) -> None:
        messages = self._bridge.exchange(message)
        if self.schedule is not None:
            layout = self._bridge.layout
            requests = {rank: found.request if isinstance(found := messages[rank], Begin) else found for rank in layout.training}
            self.schedule.note(
                {"rank": rank, "event": event, "version": self.version, "prompts": _seeds(requests, share_of(layout, requests, rank))}
                for rank in layout.rollout
            )

    def _answers(self, prompts: int) -> list[Completion]:
        """Receive the answers to the prompts of this process."""
        try:
            with signals.held():  # the rollout processes give up, and tell all
                answers = self._bridge.exchange(None)
        except AbandonedError:
            self._is_open = False  # they end
            raise
        mine: dict[int, list[Completion]] = {}
        for rank in self._bridge.layout.rollout:
            mine |= answers[rank].get(dist.get_rank(), {})
        return [completion for number in range(prompts) for completion in mine[number]]

    def stream(
        self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int] | None = None
    ) -> Iterator[list[tuple[int, Completion]]]:
        """See `Rollout.stream`; yields all answers at once."""
        yield list(enumerate(self.generate(prompts, sampling, seeds)))

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See `Rollout.update_weights`."""
        self._bridge.exchange(NewWeights(version))
        self._bridge.send(named_tensors)
        self.version = version
        if self.schedule is not None:
            self.schedule.note({"rank": rank, "event": "weights", "version": version} for rank in self._bridge.layout.rollout)

    def sleep(self) -> None:
        """Do nothing: the rollout processes have GPUs of their own."""

    def wake(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Let the rollout processes end. Answers that were begun are waited for."""
        if self._is_open:
            if self._begun is not None:
                self.finish()
            self._bridge.exchange(None)

    def describe(self) -> str:
        return f"{self._device} × {len(self._bridge.layout.rollout)}"


def _request(prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int] | None) -> Request:
    return Request([list(prompt) for prompt in prompts], sampling, None if seeds is None else list(seeds))


def _seeds(requests: dict[int, Request], share: list[tuple[int, int]]) -> list[int]:
    """Return the seeds of prompts, which in training are their numbers."""
    return [number if (seeds := requests[rank].seeds) is None else seeds[number] for rank, number in share]


def divide(layout: Layout, device: torch.device) -> Bridge | None:
    """Split the processes into training and rollout processes if the rollout has its own ranks. Every process calls it."""
    if not layout.is_split:
        return None
    bridge = Bridge(layout, device)
    processes.divide([layout.training, layout.rollout])
    return bridge


def rollout_options(config: PPOConfig) -> Options:
    return Options(
        max_sequences=config.rollout.max_sequences,
        max_positions=longest_sample(config),
        url=config.rollout.url,
        weights_folder=config.rollout.weights_folder,
        gpu_memory_utilization=config.rollout.gpu_memory_utilization,
        trust_remote_code=config.model.trust_remote_code,
    )
