"""Time of each phase of a step, and how much of it this rank waits."""

import time
from collections.abc import Container, Iterator
from contextlib import contextmanager

import torch

from verl import exchange

PHASES = ("generate", "score", "logprobs", "values", "update_critic", "update_actor", "update_rollout", "validate")


class Clock:
    """Measures the seconds of each phase of a step. On a GPU, it synchronizes at both ends of a phase.

    A rank waits from the end of its own work until all ranks have sent what it needs. Nothing is exchanged to measure it: how long messages
    on the CPU are waited for is known, and so it is of averages of gradients (`gradients`). With fsdp2, ranks also wait in each layer's
    exchange of weights, which cannot be told from the exchange itself and is not counted.

    Args:
        idle: phases in which the device has no work, so that all of their time counts as waiting.
        rollout_apart: whether the rollout has ranks of its own.
    """

    def __init__(self, device: torch.device, *, idle: Container[str] = (), rollout_apart: bool = False):
        self._device, self._idle, self._rollout_apart = device, idle, rollout_apart
        self.start()

    def start(self) -> None:
        """Start a step."""
        self.seconds: dict[str, float] = {}
        self._waited: dict[str, float] = {}
        self._averages: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._averaged, self._first = 0.0, exchange.waited
        self._since = self._now()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent in this context to a phase, one of PHASES."""
        since, waited = self._now(), exchange.waited
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + self._now() - since
        self._waited[name] = self._waited.get(name, 0.0) + exchange.waited - waited

    @contextmanager
    def gradients(self) -> Iterator[None]:
        """Count this context, in which gradients are averaged over ranks, as waiting. No device is synchronized."""
        if self._device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._averages.append((begin, end))
        else:
            since = time.perf_counter()
            yield
            self._averaged += time.perf_counter() - since

    def total(self) -> float:
        """Return the seconds since the step began, without validation."""
        return self._now() - self._since - self.seconds.get("validate", 0.0)

    def waiting(self) -> dict[str, float]:
        """Return the seconds of the step that this rank has waited, by what was done: answers generated, answers scored, or the rest."""
        measured = {name: self._waited.get(name, 0.0) for name in ("generate", "score", "validate")}
        self._now()  # so that all events have happened
        averaged = self._averaged + sum(begin.elapsed_time(end) for begin, end in self._averages) / 1000
        update = exchange.waited - self._first - sum(measured.values()) + averaged
        found = {"generate": measured["generate"], "score": measured["score"], "update": update}
        return {name: self.seconds.get(name, 0.0) if name in self._idle else seconds for name, seconds in found.items()}

    def waiting_of_rollout(self) -> float | None:
        """Return the seconds of the step in which the rollout's own ranks neither generate nor take weights; None if it has none."""
        working = sum(self.seconds.get(name, 0.0) for name in ("generate", "update_rollout"))
        return max(0.0, self.total() - working) if self._rollout_apart else None

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
