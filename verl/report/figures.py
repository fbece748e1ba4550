"""The curves as PNG files, for papers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from verl.errors import UserError
from verl.regular_file import check_directory
from verl.report.charts import FEW_POINTS, OTHERS, Chart

DPI = 200
_SIZE = (3.5, 2.4)  # inches: a column of a paper


def write_figures(directory: Path, charts: Mapping[str, Sequence[Chart]], names: Sequence[str], colors: Sequence[str]) -> list[Path]:
    """Write each chart but those of other metrics as a PNG, and return the files.

    Args:
        names: of the runs.
        colors: of the runs; they repeat.
    Raises:
        UserError: the directory cannot be written.
    """
    files = []
    check_directory(directory, f"--png {directory}", "choose a directory; it is made if it is missing")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for heading, group in charts.items():
            for chart in group if heading != OTHERS else ():
                path = directory / f"{chart.metric.replace('/', '_')}.png"
                _draw(chart, names, colors).savefig(path, dpi=DPI)
                files.append(path)
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror}", where=f"--png {directory}", fix="choose another directory") from error
    return files


def _draw(chart: Chart, names: Sequence[str], colors: Sequence[str]) -> Any:
    """Return a figure of matplotlib, which no window shows and no other figure shares a state with."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with rc_context({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "text.parse_math": False}):
        figure = Figure(figsize=_SIZE, layout="constrained")
        axes = figure.add_subplot()
        lines = []
        for curve in chart.curves:
            color, mark = colors[curve.run % len(colors)], "." if len(curve.points) <= FEW_POINTS else ""
            if curve.smooth:
                axes.plot(*zip(*curve.points, strict=True), color=color, alpha=0.25, linewidth=0.6)
            lines += axes.plot(*zip(*(curve.smooth or curve.points), strict=True), color=color, linewidth=1.2, marker=mark)
        axes.set(xlabel="step", ylabel=chart.unit, title=chart.title)
        axes.grid(alpha=0.2)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        if len(names) > 1:
            axes.legend(lines, [names[curve.run] for curve in chart.curves], frameon=False, fontsize=7)
    return figure
