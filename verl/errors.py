"""The error that a user can fix: what is wrong, where, and what to do. It ends a command with exit code 2, without a traceback."""

import os
import sys
from collections.abc import Callable
from functools import partial
from typing import NoReturn

EXIT_CODE = 2


class UserError(Exception):
    """An invalid input.

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


def print_error(error: UserError) -> None:
    """Print to standard error, on rank 0 only: under torchrun, every process raises the same error."""
    if os.environ.get("RANK", "0") != "0":
        return
    print(f"error: {error}", file=sys.stderr, flush=True)


def exit_on_user_error(main: Callable[..., object], *args: object) -> NoReturn:
    """Run `main(*args)` as a command: a UserError is printed and becomes exit code 2."""
    try:
        main(*args)
    except UserError as error:
        print_error(error)
        raise SystemExit(EXIT_CODE) from None
    raise SystemExit(0)
