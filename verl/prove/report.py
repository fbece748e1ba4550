"""The table of `verl prove`, and the same as JSON."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from verl.progress import open_console
from verl.prove.outcome import Outcome, State
from verl.prove.subject import Subject

COLORS: dict[State, str] = {"holds": "green", "slower": "cyan", "refused": "yellow", "wrong": "bold red", "none": "dim"}


def show(subject: Subject, outcomes: Sequence[Outcome], seconds: float) -> None:
    """Print a line for each outcome, and their totals."""
    console = open_console(highlight=False)
    console.print(Text(f"verl prove {subject.name}: {subject.describe()}"))
    table = Table(box=None, pad_edge=False, show_header=False)
    for _ in range(4):
        table.add_column(overflow="fold")
    group = ""
    for outcome in outcomes:
        name = "" if outcome.group == group else outcome.group
        table.add_row(name, outcome.name, Text(outcome.state, COLORS[outcome.state]), Text(outcome.found))
        group = outcome.group
    console.print(table)
    console.print(Text(f"{totals(outcomes)}; {seconds:.0f} seconds"))


def totals(outcomes: Sequence[Outcome]) -> str:
    """Say how many lines have each state."""
    counts = Counter(outcome.state for outcome in outcomes)
    return ", ".join(f"{counts[state]} {state}" for state in ("holds", "slower", "refused", "wrong") if counts[state] or state == "wrong")


def summary(subject: Subject, outcomes: Sequence[Outcome], seconds: float) -> dict[str, Any]:
    """Return everything that was found, for programs."""
    counts = Counter(outcome.state for outcome in outcomes)
    return {
        "model": subject.name,
        "model_type": subject.config.model_type,
        "described": subject.describe(),
        "seconds": round(seconds, 1),
        "counts": dict(counts),
        "outcomes": [outcome.as_json() for outcome in outcomes],
    }
