"""The CPU cores that a run takes where it computes on the CPU: those that it may use, and that other processes leave free.

Threads that wait for a core hold up those that have one, so that a run with a thread for each of two busy cores nearly stands still.
"""

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

SAMPLE_SECONDS = 0.5  # in which idle cores are counted
STARVED, SECONDS_BETWEEN_LOOKS = 0.4, 30.0  # share of the time that the main thread waits for a core
CGROUPS = Path("/sys/fs/cgroup")
STAT, SCHEDULED = Path("/proc/stat"), Path("/proc/self/schedstat")
STATE, THREADS = "trainer_state.json", "threads"


def usable() -> int:
    """Return the number of cores that this process may use: its affinity, and the CPU quota of its container."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota()
    return max(1, min(allowed, math.ceil(quota) if quota is not None else allowed))


def _quota() -> float | None:
    """Return the cores that the container may use at a time (cgroup 2, or else 1); None: no limit."""
    try:
        limit, period = (CGROUPS / "cpu.max").read_text().split()
        return None if limit == "max" else int(limit) / int(period)
    except (OSError, ValueError):
        pass
    try:
        limit, period = ((CGROUPS / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return None if int(limit) <= 0 else int(limit) / int(period)
    except (OSError, ValueError):
        return None


def idle() -> float | None:
    """Return how many of the cores that this process may use are idle, now and not in the last minute; None: it is not known."""
    before, since = _idle_seconds(), time.perf_counter()
    if before is None:
        return None
    time.sleep(SAMPLE_SECONDS)
    after = _idle_seconds()
    return None if after is None else (after - before) / (time.perf_counter() - since)


def _idle_seconds() -> float | None:
    """Return the idle time of the cores that this process may use, since the start of the machine."""
    try:
        allowed = {f"cpu{number}" for number in os.sched_getaffinity(0)}
        lines = [line.split() for line in STAT.read_text().splitlines()]
        return sum(int(words[4]) + int(words[5]) for words in lines if words and words[0] in allowed) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return None


def choose_threads() -> tuple[int, str | None]:
    """Return the number of threads to compute with, and what to say about it if it is fewer than there are cores."""
    cores, free = usable(), idle()
    if free is None:
        free = max(0.0, (os.cpu_count() or 1) - os.getloadavg()[0])
    threads = max(1, min(cores, round(free)))
    if threads == cores:
        return threads, None
    busy = min(float(cores), max(0.0, cores - free))
    kept = f"other processes keep {busy:.1f} of {cores} cores busy" if cores > 1 else "other processes keep the only core busy"
    taken = f"{threads} thread{'s' if threads > 1 else ''}"
    return threads, f"{kept}: computing with {taken}; set OMP_NUM_THREADS for another number"


def take(say: Callable[[str], None], directory: Path | None = None) -> None:
    """Compute with as many threads as cores are free, unless OMP_NUM_THREADS decides.

    Args:
        say: prints a line.
        directory: of a run that resumes. It keeps its number of threads, because sums in another order would be rounded otherwise.
    """
    import torch

    if torch.cuda.is_available() or os.environ.get("OMP_NUM_THREADS"):
        return
    kept = None if directory is None else _kept(directory)
    threads, text = (kept, None) if kept is not None else choose_threads()
    torch.set_num_threads(threads)
    if text is not None:
        say(text)


def _kept(directory: Path) -> int | None:
    """Return the number of threads that the run in a directory has computed with, if this machine has as many cores."""
    try:
        threads = json.loads((directory / STATE).read_text(encoding="utf-8"))[THREADS]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return threads if isinstance(threads, int) and 1 <= threads <= usable() else None


class Starvation:
    """Sees whether this process waits for a core most of the time."""

    def __init__(self) -> None:
        self._waited, self._since = _waited(), time.monotonic()

    def look(self) -> str | None:
        """Return what to say, at most once in half a minute."""
        now = time.monotonic()
        if self._waited is None or now - self._since < SECONDS_BETWEEN_LOOKS:
            return None
        waited = _waited()
        share = 0.0 if waited is None else (waited - self._waited) / (now - self._since)
        self._waited, self._since = waited, now
        if share < STARVED:
            return None
        load = f" (load {os.getloadavg()[0]:.1f} on {os.cpu_count()} core{'s' if (os.cpu_count() or 1) > 1 else ''})"
        return f"this run waits for a core {min(share, 1.0):.0%} of the time, because others use them{load}; it goes on, more slowly"


def _waited() -> float | None:
    """Return the seconds for which the main thread was ready to run, and had no core; None: the system does not say."""
    try:
        return int(SCHEDULED.read_text().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return None
