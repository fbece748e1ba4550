"""What a run's panel shows: step, loss and its curve, validation, speed, memory, time left, and what it does or waits for."""

import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from verl import signals
from verl.config.best import mode_of
from verl.cores import Starvation
from verl.directory import COMMANDS
from verl.pace import Pace, clock
from verl.panel import Panel, curve, filled

CURVES = ("rl/reward", "train/loss")  # metrics that get a curve
MOST_KEPT = 1024  # values of a curve; beyond, each two become their mean
MOST_VALIDATED = 3  # metrics of the validation that are shown
SECONDS_BEFORE_TOLD = 3.0  # for which something is done, before the panel says for how long


class Shown(Protocol):
    """What is shown of a `verl.run.Run`."""

    settings: Any
    config: dict[str, Any]
    directory: Path
    total_steps: int
    step: int
    start_step: int
    checkpoint: Path | None

    def line(self, text: str, kind: str) -> None: ...


class History:
    """The values of a metric, in as much detail as a curve shows."""

    def __init__(self) -> None:
        self.first: tuple[int, float] | None = None  # step and value
        self.last = 0.0
        self.values: list[float] = []
        self._each, self._sum, self._count = 1, 0.0, 0

    def add(self, step: int, value: float) -> None:
        self.first = self.first or (step, value)
        self.last = value
        self._sum, self._count = self._sum + value, self._count + 1
        if self._count == self._each:
            self.values.append(self._sum / self._count)
            self._sum, self._count = 0.0, 0
        if len(self.values) == MOST_KEPT:
            self.values = [(one + other) / 2 for one, other in zip(self.values[::2], self.values[1::2], strict=True)]
            self._each *= 2


class RunView:
    """The panel of a run. Its methods are called by the run; a thread draws.

    Args:
        start_step: optimizer steps that are done already.
    """

    def __init__(self, run: Shown, console: Console, start_step: int):
        self._run, self._pace, self._metrics = run, Pace(), dict[str, float]()
        self._step = start_step
        self._left: float | None = None
        self._histories = {name: History() for name in CURVES}
        self._validated: dict[str, tuple[int, float]] = {}  # by metric: the step and the value
        self._best: dict[str, tuple[int, float]] = {}
        self._starvation = Starvation()
        self._wait, self._is_over = "", False
        self._doing: tuple[str, int] | None = None
        self._since = time.monotonic()
        self._panel = Panel(self._lines, f"{COMMANDS.get(type(run.settings).__name__, 'verl')} · {run.directory}", console)

    @property
    def is_drawn(self) -> bool:
        """Whether a panel shows the run, so that lines of steps need not be printed."""
        return self._panel.is_drawn

    def start(self) -> None:
        """Start to draw."""
        self._panel.start()

    def stop(self) -> None:
        """Leave the panel as it is now, without what was being done."""
        self._is_over = True
        self._panel.stop()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Note a step's metrics."""
        if (text := self._starvation.look()) is not None:
            self._run.line(text, "starved")
        if not self.is_drawn:
            return
        self._step, self._metrics = step, {**self._metrics, **metrics}
        self._left = self._pace.left(step, self._run.total_steps)
        for name, history in self._histories.items():
            if name in metrics:
                history.add(step, metrics[name])
        for name, value in metrics.items():
            if name.startswith("val/"):
                self._validated[name] = (step, value)
                mode = mode_of(name)
                if mode and (name not in self._best or (value < self._best[name][1] if mode == "min" else value > self._best[name][1])):
                    self._best[name] = (step, value)
        self._panel.changed()

    def waiting(self, text: str | None) -> None:
        """Say what is waited for; None: nothing any more."""
        self._wait = text or ""
        self._panel.changed()

    def _lines(self, width: int, ascii_only: bool) -> list[str]:
        of_metrics = [*self._curves(width, ascii_only), *self._validation(), *self._speed(width)]
        lines = [self._progress(width, ascii_only), *of_metrics, self._state()]
        return [line.replace(" · ", " | ") if ascii_only else line for line in lines if line]

    def _progress(self, width: int, ascii_only: bool) -> str:
        total = self._run.total_steps
        share = self._step / total if total else 0.0
        left = "" if self._left is None else f" · {clock(self._left)} left"
        before, after = f"step {self._step:,}/{total:,} ", f" {share:.0%}{left}"
        room = min(40, width - len(before) - len(after))
        return before + (filled(share, room, ascii_only=ascii_only) if room >= 8 else "·") + after

    def _curves(self, width: int, ascii_only: bool) -> Iterator[str]:
        for name, history in self._histories.items():
            if history.first is not None:
                step, first = history.first
                text = f"{name} {history.last:.4f}" + (f" ({first:.4f} at step {step:,})" if step != self._step else "")
                room = min(60, width - len(text) - 2)
                yield f"{text}  {curve(history.values, room, ascii_only=ascii_only)}" if room >= 4 else text

    def _validation(self) -> list[str]:
        names = list(self._validated)[:MOST_VALIDATED]
        return [" · ".join(self._of_validation(name) for name in names)] if names else []

    def _of_validation(self, name: str) -> str:
        (step, value), (best_step, best) = self._validated[name], self._best.get(name, (0, 0.0))
        text = f"{name} {value:.4g} at step {step:,}"
        return f"{text} (best {best:.4g} at step {best_step:,})" if best_step not in (0, step) else text

    def _speed(self, width: int) -> list[str]:
        metrics = self._metrics
        parts = [f"{metrics[name]:,.0f} tokens/s" for name in ("perf/tokens_per_second",) if name in metrics]
        parts += [f"waits {metrics[name]:.0%}" for name in ("perf/waiting_share",) if name in metrics]
        peak = metrics.get("perf/peak_memory_gib")
        parts.append(f"{peak:.1f} GiB of GPU memory" if peak is not None else f"{_host_gib():.1f} GiB of memory")
        rates = (("perf/mfu_of_measured", "the measured matrix rate"), ("perf/mfu", "the data sheet's"))
        of = [f"{metrics[name]:.1%} of {rate}" for name, rate in rates if name in metrics]
        lines = [" · ".join(parts), *([f"MFU {', '.join(of)}"] if of else [])]
        whole = " · ".join(lines)
        return [whole] if len(whole) <= width else lines

    def _state(self) -> str:
        phase, step, _, _ = signals.place()
        now = time.monotonic()
        if (phase, step) != self._doing:
            self._doing, self._since = (phase, step), now
        seconds = now - self._since
        doing = self._wait or signals.where() + (f", for {clock(seconds)}" if seconds >= SECONDS_BEFORE_TOLD else "")
        doing = "" if self._is_over else doing
        saved = f"newest checkpoint {self._run.checkpoint.name}" if self._run.checkpoint is not None else ""
        return " · ".join(part for part in (doing, saved) if part)


def _host_gib() -> float:
    """Return the most memory that this process has used."""
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
