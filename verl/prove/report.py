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
WIDTHS = (13, 25, 7, None)  # of the columns: the same in each line, which is printed when it is finished


class Report:
    """The table, a line at a time. A refusal that a line above has is not repeated."""

    def __init__(self, subject: Subject):
        self.console, self.group = open_console(highlight=False), ""
        self.refusals: dict[str, str] = {}  # the line of each
        self.console.print(Text(f"verl prove {subject.name}: {subject.describe()}"))

    def show(self, outcome: Outcome) -> None:
        """Print the line of an outcome."""
        table = Table(box=None, pad_edge=False, show_header=False)
        for width in WIDTHS:
            table.add_column(width=width, overflow="fold")
        found = outcome.found
        if outcome.state == "refused" and (line := self.refusals.setdefault(found, outcome.name)) != outcome.name:
            found = f"as {line}"
        name = "" if outcome.group == self.group else outcome.group
        table.add_row(name, outcome.name, Text(outcome.state, COLORS[outcome.state]), Text(found))
        self.console.print(table)
        self.group = outcome.group

    def end(self, outcomes: Sequence[Outcome], seconds: float) -> None:
        """Print the totals."""
        self.console.print(Text(f"{totals(outcomes)}; {seconds:.0f} seconds"))


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
