"""Sets of real numbers with rational ends, so that two ways to write one set are equal: `x > 0, x != 1` and `(0,1) ∪ (1,∞)`.

A cut is a place between numbers: just before a number, (5, 0), or just behind it, (5, 1). A region is the sorted intervals of a set, each
from one cut to another: `[2,5)` is from (2, 0) to (5, 0).
"""

import math
from fractions import Fraction
from functools import reduce
from typing import Any

from verl.rewards import _units
from verl.rewards._value import Interval, Quantity, Several, Unlike, Value, Words

Cut = tuple[Any, int]  # a Fraction or an infinity, and its side
Region = tuple[tuple[Cut, Cut], ...]
FIRST, LAST = (-math.inf, 0), (math.inf, 0)


def region(value: Value) -> Region | None:
    """Return the set of numbers that a value describes, None for other values and for ends that are no rational numbers."""
    if isinstance(value, Interval):
        return _interval(value)
    if isinstance(value, Unlike):
        without = region(value.value) if _is_set(value.value) else _points_as_region(value.value)
        return None if without is None else _all_but(without)
    if not isinstance(value, Several):
        return None
    if value.kind == "set":
        return _points_as_region(value)
    if value.kind == "tuple":
        between = open_interval(value)
        return _interval(between) if between else None
    parts = [part for item in value.items if (part := region(item)) is not None]
    if len(parts) < len(value.items) or value.kind not in ("union", "all"):
        return None
    return reduce(_common, parts) if value.kind == "all" else _joined([piece for part in parts for piece in part])


def open_interval(value: Value) -> Interval | None:
    """Return the interval that a value may be: `(1,2)` is read as a tuple."""
    if not isinstance(value, Several) or value.kind != "tuple" or len(value.items) != 2:
        return value if isinstance(value, Interval) else None
    low, high = (None if item in (Words("∞"), Words("-∞")) else item for item in value.items)
    return Interval(low, high, False, False)


def _interval(interval: Interval) -> Region | None:
    low, high = _number(interval.low), _number(interval.high)
    if (interval.low is not None and low is None) or (interval.high is not None and high is None):
        return None
    start: Cut = FIRST if low is None else (low, 0 if interval.has_low else 1)
    end: Cut = LAST if high is None else (high, 1 if interval.has_high else 0)
    return ((start, end),) if start < end else ()


def _number(end: Value | None) -> Fraction | None:
    return end.value if isinstance(end, Quantity) and end.unit == _units.NONE and not end.percent else None


def _is_set(value: Value) -> bool:
    return isinstance(value, Interval) or (isinstance(value, Several) and value.kind in ("tuple", "union", "all"))


def _points_as_region(value: Value) -> Region | None:
    items = value.items if isinstance(value, Several) and value.kind in ("list", "set") else (value,)
    points = [point for item in items if (point := _number(item)) is not None]
    return _joined([((point, 0), (point, 1)) for point in points]) if len(points) == len(items) else None


def _all_but(without: Region) -> Region:
    starts, ends = [FIRST, *(end for _, end in without)], [*(start for start, _ in without), LAST]
    return tuple((start, end) for start, end in zip(starts, ends, strict=True) if start < end)


def _joined(pieces: list[tuple[Cut, Cut]]) -> Region:
    joined = list[tuple[Cut, Cut]]()
    for start, end in sorted(pieces):
        if joined and start <= joined[-1][1]:
            start, end = joined[-1][0], max(end, joined.pop()[1])
        joined.append((start, end))
    return tuple(joined)


def _common(first: Region, second: Region) -> Region:
    both = ((max(a, c), min(b, d)) for a, b in first for c, d in second)
    return tuple((start, end) for start, end in both if start < end)
