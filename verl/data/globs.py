"""Globs of data files, within a time: `**` follows links, so that it may go round in circles, as below /proc."""

import glob
import sys
import threading
import time

from verl.errors import UserError

SECONDS = 10.0


class _LateError(Exception):
    """The time is up. It is no OSError, which `glob` passes over."""


def expand(pattern: str, key: str) -> list[str]:
    """Return the names that match a glob, in alphabetical order. Raises UserError naming the key: they are not found in time."""
    found: list[list[str] | _LateError] = []
    deadline = time.monotonic() + SECONDS

    def stop_late(*_: object) -> None:
        if time.monotonic() > deadline:
            raise _LateError

    def look() -> None:
        sys.setprofile(stop_late)  # called at each call in this thread alone
        try:
            found.append(glob.glob(pattern, recursive=True))
        except _LateError as error:
            found.append(error)

    thread = threading.Thread(target=look, daemon=True, name="glob")  # a thread, because a call to a disk that does not answer never ends
    thread.start()
    thread.join(SECONDS + 1)
    if not found or isinstance(found[0], _LateError):
        fix = "name a folder with fewer files in it, or write a list of files"
        raise UserError(f"{pattern!r:.200} is not expanded in {SECONDS:.0f} s", where=key, fix=fix)
    return sorted(found[0])
