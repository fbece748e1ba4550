"""Time of each phase of a step."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PHASES = ("generate", "score", "logprobs", "values", "update_critic", "update_actor", "update_rollout", "validate")


class Clock:
    """Measures the seconds of each phase of a step. On a GPU, it synchronizes at both ends of a phase."""

    def __init__(self, device: torch.device):
        self._device = device
        self.start()

    def start(self) -> None:
        """Start a step."""
        self.seconds: dict[str, float] = {}
        self._since = self._now()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent in this context to a phase, one of PHASES."""
        since = self._now()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + self._now() - since

    def total(self) -> float:
        """Return the seconds since the step began, without validation."""
        return self._now() - self._since - self.seconds.get("validate", 0.0)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
