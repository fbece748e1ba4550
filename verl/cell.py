"""An output of a notebook's cell that is drawn in place."""

import io
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console

# Each update is a message to the browser, so updates are limited. A removed bar leaves an empty line, so a transient bar is
# drawn only if it lasts long enough.
SECONDS_BETWEEN_DRAWINGS, SECONDS_BEFORE_TRANSIENT = 0.2, 1.0


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
