"""The panel of an evaluation: answers done, speed, time left."""

import time

from rich.console import Console

from verl import signals
from verl.pace import Pace, clock
from verl.panel import Panel, filled

SECONDS_BETWEEN_LINES = 10.0  # where no panel is drawn


class AnswersPanel:
    """A panel with the methods of `verl.bar.Bar`, from `start` to `stop`."""

    def __init__(self, console: Console):
        self._pace, self._total, self._done, self._state = Pace(), 0, 0, ""
        self._left: float | None = None
        self._printed = 0.0
        self._panel = Panel(self._lines, "verl eval", console)

    @property
    def is_drawn(self) -> bool:
        return self._panel.is_drawn

    def start(self, total: int) -> None:
        """Start to draw, for so many answers."""
        self._total = total
        self._pace.left(0, total)
        self._panel.start()

    def update(self, done: int, *, description: str) -> None:
        """Show that so many answers are done, and what there is to say of them."""
        self._done, self._state, self._left = done, description, self._pace.left(done, self._total)
        self._panel.changed()

    def line_is_due(self) -> bool:
        """Return whether to print a line, because none is drawn: the last one, and at most one in ten seconds before."""
        now = time.monotonic()
        if self.is_drawn or (self._done < self._total and now - self._printed < SECONDS_BETWEEN_LINES):
            return False
        self._printed = now
        return True

    def stop(self) -> None:
        """Leave the panel as it is now."""
        self._panel.stop()

    def _lines(self, width: int, ascii_only: bool) -> list[str]:
        share = self._done / self._total if self._total else 0.0
        before = f"{self._done:,}/{self._total:,} answers "
        after = f" {share:.0%}" + ("" if self._left is None else f", {clock(self._left)} left")
        room = min(40, width - len(before) - len(after))
        lines = [before + (filled(share, room, ascii_only=ascii_only) if room >= 8 else "") + after, self._state, signals.where()]
        return [line for line in lines if line]
