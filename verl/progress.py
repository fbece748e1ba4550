"""Output in terminals and notebooks: where something is drawn in place, and that libraries draw nothing."""

import io
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

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


class Drawing:
    """An output of a notebook cell, updated in place. rich's own notebook support needs ipywidgets."""

    def __init__(self, seconds_before_first: float):
        self._handle: Any = None
        self._next = time.monotonic() + seconds_before_first

    def show(self, made: Callable[[], Any]) -> None:
        """Draw what `made` returns, for rich, unless the last update was too recent."""
        if time.monotonic() >= self._next:
            self._draw(_rendered(made()))

    def finish(self, made: Callable[[], Any] | None) -> None:
        """Draw a last time. None: remove what has been drawn."""
        if made is not None:
            self._draw(_rendered(made()))
        elif self._handle is not None:
            self._draw({"text/plain": ""})

    def _draw(self, output: dict[str, str]) -> None:
        from IPython.display import display

        self._next = time.monotonic() + SECONDS_BETWEEN_DRAWINGS
        if self._handle is None:
            self._handle = display(output, raw=True, display_id=True)
        else:
            self._handle.update(output, raw=True)


def _rendered(renderable: Any) -> dict[str, str]:
    """Return what rich can draw as text and as HTML, by MIME type."""
    paper = Console(file=io.StringIO(), record=True, force_terminal=True, force_jupyter=False, color_system="standard", width=100)
    paper.print(renderable)
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
