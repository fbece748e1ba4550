"""A progress bar of one line, in terminals and notebooks."""

from typing import Any

from rich.console import Console
from rich.progress import Progress, ProgressColumn

from verl import cell, progress
from verl.cell import Drawing


class Bar:
    """A progress bar, from `start` to `stop`.

    Args:
        columns: the bar's columns.
        console: console to draw on, if it is a terminal.
        transient: whether `stop` removes the bar.
        hidden: whether the bar is never drawn.
    Attributes:
        is_drawn: whether the bar is drawn, in a terminal or a notebook.
    """

    def __init__(self, *columns: ProgressColumn, console: Console, transient: bool = False, hidden: bool = False):
        on_terminal = console.is_terminal and not hidden
        self._transient = transient
        self._progress = Progress(*columns, console=console, transient=transient, disable=not on_terminal)
        in_cell = progress.in_notebook() and not on_terminal and not hidden
        self._drawing = Drawing(cell.SECONDS_BEFORE_TRANSIENT if transient else 0.0) if in_cell else None
        self.is_drawn = on_terminal or self._drawing is not None

    def start(self, total: float, *, completed: float = 0, description: str = "", **fields: str) -> None:
        """Start to draw the bar.

        Args:
            total: value of `completed` at the end.
            completed: initial value.
            description: text of the column `task.description`.
            fields: other values that the columns show: `state=…` for `task.fields[state]`.
        """
        self._task = self._progress.add_task(description, total=total, completed=completed, **fields)  # type: ignore[arg-type]
        self._progress.start()
        if self._drawing is not None and not self._transient:
            self._drawing.show(self._shown)

    def update(self, completed: float | None, **fields: str) -> None:
        """Set the progress.

        Args:
            completed: new value; None leaves it.
            fields: new values of the columns' fields, including `description`.
        """
        self._progress.update(self._task, completed=completed, **fields)  # type: ignore[arg-type]
        if self._drawing is not None:
            self._drawing.show(self._shown)

    def stop(self) -> None:
        """Stop updating the bar; remove it if it is transient."""
        self._progress.stop()
        if self._drawing is not None:
            self._drawing.finish(None if self._transient else self._shown)

    def _shown(self) -> Any:
        return self._progress.get_renderable()
