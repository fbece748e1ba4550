"""A rollout on its own processes: it receives prompts, returns answers, and receives new weights by name, in buckets.

Training processes use a `RemoteRollout`; the others serve it (`verl.rl.rollout_server`). All training processes send the same kinds of
messages in the same order.
"""

import signal
import time
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from verl import dist as processes
from verl import signals
from verl.config.ppo import PPOConfig, longest_sample
from verl.errors import AbandonedError
from verl.rl.bridge import Answers, Begin, Bridge, Cut, Finish, NewWeights, Replay, Request, prompts_of
from verl.rl.mapping import Layout
from verl.rl.schedule import Event, Schedule, event_of
from verl.rollout import Completion, Options, Sampling

SIGNAL_SECONDS = 3.0


class RemoteRollout:
    """The `Rollout` of a training process. All training processes make the same calls in the same order.

    Attributes:
        is_collective: see `verl.rollout.live.Live`.
        version: version of the weights that the rollout has.
        schedule: is told what the rollout processes do; None: nobody asks.
    """

    is_collective = True

    def __init__(self, bridge: Bridge, *, is_partial: bool = False):
        self._bridge, self._is_partial, self._is_open = bridge, is_partial, True
        self._begun: list[int] = []  # numbers of prompts of each `begin` whose answers were not fetched
        self._finished = 0  # number of calls of `finish`
        self.version = 0
        self.schedule: Schedule | None = None
        answers = bridge.exchange(None)
        self.stop_ids, self.positions, self._device = answers[bridge.layout.rollout[0]]

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int] | None = None) -> list[Completion]:
        """See `Rollout.generate`. Raises AbandonedError: a signal came."""
        with signals.held():  # the rollout processes give up, and tell all
            self._send(_request(prompts, sampling, seeds))
            return self._answers(len(prompts))

    def begin(
        self,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        so_far: dict[int, list[Completion]] | None = None,
        *,
        is_again: bool = False,
    ) -> None:
        """Begin to generate. `finish` returns the answers. Unless the rollout is partial, no other method may be called until then.

        Args:
            so_far, is_again: see `verl.rl.bridge.Begin`.
        """
        self._send(Begin(_request(prompts, sampling, seeds), so_far or {}, is_again))
        self._begun.append(len(prompts))

    def finish(self) -> list[Completion]:
        """Wait for the answers that were begun first, and return them as `generate` does.

        Raises:
            AbandonedError: the rollout is partial, and a signal came; the answers go on.
        """
        if self._is_partial:
            self._bridge.wait_for(self._finished)
        self._send(Finish())
        self._finished += 1
        return self._answers(self._begun.pop(0))

    def cut(self) -> list[list[Completion]]:
        """Return, of each `begin` in order, what its answers have so far. The rollout is partial; the answers go on."""
        self._send(Cut())
        parts = self._bridge.exchange(None)
        of_rollout = [parts[rank] for rank in self._bridge.layout.rollout]
        return [self._mine([part[number] for part in of_rollout], prompts) for number, prompts in enumerate(self._begun)]

    def replay(self, events: list[Event]) -> None:
        """Let the rollout, which is partial, do what it did in another run. `events` are those that follow, on the first rank."""
        self._send(Replay(events))

    def _send(self, message: object) -> None:
        if self._is_partial:
            self._bridge.call()
        messages = self._bridge.exchange(message)
        name, layout = event_of(message), self._bridge.layout
        if self.schedule is None or name is None:
            return
        prompts = {rank: prompts_of(layout, messages, rank) for rank in layout.rollout}
        version = message.version if isinstance(message, NewWeights) else self.version
        self.schedule.note(
            {
                "rank": rank,
                "event": name,
                "version": version,
                **({"decode_steps": messages[rank]} if self._is_partial else {}),
                **({} if prompts[rank] is None else {"prompts": prompts[rank]}),
            }
            for rank in layout.rollout
        )

    def _answers(self, prompts: int) -> list[Completion]:
        """Receive the answers to the prompts of this process."""
        ranks = self._bridge.layout.rollout
        try:
            answers = self._bridge.exchange(None)
        except AbandonedError:
            self._is_open = False  # they end
            _learn_of_signal()
            raise
        if any(answers[rank] is None for rank in ranks):
            _learn_of_signal()
            raise AbandonedError("given up, because the run stops")
        return self._mine([answers[rank] for rank in ranks], prompts)

    def _mine(self, of_rollout: list[Answers], prompts: int) -> list[Completion]:
        """Return this process's answers in the order of its prompts."""
        mine: dict[int, list[Completion]] = {}
        for answers in of_rollout:
            mine |= answers.get(dist.get_rank(), {})
        return [completion for number in range(prompts) for completion in mine[number]]

    def stream(
        self, prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int] | None = None
    ) -> Iterator[list[tuple[int, Completion]]]:
        """See `Rollout.stream`; yields all answers at once."""
        yield list(enumerate(self.generate(prompts, sampling, seeds)))

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See `Rollout.update_weights`."""
        self._send(NewWeights(version))
        self._bridge.send(named_tensors)
        self.version = version

    def sleep(self) -> None:
        """Do nothing: the rollout processes have GPUs of their own."""

    def wake(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Let the rollout processes end. Answers that were begun are waited for, unless the rollout is partial."""
        if self._is_open:
            while self._begun and not self._is_partial:
                self.finish()
            self._send(None)

    def describe(self) -> str:
        return f"{self._device} × {len(self._bridge.layout.rollout)}"


def _request(prompts: Sequence[list[int]], sampling: Sampling, seeds: Sequence[int] | None) -> Request:
    return Request([list(prompt) for prompt in prompts], sampling, None if seeds is None else list(seeds))


def _learn_of_signal() -> None:
    """Wait until this process knows of the signal for which a rollout process has given up: `verl.peers` passes it on within seconds."""
    deadline = time.monotonic() + SIGNAL_SECONDS
    while signals.received() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    if signals.received() is None:
        signals.request(signal.SIGTERM)


def divide(layout: Layout, device: torch.device) -> Bridge | None:
    """Split the processes into training and rollout processes if the rollout has its own ranks. Every process calls it."""
    if not layout.is_split:
        return None
    bridge = Bridge(layout, device)
    processes.divide([layout.training, layout.rollout])
    return bridge


def dismiss(bridge: Bridge | None) -> None:
    """Let the rollout processes end, if there are any: there is nothing to do. Every training process calls it."""
    if bridge is not None:
        RemoteRollout(bridge).close()


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
