"""Exceptions that end a run early: `UserError`, which the user can fix, and `Stopped`, after a signal or at a time limit.

A command exits without a traceback after these: with code 2 after a `UserError`, 3 if another rank has died or hangs (`RankError`), 4 if
the disk fails (`DiskError`), and after `Stopped` with 75 if there is a checkpoint to go on from, else with 128 + the signal's number.
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
RANK_EXIT_CODE = 3
DISK_EXIT_CODE = 4
SAVED_EXIT_CODE = 75  # "saved, start me again": the code that sysexits.h calls a temporary failure


class UserError(Exception):
    """Invalid input. The message says what is wrong, where, and how to fix it.

    Args:
        what: what was found and what was expected.
        where: the location, such as `train.jsonl:17` or `data.max_length`.
        fix: what to do.
    Attributes:
        exit_code: of a command that ends with this error.
        tells: whether this process prints it; None: only rank 0 does.
    """

    exit_code = EXIT_CODE
    tells: bool | None = None

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


class DiskError(UserError):
    """A disk is full or fails. Nothing that was complete is lost."""

    exit_code = DISK_EXIT_CODE

    def __reduce__(self) -> tuple[Callable[[], "DiskError"], tuple[()]]:
        return partial(DiskError, self.what, where=self.where, fix=self.fix), ()


class AbandonedError(UserError):
    """Work was given up, because a signal has asked the run to end."""

    def __reduce__(self) -> tuple[Callable[[], "AbandonedError"], tuple[()]]:
        return partial(AbandonedError, self.what, where=self.where, fix=self.fix), ()


class RankError(UserError):
    """Another rank has died, hangs or has failed. The message names the rank, its host, and what it was doing."""

    exit_code = RANK_EXIT_CODE


class Stopped(KeyboardInterrupt):
    """A signal or `trainer.max_seconds` stopped the run. All files are complete.

    It is a KeyboardInterrupt, so the calling program or notebook cell ends too unless it catches it, as after Ctrl-C.

    Attributes:
        signal: the signal; None: the time limit.
        checkpoint: the newest checkpoint, from which the same call resumes; None if nothing was saved.
        phase: what the run was doing, if a signal left it at once; empty after a step.
        is_told: whether it has been printed.
    """

    def __init__(self, by: signal.Signals | None, checkpoint: Path | None, *, phase: str = ""):
        self.signal, self.checkpoint, self.phase, self.is_told = by, checkpoint, phase, False
        super().__init__()

    def __str__(self) -> str:
        while_doing = f" while {self.phase}" if self.phase else ""
        how = "nothing was saved" if self.checkpoint is None else f"the same call resumes from {self.checkpoint}"
        return f"stopped by {self.signal.name if self.signal else 'trainer.max_seconds'}{while_doing}; {how}"

    @property
    def exit_code(self) -> int:
        """Exit code of a command."""
        return SAVED_EXIT_CODE if self.checkpoint is not None or self.signal is None else 128 + self.signal


def print_error(error: UserError) -> None:
    """Print to standard error, on rank 0 unless the error says otherwise: usually, every process raises the same error."""
    rank = os.environ.get("RANK", "0")
    if rank == "0" if error.tells is None else error.tells:
        from verl.redaction import redact_text

        place = "" if rank == "0" or isinstance(error, RankError) else f"rank {rank}: "  # a RankError names the ranks itself
        print(f"error: {place}{redact_text(str(error))}", file=sys.stderr, flush=True)


def exit_on_user_error(main: Callable[..., object], *args: object) -> NoReturn:
    """Run `main(*args)` and exit: with the code of a UserError or of Stopped after printing it, else with 0."""
    atexit.register(gc.freeze)  # at exit, Python searches all objects for cycles: with torch imported, this takes seconds
    try:
        main(*args)
    except UserError as error:
        print_error(error)
        if isinstance(error, RankError):
            sys.stdout.flush()
            os._exit(error.exit_code)  # the GPU may wait for a rank that is gone, and an ordinary end waits for the GPU
        raise SystemExit(error.exit_code) from None
    except Stopped as stopped:
        if not stopped.is_told and os.environ.get("RANK", "0") == "0":
            print(stopped, file=sys.stderr, flush=True)
        raise SystemExit(stopped.exit_code) from None
    except Exception as error:
        from verl.redaction import redact_text

        error.args = tuple(redact_text(arg) if isinstance(arg, str) else arg for arg in error.args)  # its traceback is printed
        raise
    raise SystemExit(0)


# Checks of the value of a key


def one_of(key: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        from verl.choices import refusal

        what, fix = refusal(value, allowed)
        raise UserError(what, where=key, fix=fix)


def at_least(key: str, value: float | None, least: float) -> None:
    if value is not None and not (isinstance(value, (int, float)) and least <= value < float("inf")):
        raise UserError(f"found {value!r}", where=key, fix=f"give a number of at least {least}")


def is_share(key: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise UserError(f"{value} is not a share", where=key, fix="give a number from 0 to 1")
