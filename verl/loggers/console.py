"""One plain line per step: all in train.log, and some on a terminal without a panel."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from verl.pace import Pace, clock

if TYPE_CHECKING:
    from verl.run import Run

# Metrics of a line, in this order, and their formats.
_SHOWN = {
    "rl/reward": "rl/reward {:.3f}",
    "rl/response_tokens": "{:.0f} tokens/answer",
    "rl/entropy": "entropy {:.3f}",
    "rl/divergence": "divergence {:.3f}",
    "train/divergence": "divergence {:.3f}",
    "train/loss": "train/loss {:.4f}",
    "train/lr": "lr {:.2e}",
    "train/grad_norm": "grad norm {:.3f}",
    "perf/tokens_per_second": "{:,.0f} tok/s",
    "perf/waiting_share": "waits {:.0%}",
    "perf/peak_memory_gib": "{:.1f} GiB",
}
_MINUS_ZERO = re.compile(r"-(0\.0+)(?![0-9])")  # what rounding makes of a very small negative number
# Metrics that are only in metrics.jsonl.
_NOT_SHOWN = ("epoch", "train/", "perf/", "rl/", "critic/", "reward/", "environment/", "val/environment/")


class Console:
    def __init__(self, run: Run):
        self._run, self._pace = run, Pace()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        parts = [f"step {step}/{self._run.total_steps}"]
        parts += [_MINUS_ZERO.sub(r"\1", shown.format(metrics[name])) for name, shown in _SHOWN.items() if name in metrics]
        parts += [f"{name} {value:.4g}" for name, value in metrics.items() if not name.startswith(_NOT_SHOWN)]
        left = self._pace.left(step, self._run.total_steps)
        parts += [] if left is None else [f"eta {clock(left)}"]
        self._run.line(" · ".join(parts), is_last=step == self._run.total_steps)

    def finish(self) -> None:
        """Do nothing: no file is open."""


def start(run: Run) -> Console:
    return Console(run)
