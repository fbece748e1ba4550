"""Exceptions that end a run early: `UserError`, which the user can fix, and `Stopped`, after a signal.

A command exits with code 2 and no traceback after a `UserError`, and with 128 + the signal's number after `Stopped`.
"""

import atexit
import gc
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NoReturn

EXIT_CODE = 2


class UserError(Exception):
    """Invalid input. The message says what is wrong, where, and how to fix it.

    Args:
        what: what was found and what was expected.
        where: the location, such as `train.jsonl:17` or `data.max_length`.
        fix: what to do.
    """

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None):
        self.what, self.where, self.fix = what, where, fix
        super().__init__(str(self))

    def __reduce__(self) -> tuple[Callable[[], "UserError"], tuple[()]]:
        """Pickle subclasses as a plain UserError, without their own fields, for other processes."""
        return partial(UserError, self.what, where=self.where, fix=self.fix), ()

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        fix = f"\n  fix: {self.fix}" if self.fix else ""
        return f"{place}{self.what}{fix}"


class AbandonedError(UserError):
    """Work was given up, because a signal has asked the run to end."""

    def __reduce__(self) -> tuple[Callable[[], "AbandonedError"], tuple[()]]:
        return partial(AbandonedError, self.what, where=self.where, fix=self.fix), ()


class Stopped(KeyboardInterrupt):
    """A signal stopped the run after a step. All files are complete.

    It is a KeyboardInterrupt, so the calling program or notebook cell ends too unless it catches it, as after Ctrl-C.

    Attributes:
        signal: the signal.
        checkpoint: the newest checkpoint, from which the same call resumes; None if nothing was saved.
    """

    def __init__(self, by: signal.Signals, checkpoint: Path | None):
        self.signal, self.checkpoint = by, checkpoint
        where = "nothing was saved" if checkpoint is None else f"the same call resumes from {checkpoint}"
        super().__init__(f"stopped by {by.name}; {where}")


def print_error(error: UserError) -> None:
    """Print to standard error, on rank 0 only: under torchrun, every process raises the same error."""
    if os.environ.get("RANK", "0") != "0":
        return
    from verl.redaction import redact_text

    print(f"error: {redact_text(str(error))}", file=sys.stderr, flush=True)


def exit_on_user_error(main: Callable[..., object], *args: object) -> NoReturn:
    """Run `main(*args)` and exit: with code 2 after printing a UserError, with 128 + the signal's number after Stopped, else with 0."""
    atexit.register(gc.freeze)  # at exit, Python searches all objects for cycles: with torch imported, this takes seconds
    try:
        main(*args)
    except UserError as error:
        print_error(error)
        raise SystemExit(EXIT_CODE) from None
    except Stopped as stopped:
        raise SystemExit(128 + stopped.signal) from None
    raise SystemExit(0)


# Checks of the value of a key


def one_of(key: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise UserError(f"found {value!r}", where=key, fix=f"one of {', '.join(str(a) for a in allowed)}")


def at_least(key: str, value: float | None, least: float) -> None:
    if value is not None and not (isinstance(value, (int, float)) and least <= value < float("inf")):
        raise UserError(f"found {value!r}", where=key, fix=f"give a number of at least {least}")


def is_share(key: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise UserError(f"{value} is not a share", where=key, fix="give a number from 0 to 1")
