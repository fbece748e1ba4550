"""The curves of a run as an SVG picture: it takes its colours from the page, and needs no script."""

import html
import math
from collections.abc import Sequence

WIDTH, HEIGHT = 720, 240
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 26, 34  # of the frame's edges
LINES = 4  # of the grid, about

Point = tuple[int, float, str]  # step, value, metric


def picture(points: Sequence[Point], total: int, step_word: str) -> str:
    """Return the picture.

    Args:
        total: steps of the whole run; the picture leaves room for those to come.
        step_word: label below the picture.
    """
    if not points:
        return ""
    values = [value for _, value, _ in points]
    low, high, ticks = _scale(min(values), max(values))
    last = max(total, max(step for step, _, _ in points), 2)

    def at(step: float, value: float) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - RIGHT) * (step - 1) / (last - 1)
        return x, TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low)

    parts = []
    for tick in ticks:
        y = at(1, tick)[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for step, anchor in ((1, "start"), (last, "end")):
        parts.append(f'<text x="{at(step, low)[0]:.1f}" y="{HEIGHT - 16}" text-anchor="{anchor}">{step:,}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 16}" text-anchor="middle">{html.escape(step_word)}</text>')
    for number, name in enumerate(dict.fromkeys(name for _, _, name in points)):
        own = [at(step, value) for step, value, metric in points if metric == name]
        marks = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in own) if len(own) <= 60 else ""
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in own)
        newest = next(value for _, value, metric in reversed(points) if metric == name)
        label = f'<text class="name" x="{LEFT + 300 * number}" y="14">{html.escape(name)} {newest:.4g}</text>'
        parts.append(f'<g class="curve curve-{number}"><polyline points="{line}"/>{marks}{label}</g>')
    return f'<svg class="loss" role="img" viewBox="0 0 {WIDTH} {HEIGHT}" xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'


def _scale(least: float, most: float) -> tuple[float, float, list[float]]:
    """Return the ends of an axis that holds two values, and round values on it."""
    if most - least < 1e-9 * max(1.0, abs(most)):
        least, most = least - 0.5, most + 0.5
    rough = (most - least) / LINES
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first, last = math.floor(least / step), math.ceil(most / step)
    return first * step, last * step, [number * step for number in range(first, last + 1)]
