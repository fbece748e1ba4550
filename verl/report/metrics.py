"""Reads metrics.jsonl of a run that may still be writing it, and prepares its curves: smoothing, and thinning of long ones."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from verl import regular_file

METRICS = "metrics.jsonl"
LARGEST = 2**30  # bytes of metrics.jsonl that are read
MOST_POINTS = 2000  # of a curve on the page
_HALF_LIVES = 150  # of the smoothing, in the length of a curve
_WIDTH = 10  # half-lives after which a value counts no more: its weight is a thousandth

Point: TypeAlias = tuple[float, float]  # step and value


@dataclass(frozen=True)
class Metrics:
    """The metrics of a run.

    Attributes:
        steps: the metrics of each step, in order. A value that is not finite is NaN.
        notes: what is odd about the file, one sentence each.
    """

    steps: dict[int, dict[str, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """Names of all metrics, in the order of their first appearance."""
        return list(dict.fromkeys(name for values in self.steps.values() for name in values))

    def curve(self, name: str) -> list[Point]:
        """Return the finite values of a metric by step."""
        return [(float(step), found) for step, values in self.steps.items() if math.isfinite(found := values.get(name, math.nan))]

    def first(self, name: str) -> float | None:
        return next((value for _, value in self.curve(name)), None)

    def last(self, name: str) -> float | None:
        return next((value for _, value in reversed(self.curve(name))), None)

    def total(self, name: str) -> float:
        return sum(value for _, value in self.curve(name))


def read_metrics(directory: Path) -> Metrics:
    """Read a run's metrics.jsonl. Lines that are damaged or repeated are counted in the notes, and nothing is raised."""
    try:
        content = regular_file.read(directory / METRICS, LARGEST, follow=True)
    except FileNotFoundError:
        return Metrics(notes=[f"{METRICS} is missing, so there are no curves: the run has not finished a step, or the file was moved."])
    except OSError as error:
        return Metrics(notes=[f"{METRICS} cannot be read ({error.strerror or error}), so there are no curves."])
    return parse_metrics(content.decode("utf-8", errors="replace"))


def parse_metrics(text: str) -> Metrics:
    """Parse the lines of metrics.jsonl. Of a step that occurs twice, as after a resumption, the later line counts."""
    lines = text.split("\n")
    unfinished, lines = lines[-1], lines[:-1]
    steps: dict[int, dict[str, float]] = {}
    damaged, repeated = list[int](), 0
    for number, line in enumerate([*lines, unfinished], start=1):
        if not line.strip():
            continue
        found = _values(line)
        if found is None:
            damaged.append(number)
            continue
        repeated += found[0] in steps
        steps[found[0]] = found[1]
    notes = []
    if damaged and damaged[-1] == len(lines) + 1:
        damaged.pop()
        notes.append(f"The last line of {METRICS} is incomplete: the run is writing it, or was killed there. It is left out.")
    if damaged:
        places = ", ".join(map(str, damaged[:5])) + (", …" if damaged[5:] else "")
        notes.append(f"{METRICS} has {counted(len(damaged), 'damaged line')}, left out here (line {places}).")
    if repeated:
        notes.append(f"{METRICS} has {counted(repeated, 'step')} twice, as after a resumption; the later line of each is shown.")
    return Metrics(dict(sorted(steps.items())), notes)


def _values(line: str) -> tuple[int, dict[str, float]] | None:
    """Return the step and the numbers of a line, with NaN for null; None if it is damaged."""
    try:
        found: Any = json.loads(line)
        step = found.pop("step")
        values = {str(name): math.nan if value is None else float(value) for name, value in found.items() if _is_number(value)}
        return (int(step), values) if _is_number(step) and math.isfinite(step) else None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None


def _is_number(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, such as `1 line` or `2,000 lines`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def smoothed(points: Sequence[Point]) -> list[Point]:
    """Return the exponentially weighted mean of the values around each point.

    It looks to both sides alike, so that the curve does not lag behind, and begins and ends where the values do: near the ends, it looks
    no further than to the nearer one. A value's weight halves over a 150th of the curve, so that curves of any length look alike.
    """
    half_life = max(1.0, len(points) / _HALF_LIVES)
    decay, width = 0.5 ** (1 / half_life), math.ceil(_WIDTH * half_life)
    before, after = list(_sums(points, decay)), list(_sums(points[::-1], decay))[::-1]
    values_N = np.array([value for _, value in points])
    weights_W = decay ** np.abs(np.arange(-width, width + 1))
    found = []
    for number, (step, value) in enumerate(points):
        near = min(number, len(points) - 1 - number)
        if near < width:
            weights = weights_W[width - near : width + near + 1]
            mean = float(values_N[number - near : number + near + 1] @ weights / weights.sum())
        else:  # what is further away than `width` has no weight to speak of; the point itself is in both sums
            (left, left_weight), (right, right_weight) = before[number], after[number]
            mean = (left + right - value) / (left_weight + right_weight - 1)
        found.append((step, mean))
    return found


def _sums(points: Sequence[Point], decay: float) -> Iterator[tuple[float, float]]:
    """Yield the weighted sum of the values up to each point, and the sum of the weights."""
    total = weight = 0.0
    for _, value in points:
        total, weight = decay * total + value, decay * weight + 1
        yield total, weight


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """Return at most `most` points. Of each part of a long curve, its smallest and its largest value stay, so that no peak is lost."""
    if len(points) <= most:
        return list(points)
    parts, kept = most // 2, list[Point]()
    for number in range(parts):
        part = points[number * len(points) // parts : (number + 1) * len(points) // parts]
        kept += sorted({min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])})
    return kept
