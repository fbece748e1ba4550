"""What a run has written so far: its curves, the last lines of its log, step and time left."""

import json
import math
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from verl import regular_file

CURVES = ("train/loss", "val/loss")
MOST_POINTS = 600  # of a curve: more are not seen on a page
MOST_BYTES = 2**30
LOG_BYTES = 20_000  # from the end of train.log
LOG_LINES = 14
_STEP = re.compile(r"^step ([\d,]+)/([\d,]+) ", re.MULTILINE)
_LEFT = re.compile(r"· eta ([\d:]+)\s*$")


@dataclass(frozen=True)
class Seen:
    """A look at a run.

    Attributes:
        step, total: steps done, and of the whole run; 0 before the first.
        left: the time left, such as `1:23`; empty if it is not known.
        points: (step, value, metric) of each point of the curves.
        log: the last lines of train.log.
    """

    step: int
    total: int
    left: str
    points: list[tuple[int, float, str]]
    log: str


def look(directory: Path, log_start: int = 0) -> Seen:
    """Read what a run has written. Nothing is raised: a run may not have begun, or may be writing.

    Args:
        log_start: bytes of train.log that were there before the run was started or continued.
    """
    log = _read_end(directory / "train.log", log_start)
    step, total, left = 0, 0, ""
    for found in _STEP.finditer(log):
        step, total = (int(text.replace(",", "")) for text in found.groups())
        line = log[found.start() :].partition("\n")[0]
        left = match[1] if (match := _LEFT.search(line)) else ""
    return Seen(step, total, left, _points(directory), "\n".join(log.splitlines()[-LOG_LINES:]))


def _read_end(path: Path, start: int) -> str:
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(start if start <= size else 0, size - LOG_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def _points(directory: Path) -> list[tuple[int, float, str]]:
    """Return the curves, thinned; of a step that is there twice, as after a resume, the later values."""
    values: dict[str, dict[int, float]] = {name: {} for name in CURVES}
    with suppress(OSError):
        for line in regular_file.read(directory / "metrics.jsonl", MOST_BYTES, follow=True).splitlines():
            with suppress(ValueError, TypeError, AttributeError, KeyError):  # a line that is being written
                row = json.loads(line)
                for name in CURVES:
                    if isinstance(value := row.get(name), int | float) and math.isfinite(value):
                        values[name][int(row["step"])] = float(value)
    return [point for name in CURVES for point in _thinned(sorted(values[name].items()), name)]


def _thinned(curve: list[tuple[int, float]], name: str) -> list[tuple[int, float, str]]:
    every = max(1, math.ceil(len(curve) / MOST_POINTS))
    kept = curve[::every] + (curve[-1:] if (len(curve) - 1) % every else [])
    return [(step, value, name) for step, value in kept]
