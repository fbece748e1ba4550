"""Where the time of a step goes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PHASES = ("generate", "score", "logprobs", "values", "update_critic", "update_actor", "update_rollout", "validate", "save")


class Clock:
    """Seconds of each phase of a step."""

    def __init__(self, device: torch.device):
        self._device = device
        self.start()

    def start(self) -> None:
        """A step begins here."""
        self.seconds: dict[str, float] = {}
        self._since = self._now()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The time that is spent in here is the phase's, one of PHASES."""
        since = self._now()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + self._now() - since

    def total(self) -> float:
        """Seconds since the step began, without validating and saving."""
        return self._now() - self._since - self.seconds.get("validate", 0.0) - self.seconds.get("save", 0.0)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
