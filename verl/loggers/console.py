"""One plain line per step, for the terminal and train.log."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from verl.run import Run

# Metrics of a line, in this order, and their formats.
_SHOWN = {
    "rl/reward": "reward {:.3f}",
    "rl/response_tokens": "{:.0f} tokens/answer",
    "rl/entropy": "entropy {:.3f}",
    "train/loss": "loss {:.4f}",
    "train/lr": "lr {:.2e}",
    "train/grad_norm": "grad norm {:.3f}",
    "perf/tokens_per_second": "{:,.0f} tok/s",
    "perf/peak_memory_gib": "{:.1f} GiB",
}
# Metrics that are only in metrics.jsonl.
_NOT_SHOWN = ("epoch", "train/", "perf/", "rl/", "critic/", "reward/")


class Console:
    def __init__(self, run: Run):
        self._run = run
        self._first: tuple[int, float] | None = None

    def log(self, step: int, metrics: dict[str, float]) -> None:
        parts = [f"step {step}/{self._run.total_steps}"]
        parts += [shown.format(metrics[name]) for name, shown in _SHOWN.items() if name in metrics]
        parts += [f"{name} {value:.4g}" for name, value in metrics.items() if not name.startswith(_NOT_SHOWN)]
        self._run.line(" · ".join([*parts, *self._time_left(step)]))

    def finish(self) -> None:
        """Do nothing: no file is open."""

    def _time_left(self, step: int) -> list[str]:
        """Estimate the time left, from the second line on: the first step also warms up and is not typical."""
        now = time.monotonic()
        if self._first is None:
            self._first = (step, now)
            return []
        first_step, since = self._first
        seconds_per_step = (now - since) / max(1, step - first_step)
        return [f"eta {_clock(seconds_per_step * (self._run.total_steps - step))}"]


def start(run: Run) -> Console:
    return Console(run)


def _clock(seconds: float) -> str:
    """Format seconds as `1:23`, or as `2:01:23` from an hour on."""
    minutes, second = divmod(max(0, round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
