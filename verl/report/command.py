"""Writes the report: reads the runs and their evaluations, and puts the page together."""

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from verl import regular_file
from verl.disk import disk_errors_named
from verl.durable import replace_text
from verl.errors import UserError
from verl.manifest import refuse_inside
from verl.report.charts import charts_of
from verl.report.comparisons import comparisons_of
from verl.report.evaluations import find_evaluations
from verl.report.figures import write_figures
from verl.report.metrics import counted
from verl.report.page import COLORS, GENERATOR, Report, render
from verl.report.runs import name_apart, read_run
from verl.report.summary import score_text, state_of

NAME = "report.html"


def write_report(
    runs: Sequence[Path], evaluations: Sequence[Path] = (), *, out: Path | None = None, png: Path | None = None
) -> tuple[Path, list[Path], Report]:
    """Write the report about runs.

    Args:
        runs: directories of runs.
        evaluations: directories of evaluations besides those that are found in the runs, and beside them.
        out: the file; None: report.html in the first run's directory, or in the current folder if that cannot be written.
        png: directory of the curves as PNG; None: there are none.
    Returns:
        the page, the PNG files, and what the page shows.
    Raises:
        UserError: a directory is not what it should be, a package is missing, or a file would be lost.
    """
    _check_packages("jinja2", "plotly", *(["matplotlib"] if png is not None else []))
    if not runs:
        raise UserError("no run is named", where="verl report", fix="name a run's directory: verl report DIR")
    found = [read_run(path) for path in dict.fromkeys(runs)]
    name_apart(found)
    page = _place(out, found[0].directory)
    measured = find_evaluations(found, [path.expanduser() for path in evaluations])
    report = Report(found, charts_of([run.metrics for run in found]), measured, comparisons_of(measured, found))
    text = render(report)
    # The page holds settings and lines of the log, which only the owner may read, too.
    with disk_errors_named(page, needed=len(text), fix="make room, or choose another file with --out"):
        replace_text(page, text, private=True)
    files = [] if png is None else write_figures(png.expanduser(), report.charts, [run.name for run in found], COLORS)
    return page, files, report


def main(runs: Sequence[Path], evaluations: Sequence[Path], out: Path | None, png: Path | None) -> None:
    """Write the report, and print what it holds and where it is. Raises UserError: as `write_report`."""
    page, files, report = write_report(runs, evaluations, out=out, png=png)
    for run in report.runs:
        print(f"{run.name}: {state_of(run)}")
        for note in run.notes:
            print(f"  note: {note}")
    for evaluation in report.evaluations:
        (low, high), _ = evaluation.interval or ((None, None), "")
        range_text = "" if low is None else f", 95% interval {score_text(low, evaluation)} to {score_text(high, evaluation)}"
        print(f"{evaluation.path}: {evaluation.measure.lower()} {score_text(evaluation.mean, evaluation)}{range_text}")
        for note in evaluation.notes:
            print(f"  note: {note}")
    for why in dict.fromkeys(comparison.why for comparison in report.comparisons if comparison.why):
        print(why)
    if not report.evaluations:
        print("no evaluation found: verl eval makes one, and --eval DIR names one that is elsewhere")
    if files:
        print(f"wrote {counted(len(files), 'picture')} into {files[0].parent}")
    print(f"wrote {page}")


def _check_packages(*names: str) -> None:
    """Raise UserError if a package of the extra `report` is missing."""
    for name in names:
        if find_spec(name) is None:
            raise UserError(f"{name} is not installed", where="verl report", fix='pip install "verl[report]"')


def _place(out: Path | None, directory: Path) -> Path:
    """Return the file to write. Raises UserError: it cannot be written, or it is something else than a report."""
    page = out.expanduser() if out is not None else (directory if os.access(directory, os.W_OK) else Path()) / NAME
    where = f"--out {page}"
    if page.is_dir():
        page = page / NAME
    refuse_inside(page, where, "choose a file outside it")
    regular_file.check_output(page)
    if os.path.lexists(page) and not _is_report(page):
        raise UserError("is there already, and is no report of verl", where=where, fix="choose another file with --out, or move it away")
    return page


def _is_report(path: Path) -> bool:
    try:
        with os.fdopen(regular_file.open_file(path), "rb") as file:
            return GENERATOR.encode() in file.read(2000)
    except OSError:
        return False
