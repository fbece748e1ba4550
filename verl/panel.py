"""A panel that is drawn in place while a command works: in a terminal, or in a notebook's cell. It never ends the work.

It is drawn by a thread of its own, twice a second. What a terminal cannot do, or does not take any more, ends the drawing and nothing else.
"""

import itertools
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from rich.box import ROUNDED
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel as Frame
from rich.text import Text

from verl import progress
from verl.cell import Drawing

SECONDS_BETWEEN_DRAWINGS = 0.5
NARROW = 50  # columns; a narrower terminal has no frame
BLOCKS, LETTERS = "▁▂▃▄▅▆▇█", "_.-~=+*#"

Lines = Callable[[int, bool], Sequence[str]]  # (columns, whether only ASCII can be shown) → lines of text


class Panel:
    """A panel, from `start` to `stop`.

    Args:
        lines: returns what is in it. Any thread may call it at any time.
        title: of its frame.
        console: where lines of text are printed, too; they appear above the panel.
    Attributes:
        is_drawn: whether the panel is drawn. A terminal without a cursor to move (TERM=dumb) counts as none.
    """

    def __init__(self, lines: Lines, title: str, console: Console):
        self._lines, self._title, self._console = lines, title, console
        on_terminal = console.is_terminal and not console.is_dumb_terminal
        self._live = (
            Live(get_renderable=self._drawn, console=console, auto_refresh=False, vertical_overflow="crop") if on_terminal else None
        )
        self._cell = Drawing(0.0) if progress.in_notebook() and not on_terminal else None
        self.is_drawn = self._live is not None or self._cell is not None
        self._ends = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start to draw."""
        if self._live is None:
            self.changed()
        elif self._attempt(self._live.start):
            self._thread = threading.Thread(target=self._draw_on, name="panel", daemon=True)
            self._thread.start()

    def changed(self) -> None:
        """Draw it in a notebook, unless the last drawing was too recent. A terminal's is drawn anyway."""
        if self._cell is not None:
            self._attempt(partial(self._cell.show, self._drawn))

    def stop(self) -> None:
        """Draw it for the last time, and leave it there."""
        self._ends.set()
        if self._thread is not None:
            self._thread.join(timeout=2 * SECONDS_BETWEEN_DRAWINGS)
        if self._live is not None:
            self._attempt(self._live.refresh)
            self._quit()
        elif self._cell is not None:
            self._attempt(partial(self._cell.finish, self._drawn))
        self._cell = None

    def _draw_on(self) -> None:
        live = self._live
        while live is not None and not self._ends.wait(SECONDS_BETWEEN_DRAWINGS) and self._attempt(live.refresh):
            pass

    def _attempt(self, draw: Callable[[], Any]) -> bool:
        """Draw. Return whether it could be done; if it could not, nothing is drawn any more."""
        try:
            draw()
        except (Exception, SystemExit):  # rich exits where nobody reads a pipe any more, and a library may raise anything
            self._quit()
            self._cell, self.is_drawn = None, False
            return False
        return True

    def _quit(self) -> None:
        """Give the cursor and the standard streams back, also where the terminal is gone."""
        live, self._live = self._live, None
        if live is not None:
            with suppress(Exception, SystemExit):
                live.stop()
            with suppress(Exception):
                live._disable_redirect_io()  # which `stop` does not reach if it fails before

    def _drawn(self) -> Any:
        ascii_only = self._console.options.ascii_only
        width = self._console.width
        is_framed = width >= NARROW and not ascii_only
        inside = max(1, width - (4 if is_framed else 0))
        texts = [Text(line, no_wrap=True, overflow="crop" if ascii_only else "ellipsis") for line in self._lines(inside, ascii_only)]
        group = Group(*texts)
        return Frame(group, title=Text(self._title), title_align="left", box=ROUNDED, border_style="dim") if is_framed else group


def curve(values: Sequence[float], width: int, *, ascii_only: bool = False) -> str:
    """Return values as a curve of at most `width` characters. Each stands for the mean of as many of them; one that is not finite is a `×`.

    Args:
        values: in the order of their steps.
    """
    marks, wrong = (LETTERS, "x") if ascii_only else (BLOCKS, "×")
    count = min(width, len(values))
    edges = [number * len(values) // count for number in range(count + 1)] if count > 0 else []
    means = [sum(values[first:end]) / (end - first) for first, end in itertools.pairwise(edges)]
    known = [mean for mean in means if abs(mean) < float("inf")]
    low, high = min(known, default=0.0), max(known, default=0.0)
    top = len(marks) - 1

    def mark(mean: float) -> str:
        if not abs(mean) < float("inf"):
            return wrong
        return marks[round((mean - low) / (high - low) * top) if high > low else 0]

    return "".join(map(mark, means))


def filled(share: float, width: int, *, ascii_only: bool = False) -> str:
    """Return a bar of `width` characters, of which `share` are filled."""
    full, empty = ("#", ".") if ascii_only else ("━", "─")
    done = round(max(0.0, min(1.0, share)) * width)
    return full * done + empty * (width - done)
