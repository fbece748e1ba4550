"""The HTML page of a report: one file that loads nothing.

Runs, data and answers are untrusted. Every text is escaped where the template shows it, and the page's Content-Security-Policy allows the
two scripts that it was written with, by their hashes, and no connection.
"""

import base64
import gzip
import hashlib
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib import resources
from typing import Any

from verl import __version__
from verl.eval.intervals import WILSON
from verl.eval.paired import Comparison as PairedComparison
from verl.report.charts import FEW_POINTS, OTHERS, Chart
from verl.report.comparisons import Comparison, Turned
from verl.report.evaluations import Evaluation, is_base
from verl.report.metrics import counted
from verl.report.runs import RunFiles
from verl.report.settings import changed_settings, command_of, command_of_evaluation, shell, trainer_of
from verl.report.summary import Fact, facts_of, method_of, number_text, score_text, state_of

GENERATOR = '<meta name="generator" content="verl report">'
# Of Okabe and Ito, told apart with any kind of colour vision; then the same hues for dark ground.
COLORS = ["#0072B2", "#D55E00", "#009E73", "#B5538F", "#B87A00", "#3E97C9", "#7F6BC8", "#7A7A7A"]
DARK_COLORS = ["#56ABE0", "#F28C4F", "#3CC79A", "#E39CC4", "#EDB74A", "#9AD2F5", "#AE9FEE", "#B4B4B4"]
MOST_SHOWN = {"right": 40, "wrong": 40, "same_wrong": 15, "same_right": 5}  # answers of each kind
LONGEST_TEXT = 4000  # characters; the middle of a longer one is omitted
_HEADINGS = {"right": "Turned right", "wrong": "Turned wrong", "same_wrong": "Still wrong", "same_right": "Still right"}
# Control characters but line ends and tabs, halves of characters, and marks that change the order in which a text is shown.
_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]")


@dataclass(frozen=True)
class Report:
    """What a report is about.

    Attributes:
        charts: charts by heading.
        evaluations: of the runs' models and others that were named, in the order of the page.
    """

    runs: list[RunFiles]
    charts: dict[str, list[Chart]]
    evaluations: list[Evaluation]
    comparisons: list[Comparison]


def render(report: Report) -> str:
    """Return the page."""
    environment = _environment()
    script, library = _read("page.js"), _library()
    names = [run.name for run in report.runs]
    page: str = environment.get_template("page.html.jinja").render(
        generator=_markup(GENERATOR),
        policy=_policy(script, library),
        style=_markup(_read("page.css")),
        script=_markup(script),
        library=base64.b64encode(gzip.compress(library.encode(), mtime=0)).decode(),
        data=_chart_data(report),
        title=f"Report: {', '.join(names)}",
        summary=_summary(report),
        made=datetime.now(timezone.utc),
        version=__version__,
        runs=[_run(number, run, report) for number, run in enumerate(report.runs)],
        groups=report.charts,
        others=OTHERS,
        evaluations=[_evaluation(one, names) for one in report.evaluations],
        evaluation_notes=[note for one in report.evaluations for note in one.notes],
        comparisons=[_comparison(one, names) for one in report.comparisons],
        settings=changed_settings(report.runs),
        commands=_commands(report),
    )
    # Half a character, as a damaged file may have, cannot be written.
    return page.encode("utf-8", "replace").decode("utf-8")


def _environment() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("verl.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    environment.filters["short"] = shortened
    return environment


def _markup(text: str) -> Any:
    from markupsafe import Markup

    return Markup(text)  # noqa: S704 - files of this package


def _read(name: str) -> str:
    return resources.files("verl.report").joinpath(name).read_text(encoding="utf-8")


def _library() -> str:
    """Return the source of plotly.js."""
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def _policy(*scripts: str) -> str:
    """Return a Content-Security-Policy that allows these scripts and nothing from elsewhere."""
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in scripts)
    # plotly.js sets styles of elements, and draws with images of its own.
    return f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"


def visible(text: str) -> str:
    """Return a text with characters that nobody sees written as their numbers, so that they can neither hide nor reorder anything."""
    return _UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text.replace("\r\n", "\n"))


def shortened(text: str, most: int = LONGEST_TEXT) -> str:
    """Return a text with the middle of a long one omitted."""
    if len(text) <= most:
        return text
    return f"{text[: most // 2]} … {len(text) - most:,} more characters … {text[-most // 2 :]}"


def _chart_data(report: Report) -> dict[str, Any]:
    """Return what the page's script draws, with six digits. Names are escaped: plotly.js reads a few tags in them."""
    charts = [asdict(chart) for group in report.charts.values() for chart in group]
    for chart in charts:
        for curve in chart["curves"]:
            for name in ("points", "smooth"):
                curve[name] = curve[name] and [(step, float(f"{value:.6g}")) for step, value in curve[name]]
        chart["unit"], chart["title"] = _for_plotly(chart["unit"]), _for_plotly(chart["title"])
    names = [_for_plotly(run.name) for run in report.runs]
    return {"runs": names, "colors": {"light": COLORS, "dark": DARK_COLORS}, "few_points": FEW_POINTS, "charts": charts}


def _color(run: int) -> str:
    """Return the colour of a run, as CSS."""
    number = run % len(COLORS)
    return f"light-dark({COLORS[number]}, {DARK_COLORS[number]})"


def _for_plotly(text: str) -> str:
    return visible(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _run(number: int, run: RunFiles, report: Report) -> dict[str, Any]:
    versions, devices = dict(run.versions), []
    if device := run.said("device: "):
        devices.append(("Device", device))
    if model := run.said("model: "):
        devices.append(("Model", model))
    if run.processes:
        devices.append(("Processes", str(run.processes)))
    return {
        "name": run.name,
        "directory": str(run.directory),
        "color": _color(number),
        "method": method_of(run),
        "state": state_of(run),
        "facts": facts_of(run, _own(report, number)),
        "notes": run.notes,
        "warnings": run.warnings,
        "data": "\n".join(run.data_lines),
        "environment": [*devices, *((name, version) for name, version in versions.items())],
        "checkpoints": _checkpoints(run),
        "trainer": trainer_of(run),
    }


def _summary(report: Report) -> list[tuple[str, list[Fact | None]]]:
    """Return the facts of several runs as a table: label, and the fact of each run."""
    facts = [{fact.label: fact for fact in facts_of(run, _own(report, number))} for number, run in enumerate(report.runs)]
    labels = dict.fromkeys(label for of_run in facts for label in of_run)
    return [(label, [of_run.get(label) for of_run in facts]) for label in labels]


def _own(report: Report, number: int) -> list[Evaluation]:
    """Return the evaluations of a run's models, and of the model that it began with, which other runs may have begun with too."""
    return [one for one in report.evaluations if one.run == number or is_base(one, report.runs[number])]


def _checkpoints(run: RunFiles) -> str:
    if not run.checkpoints:
        return "none"
    best = f"; best: {run.best['checkpoint']} by {run.best.get('metric')}" if isinstance(run.best.get("checkpoint"), str) else ""
    shown = run.checkpoints if len(run.checkpoints) <= 6 else [*run.checkpoints[:2], "…", *run.checkpoints[-2:]]
    return ", ".join(shown) + best


def _name(evaluation: Evaluation, names: Sequence[str]) -> str:
    """Return what the page calls the evaluated model."""
    if evaluation.run is None or evaluation.step is None:
        return evaluation.model if evaluation.settings else evaluation.path.name
    run = f"{names[evaluation.run]}, " if len(names) > 1 else ""
    if evaluation.is_validation:
        return f"{run}validation at step {evaluation.step:,}"
    return f"{run}step {evaluation.step:,}" if evaluation.step else "base model"


def _evaluation(evaluation: Evaluation, names: Sequence[str]) -> dict[str, Any]:
    (low, high), method = evaluation.interval or ((None, None), "")
    mean, bar = evaluation.mean, None
    if low is not None and high is not None and mean is not None and 0 <= low <= high <= 1:
        bar = [100 * low, 100 * mean, 100 * high]
    return {
        "name": _name(evaluation, names),
        "model": evaluation.model,
        "file": str(evaluation.settings.get("test_file", "")),
        "measure": evaluation.measure,
        "score": score_text(mean, evaluation),
        "low": "" if low is None else score_text(low, evaluation),
        "high": "" if high is None else score_text(high, evaluation),
        "method": "Wilson" if method == WILSON else method,
        "bar": bar,
        "questions": len(evaluation.scores),
        "answers": len(evaluation.answers),
        "truncated": evaluation.results.get("truncated"),
        "path": str(evaluation.path),
        "color": "currentColor" if evaluation.run is None or evaluation.step == 0 else _color(evaluation.run),
        "versions": {str(k): str(v) for k, v in versions.items()}
        if isinstance(versions := evaluation.results.get("versions"), dict)
        else {},
        "device": str(evaluation.results.get("device", "")),
    }


def _comparison(one: Comparison, names: Sequence[str]) -> dict[str, Any]:
    kinds = {"right": one.right, "wrong": one.wrong, "same_wrong": one.same_wrong, "same_right": one.same_right}
    return {
        "before": _name(one.before, names),
        "after": _name(one.after, names),
        "why": one.why,
        "test": None if one.test is None else _test_text(one),
        "unpaired": counted(one.unpaired, "answer") if one.unpaired else "",
        "counts": {_HEADINGS[kind]: len(found) for kind, found in kinds.items()},
        "total": sum(len(found) for found in kinds.values()),
        "kinds": [
            {"key": kind, "heading": _HEADINGS[kind], "count": len(found), "answers": [_turned(one) for one in found[: MOST_SHOWN[kind]]]}
            for kind, found in kinds.items()
        ],
    }


def _test_text(one: Comparison) -> dict[str, str]:
    test = one.test
    assert test is not None
    is_share = one.before.is_share and one.after.is_share
    low, high = test.interval
    points = [(f"{100 * x:+.1f}" if is_share else f"{x:+.4g}").replace("-", "−") for x in (test.difference, low, high)]
    p_value = "p < 0.0001" if test.p_value < 0.0001 else f"p = {test.p_value:.2g}"
    return {
        "difference": points[0],
        "unit": "percentage points" if is_share else "of the mean score",
        "interval": f"{points[1]} to {points[2]}",
        "interval_method": test.interval_method,
        "p_value": p_value,
        "method": test.test,
        "verdict": _verdict(test),
    }


def _verdict(test: PairedComparison) -> str:
    if test.better == test.worse == 0:
        return "The two score the same on every question."
    return "The difference is larger than chance explains." if test.p_value < 0.05 else "Chance alone may explain the difference."


def _turned(turned: Turned) -> dict[str, Any]:
    first_line = re.sub(r"\s+", " ", turned.before.prompt).strip()
    return {
        "title": shortened(first_line, 160),
        "prompt": turned.before.prompt,
        "reference": turned.before.reference,
        "sides": [
            {
                "heading": heading,
                "response": answer.response,
                "extracted": answer.extracted,
                "is_right": answer.score >= 1,
                "score": number_text(answer.score),
            }
            for heading, answer in (("Before", turned.before), ("After", turned.after))
        ],
    }


def _commands(report: Report) -> list[tuple[str, str]]:
    """Return the commands that repeat runs and evaluations, each with what it does."""
    names = [run.name for run in report.runs]
    found = [(run.name, command_of(run)) for run in report.runs]
    found += [(f"evaluation: {_name(one, names)}", command_of_evaluation(one)) for one in report.evaluations if not one.is_validation]
    return [(name, shell(words)) for name, words in found if words is not None]
