"""The folder on disk of a program that Landlock holds: how much it has, and its removal. A program may have made it hard to read."""

import contextlib
import os
import stat
from collections.abc import Iterator
from itertools import count

BLOCK = 512  # bytes in `st_blocks`
DEEPEST = 50  # folders in folders
AS_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


class _UnmeasurableError(Exception):
    """A folder is too deep, or cannot be listed."""


def holds_more_than(folder: str, process: int, size: int, files: int) -> bool:
    """Return whether a program has more bytes or files in its folder; also if its folders are so that they cannot be counted.

    Args:
        process: of the program. Files that it has deleted and still has open count too.
    """
    total = 0
    try:
        for number, found in enumerate([*_open_files(process), *_sizes(folder, None, 0, files)], start=1):
            total += found
            if total > size or number > files:
                return True
    except _UnmeasurableError:
        return True
    return False


def _open_files(process: int) -> Iterator[int]:
    """Yield the sizes of open files that have no name any more."""
    with contextlib.suppress(OSError):
        for descriptor in os.listdir(f"/proc/{process}/fd"):
            with contextlib.suppress(OSError):
                found = os.stat(f"/proc/{process}/fd/{descriptor}")
                if stat.S_ISREG(found.st_mode) and found.st_nlink == 0:
                    yield found.st_blocks * BLOCK


def _sizes(name: str, parent: int | None, depth: int, most: int) -> Iterator[int]:
    """Yield the size of each file and folder below a folder, by descriptors: names of paths could be too long for the kernel."""
    if depth > DEEPEST:
        raise _UnmeasurableError
    try:
        here = os.open(name, AS_FOLDER, dir_fd=parent)
    except FileNotFoundError:  # it has just been removed
        return
    except OSError as error:
        raise _UnmeasurableError from error
    try:
        for index, entry in enumerate(os.listdir(here)):
            if index > most:
                raise _UnmeasurableError
            with contextlib.suppress(FileNotFoundError):
                found = os.stat(entry, dir_fd=here, follow_symlinks=False)
                yield found.st_blocks * BLOCK
                if stat.S_ISDIR(found.st_mode):
                    yield from _sizes(entry, here, depth + 1, most)
    finally:
        os.close(here)


def remove(folder: str) -> None:
    """Remove a folder whose program has ended. What folders in it hold is moved up first, so that no depth is too deep."""
    with contextlib.suppress(OSError):
        top, numbers = os.open(folder, AS_FOLDER), count()
        try:
            while names := os.listdir(top):
                for name in names:
                    _remove_entry(name, top, numbers)
        finally:
            os.close(top)
        os.rmdir(folder)


def _remove_entry(name: str, top: int, numbers: Iterator[int]) -> None:
    if not stat.S_ISDIR(os.stat(name, dir_fd=top, follow_symlinks=False).st_mode):
        os.unlink(name, dir_fd=top)
        return
    os.chmod(name, 0o700, dir_fd=top)
    here = os.open(name, AS_FOLDER, dir_fd=top)
    try:
        for inner in os.listdir(here):
            os.rename(inner, f".moved-{next(numbers)}-{os.urandom(4).hex()}", src_dir_fd=here, dst_dir_fd=top)
    finally:
        os.close(here)
    os.rmdir(name, dir_fd=top)
