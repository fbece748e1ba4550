"""The time limit of a run, `trainer.max_seconds`: when it must end so that a checkpoint is written before the limit.

A run ends when the time that is left is shorter than a step and a save, as they were measured, with a margin. The time counts from the
start of the process, or of its launcher.
"""

import os
import sys
import time
from collections import deque
from pathlib import Path

STARTED = "VERL_STARTED"  # variable of a trainer: the time at which its launcher has started, in seconds since 1970
BYTES_PER_SECOND = 0.5e9  # assumed for the first save
MARGIN, MARGIN_SECONDS = 1.1, 4.0  # of the time of a step and a save; for the end of the process on a busy machine
RECENT = 8  # steps that tell how long the next one may take
PAUSES = ("validating", "answering sample rows", "saving")  # phases that are no part of a step


class Deadline:
    """Decides when a run must end.

    Args:
        seconds: time limit.
        started: when the time has begun, in seconds since 1970.
        save_bytes: size of a checkpoint.
    """

    def __init__(self, seconds: float, started: float, save_bytes: float):
        self._left_at = time.monotonic() + seconds - (time.time() - started)
        self._save_seconds = save_bytes / BYTES_PER_SECOND
        self._steps: deque[float] = deque(maxlen=RECENT)
        self._phase, self._since, self._step, self._of_step = "", time.monotonic(), 0, 0.0

    def enter(self, phase: str, step: int) -> None:
        """Note the time of the phase that ends now; see `verl.signals.enter`."""
        now = time.monotonic()
        if self._phase == "saving":
            self._save_seconds = max(self._save_seconds if self._has_saved else 0.0, now - self._since)
            self._has_saved = True
        elif self._phase not in PAUSES and self._step:
            self._of_step += now - self._since
        if step != self._step:
            if self._step:
                self._steps.append(self._of_step)
            self._of_step = 0.0
        self._phase, self._step, self._since = phase, step, now

    _has_saved = False

    def is_near(self) -> bool:
        """Return whether the next step and a save may end after the limit."""
        now = time.monotonic()
        current = self._of_step + (0.0 if self._phase in PAUSES else now - self._since)
        needed = MARGIN * (max([*self._steps, current]) + self._save_seconds) + MARGIN_SECONDS
        return now + needed > self._left_at


def started() -> float:
    """Return when this process, or its launcher, has started, in seconds since 1970; of a program that is no command, now."""
    if STARTED in os.environ:
        return float(os.environ[STARTED])
    if sys.platform != "linux":
        return time.time()
    ticks = float(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
