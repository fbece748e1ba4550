"""Regular files alone are opened for reading: to open a named pipe or a device waits for a writer, perhaps for ever.

A file may also be of any size in little space, because holes take none. What is read whole has a limit.
"""

import os
import stat
from pathlib import Path

from verl.errors import UserError

MAX_BYTES = 64 * 2**20  # a manifest of 100,000 files has 20 MB

_KINDS = {stat.S_IFDIR: "a directory", stat.S_IFLNK: "a link", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}


def open_file(path: Path, *, follow: bool = False) -> int:
    """Open a regular file for reading, and return its descriptor.

    Args:
        follow: links are followed, as in the Hub's cache.
    Raises:
        OSError: also for a pipe, a device or a directory, and for a link that is not followed.
    """
    no_link = 0 if follow else getattr(os, "O_NOFOLLOW", 0)
    handle = os.open(path, os.O_RDONLY | no_link | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError("is not a regular file")
    return handle


def read(path: Path, most: int = MAX_BYTES, *, follow: bool = False) -> bytes:
    """Read a regular file. Raises OSError: it cannot be opened, see `open_file`, or has more bytes than `most`."""
    with os.fdopen(open_file(path, follow=follow), "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(f"is larger than {most:,} bytes")
    return content


def check_directory(path: Path, where: str, fix: str) -> None:
    """Raise UserError if a directory cannot be made or written at a path, such as one that goes through a file."""
    there = next((one for one in (path, *path.parents) if os.path.lexists(one)), None)
    if there is not None and not there.is_dir():
        kind = "a link that leads nowhere" if there.is_symlink() and not there.exists() else "a file"
        what = f"is {kind}, and a directory is wanted" if there == path else f"{there} is {kind}, so there can be no directory in it"
        raise UserError(what, where=where, fix=fix)
    if there is not None and not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"cannot be written: {there} is not yours to write" if there != path else "cannot be written", where=where, fix=fix)


def check_output(path: Path) -> None:
    """Make the folder of a file that will be written. Raises UserError: it cannot be made or written, or no file is at the path."""
    path, fix = path.expanduser(), "choose another folder"
    check_directory(path.parent, str(path.parent), fix)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"its folder cannot be made: {error.strerror}", where=str(path), fix=fix) from error
    check_regular(path, "give the name of a file", follow=True)
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError("cannot be written: permission denied", where=str(path), fix=fix)


def check_regular(path: Path, fix: str, *, follow: bool = False) -> None:
    """Raise UserError if there is something else than a regular file at a path; nothing at all is right too."""
    try:
        mode = (path.stat() if follow else path.lstat()).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        raise UserError(f"is {_KINDS.get(stat.S_IFMT(mode), 'a device')}, expected a file", where=str(path), fix=fix)
