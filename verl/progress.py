"""Progress bars in terminals and notebooks: those of verl are drawn, those of libraries are hidden."""

import io
import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import Progress, ProgressColumn

# For notebooks. Each update is a message to the browser, so updates are limited. A removed bar leaves an empty line, so a transient bar is
# drawn only if it lasts long enough.
SECONDS_BETWEEN_DRAWINGS, SECONDS_BEFORE_TRANSIENT = 0.2, 1.0
_LIBRARIES = ("torch.distributed", "torch._higher_order_ops.wrap")  # the second one warns about activation checkpointing in compiled code


def open_console(**options: Any) -> Console:
    """Return a console for lines of text. It prints plain text in notebooks too, where rich would print each line as an HTML block.

    Args:
        options: arguments of `rich.console.Console`.
    """
    if in_notebook():  # stdout claims to be a terminal, but has no cursor to move
        options = {"force_terminal": False, **options}
    return Console(force_jupyter=False, **options)


def in_notebook() -> bool:
    return Console().is_jupyter


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
        in_cell = in_notebook() and not on_terminal and not hidden
        self._drawing = _Drawing(SECONDS_BEFORE_TRANSIENT if transient else 0.0) if in_cell else None
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
            self._drawing.show(self._progress)

    def update(self, completed: float | None, **fields: str) -> None:
        """Set the progress.

        Args:
            completed: new value; None leaves it.
            fields: new values of the columns' fields, including `description`.
        """
        self._progress.update(self._task, completed=completed, **fields)  # type: ignore[arg-type]
        if self._drawing is not None:
            self._drawing.show(self._progress)

    def stop(self) -> None:
        """Stop updating the bar; remove it if it is transient."""
        self._progress.stop()
        if self._drawing is not None:
            self._drawing.finish(None if self._transient else self._progress)


class _Drawing:
    """An output of a notebook cell, updated in place. rich's own notebook support needs ipywidgets."""

    def __init__(self, seconds_before_first: float):
        self._handle: Any = None
        self._next = time.monotonic() + seconds_before_first

    def show(self, progress: Progress) -> None:
        """Draw the bar, unless the last update was too recent."""
        if time.monotonic() >= self._next:
            self._draw(_rendered(progress))

    def finish(self, progress: Progress | None) -> None:
        """Draw the bar a last time. None: remove it if it has been drawn."""
        if progress is not None:
            self._draw(_rendered(progress))
        elif self._handle is not None:
            self._draw({"text/plain": ""})

    def _draw(self, output: dict[str, str]) -> None:
        from IPython.display import display

        self._next = time.monotonic() + SECONDS_BETWEEN_DRAWINGS
        if self._handle is None:
            self._handle = display(output, raw=True, display_id=True)
        else:
            self._handle.update(output, raw=True)


def _rendered(progress: Progress) -> dict[str, str]:
    """Return the bar as text and as HTML, by MIME type."""
    paper = Console(file=io.StringIO(), record=True, force_terminal=True, force_jupyter=False, color_system="standard", width=100)
    paper.print(progress.get_renderable())
    html = paper.export_html(inline_styles=True, code_format='<pre style="line-height:normal">{code}</pre>', clear=False)
    return {"text/plain": paper.export_text().rstrip("\n"), "text/html": html}


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hide the libraries' own progress bars and advice in the block, so that a run's output is its own."""
    import transformers

    talk = transformers.utils.logging
    verbosity, has_bars = talk.get_verbosity(), talk.is_progress_bar_enabled()
    levels = {name: logging.getLogger(name).level for name in _LIBRARIES}
    with warnings.catch_warnings():
        try:
            talk.set_verbosity_error()
            talk.disable_progress_bar()
            for name in _LIBRARIES:
                logging.getLogger(name).setLevel(logging.ERROR)
            warnings.filterwarnings("ignore", module=r"torch\.distributed\.checkpoint")
            warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|peft")
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
            talk.set_verbosity(verbosity)
            if has_bars:
                talk.enable_progress_bar()
