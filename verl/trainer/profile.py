"""Profiling: a trace of a few steps, and the share of their time in which the GPU was busy.

    verl sft … trainer.profile_step=20

traces steps 20 to 22 and writes two files per rank into `profile/` of the run's directory: `step_20_rank_R.json.gz`, for Perfetto and
chrome://tracing, and `step_20_rank_R.txt`, a table of the kernels that took the most time.
"""

import gzip
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

from verl import dist
from verl.run import Run

Step = TypeVar("Step")

STEPS = 3  # traced steps: several, so that the trace shows the gaps between them
ROWS = 30  # rows of the table
DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")  # trace categories of work on the GPU


@dataclass(frozen=True)
class Item:
    """A kernel on the GPU, or an operator on the CPU.

    Attributes:
        milliseconds: total time of all calls; for an operator, without the operators that it calls.
        count: number of calls.
    """

    name: str
    milliseconds: float
    count: int


@dataclass(frozen=True)
class Profile:
    """Summary of a trace.

    Attributes:
        seconds: time from the start of the first step to the end of the last one, by the host's clock.
        busy_share: share of that time in which at least one kernel, copy or fill ran on the GPU; None without a GPU.
        items: kernels or operators, in descending order of time.
    """

    seconds: float
    busy_share: float | None
    items: list[Item]

    def describe(self, first_step: int, steps: int) -> str:
        """Return one line, such as `profile of steps 20-22: 391 ms per step, GPU busy 97.6%`."""
        busy = "" if self.busy_share is None else f", GPU busy {self.busy_share:.1%}"
        return f"profile of steps {first_step}-{first_step + steps - 1}: {1e3 * self.seconds / steps:,.0f} ms per step{busy}"

    def table(self) -> str:
        """Return the items with the most time, one line each: milliseconds, calls, name."""
        return "\n".join(["        ms   count  name", *(f"{i.milliseconds:10.2f} {i.count:7d}  {i.name}" for i in self.items[:ROWS])])


class Trace:
    """Records from its creation to `finish`. On a GPU, it records only GPU work, because tracing the host would slow it down."""

    def __init__(self, device: torch.device):
        self._device = device
        self._profiler = profile(activities=[ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU])
        self._profiler.start()
        self._since = self._now()

    def finish(self, path: Path) -> Profile:
        """End the recording and write the trace.

        Args:
            path: file of the trace, ending in `.json.gz`; its folder is created.
        """
        seconds = self._now() - self._since
        self._profiler.stop()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._profiler.export_chrome_trace(str(path))
        if self._device.type != "cuda":
            return Profile(seconds, None, self._operators())
        return read_gpu_trace(path, seconds)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def _operators(self) -> list[Item]:
        found = [Item(e.key, e.self_cpu_time_total / 1e3, e.count) for e in self._profiler.key_averages()]
        return sorted(found, key=lambda item: -item.milliseconds)


def read_gpu_trace(path: Path, seconds: float) -> Profile:
    """Summarize the GPU work of a trace.

    Args:
        path: file written by `torch.profiler`, gzipped.
        seconds: duration of the trace.
    """
    with gzip.open(path, "rt", encoding="utf-8") as file:
        work = [event for event in json.load(file)["traceEvents"] if event.get("cat") in DEVICE_WORK]
    busy_microseconds = covered([(event["ts"], event["ts"] + event["dur"]) for event in work])
    return Profile(seconds, busy_microseconds / 1e6 / seconds, _by_name(work))


def profiled(
    steps: Iterable[Step],
    first_step: int | None,
    device: torch.device,
    run: Run,
    number: Callable[[Step], int] = attrgetter("number"),
) -> Iterator[Step]:
    """Yield the given steps, and trace the caller's work on STEPS of them.

    Args:
        first_step: first traced step, counted from 1 as in the log; None: no trace.
        number: returns the number of a step, counted from 0.
    """
    steps, reached = iter(steps), first_step is None
    for step in steps:
        if number(step) + 1 == first_step:
            reached = True
            yield from _traced(chain([step], islice(steps, STEPS - 1)), first_step, device, run)
        else:
            yield step
    if not reached:
        run.say(f"trainer.profile_step={first_step}: this run had no such step; no profile was written")


def _traced(steps: Iterable[Step], first_step: int, device: torch.device, run: Run) -> Iterator[Step]:
    trace, count = Trace(device), 0
    for count, step in enumerate(steps, 1):  # noqa: B007 - used after the loop
        yield step
    stem = run.directory / "profile" / f"step_{first_step}_rank_{dist.rank()}"
    found = trace.finish(stem.with_suffix(".json.gz"))
    line = found.describe(first_step, count)
    stem.with_suffix(".txt").write_text(f"{line}\n{found.table()}\n", encoding="utf-8")
    run.say(f"{line}; written to {stem.parent}")


def covered(intervals: list[tuple[float, float]]) -> float:
    """Return the length of the union of (start, stop) intervals: concurrent work counts once."""
    total, reach = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        total += max(0.0, stop - max(start, reach))
        reach = max(reach, stop)
    return total


def _by_name(work: list[dict[str, Any]]) -> list[Item]:
    microseconds: dict[str, list[float]] = defaultdict(list)
    for event in work:
        microseconds[event["name"]].append(event["dur"])
    found = [Item(name, sum(times) / 1e3, len(times)) for name, times in microseconds.items()]
    return sorted(found, key=lambda item: -item.milliseconds)
