"""A progress bar is drawn on a terminal and in a notebook, and nowhere else."""

import io
from typing import Any

import pytest
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn

from verl import cell as cells
from verl import progress
from verl.bar import Bar
from verl.progress import open_console

COLUMNS = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[state]}"))


class Cell:
    """A notebook's cell: what each display came to, and how often it was drawn."""

    def __init__(self) -> None:
        self.outputs: list[dict[str, str]] = []
        self.drawn = 0

    def display(self, output: dict[str, str], *, raw: bool, display_id: bool) -> "Handle":
        assert raw and display_id
        self.outputs.append(output)
        self.drawn += 1
        return Handle(self, len(self.outputs) - 1)


class Handle:
    def __init__(self, cell: Cell, number: int):
        self._cell, self._number = cell, number

    def update(self, output: dict[str, str], *, raw: bool) -> None:
        assert raw
        self._cell.outputs[self._number] = output
        self._cell.drawn += 1


@pytest.fixture
def cell(monkeypatch: pytest.MonkeyPatch) -> Cell:
    cell = Cell()
    monkeypatch.setattr(progress, "in_notebook", lambda: True)
    monkeypatch.setattr("IPython.display.display", cell.display)
    return cell


def go(bar: Bar, steps: int = 1000) -> None:
    bar.start(steps, state="")
    for step in range(1, steps + 1):
        bar.update(step, state=f"loss {step}")
    bar.stop()


def on_terminal(**options: Any) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, force_terminal=True, force_jupyter=False, width=80, **options), file


def test_in_a_notebook_one_output_is_drawn_a_few_times_a_second_and_ends_as_it_stands(cell: Cell) -> None:
    go(Bar(*COLUMNS, console=open_console(file=io.StringIO())))
    (output,) = cell.outputs
    assert "1000/1000 loss 1000" in output["text/plain"] and output["text/plain"].startswith("━" * 40)
    assert "<pre" in output["text/html"] and "<span style=" in output["text/html"]
    assert 2 <= cell.drawn < 100


def test_a_transient_bar_leaves_nothing_in_a_notebook(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    go(Bar(*COLUMNS, console=open_console(file=io.StringIO()), transient=True))
    assert cell.outputs == [], "it was over before it was worth drawing"
    monkeypatch.setattr(cells, "SECONDS_BEFORE_TRANSIENT", 0.0)
    go(Bar(*COLUMNS, console=open_console(file=io.StringIO()), transient=True))
    assert cell.outputs == [{"text/plain": ""}] and cell.drawn > 1


def test_text_in_a_notebook_is_plain(cell: Cell) -> None:
    file = io.StringIO()
    console = open_console(file=file)
    console.print("[bold red]a word[/]")
    assert file.getvalue() == "a word\n" and not console.is_terminal and cell.outputs == []


def test_on_a_terminal_it_is_rich_that_draws() -> None:
    console, file = on_terminal()
    bar = Bar(*COLUMNS, console=console)
    assert bar.is_drawn
    go(bar)
    assert "1000/1000" in file.getvalue()


def test_elsewhere_and_where_it_is_hidden_nothing_is_drawn(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    console, file = on_terminal()
    hidden = Bar(*COLUMNS, console=console, hidden=True)
    monkeypatch.setattr(progress, "in_notebook", lambda: False)
    log = io.StringIO()
    elsewhere = Bar(*COLUMNS, console=open_console(file=log))
    for bar in (hidden, elsewhere):
        assert not bar.is_drawn
        go(bar)
    assert file.getvalue() == log.getvalue() == "" and cell.outputs == []
