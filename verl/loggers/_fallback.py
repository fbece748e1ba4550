"""For loggers of services: the console takes the place of one that cannot be reached, so that no run waits or stops for it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from verl.loggers import console
from verl.redaction import redact_text

if TYPE_CHECKING:
    from verl.run import Run
    from verl.run_loggers import Logger


class Silent:
    """The fallback if the run has the console logger anyway."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Do nothing: the console logger prints it."""

    def finish(self) -> None:
        """Do nothing: no file is open."""


def console_instead(run: Run, name: str, reason: str) -> Logger:
    """Say in one line why a logger does not start, and return the logger that takes its place."""
    run.say(f"{name}: {reason}; logging to the console instead")
    return Silent() if "console" in run.config["trainer"]["logger"] else console.start(run)


def first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]


@contextmanager
def arguments_redacted() -> Iterator[None]:
    """In this context, `sys.argv`, which a service may upload, has no secrets."""
    given = sys.argv
    sys.argv = [redact_text(word) for word in given]
    try:
        yield
    finally:
        sys.argv = given
