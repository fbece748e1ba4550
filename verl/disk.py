"""Errors of the disk, described in one line with the free space, and checks of the space before something is written."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from verl.errors import DiskError, UserError

# These are errors of a disk, or of this process's access to it, even where the library does not name a file.
OF_DISKS = {
    number
    for name in ("ENOSPC", "EIO", "EROFS", "EDQUOT", "EFBIG", "EACCES", "EPERM", "EMFILE", "ENFILE", "ESTALE", "ENODEV", "ENXIO", "EBUSY")
    if (number := getattr(errno, name, None)) is not None
}
# These are errors of a name that was given, or of what is in its place.
OF_NAMES = {errno.ENAMETOOLONG, errno.ELOOP, errno.EISDIR, errno.ENOTDIR}
NO_SPACE = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}
NO_FILES = {errno.EMFILE, errno.ENFILE}
# Libraries in Rust and C++ name the system's error only in their text: "(os error 28)", "[errno 28]", "[Errno 28]".
IN_TEXT = re.compile(r"\(os error (\d+)\)|\[[eE]rrno (\d+)\]")
# PyTorch's writer does not keep the system's error.
CUT_SHORT = re.compile(r"unexpected pos \d+ vs \d+|iostream error|failed writing file")
MOST_SHOWN = 200  # characters of a name
FULL_BYTES = 16 * 2**20  # a disk with less space is full
MAKE_ROOM = "make room, or choose a directory on another disk"


def size_text(size: float) -> str:
    """Write a number of bytes with its unit, such as `1.2 GiB`."""
    for unit, of_unit in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= of_unit:
            return f"{size / of_unit:,.1f} {unit}"
    return f"{size:,.0f} bytes"


def free_bytes(path: Path | str) -> int | None:
    """Return the free space of the disk that a path is on, or will be on; None if the disk does not tell."""
    place = Path(path).absolute()
    try:
        return shutil.disk_usage(next(one for one in (place, *place.parents) if one.exists())).free
    except (OSError, StopIteration):
        return None


def folder_bytes(folder: Path) -> int:
    """Return the size of a folder's files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def disk_error(
    error: BaseException,
    *,
    where: Path | str | None = None,
    needed: int | None = None,
    fix: str | None = None,
    doing: str = "written",
) -> UserError | None:
    """Return the one-line error for an exception that comes from a disk; None if it comes from something else.

    It is a DiskError, unless a name is wrong, such as that of a directory in place of a file.

    Args:
        where: what was being written or read; the exception's own file name comes first.
        needed: size of what was being written, in bytes.
        fix: what to do if there is no space; None: make room.
        doing: what cannot be done, such as "written or read".
    """
    found = next((one for one in _causes(error) if _number(one) is not None or CUT_SHORT.search(str(one))), None)
    if found is None or isinstance(found, UserError):
        return None
    number = _number(found)
    if number is None or (number not in OF_DISKS and not (isinstance(found, OSError) and found.filename is not None)):
        if not CUT_SHORT.search(str(found)):
            return None
        number = None
    place = _file_of(found) or (None if where is None else str(where))
    if number in OF_NAMES:
        return _error_of_name(number, place, doing)
    free = None if place is None else free_bytes(place)
    if number is None and free is not None and free < FULL_BYTES:
        number = errno.ENOSPC
    reason = "the file was cut short (a quota, a limit on file sizes, or a failing disk)" if number is None else os.strerror(number)
    what = f"cannot be {doing}: {reason}{_room(needed, free)}"
    described = DiskError(what, where=place, fix=_fix(number, fix))
    described.tells = True  # perhaps only this rank raises it
    return described


def _error_of_name(number: int, place: str | None, doing: str) -> UserError:
    where = None if place is None else place if len(place) <= MOST_SHOWN else f"{place[:MOST_SHOWN]}… ({len(place):,} characters)"
    fix = "give a shorter name" if number == errno.ENAMETOOLONG else "remove what is in its place, or give another name"
    described = UserError(f"cannot be {doing}: {os.strerror(number)}", where=where, fix=fix)
    described.tells = True  # perhaps only this rank raises it
    return described


def full_disk(where: Path, *, needed: int | None = None, fix: str = MAKE_ROOM) -> DiskError | None:
    """Return the error of a disk with hardly any space; None if it has more. Libraries raise errors of many kinds on such a disk."""
    free = free_bytes(where)
    if free is None or free >= FULL_BYTES:
        return None
    return DiskError(f"cannot be written: {os.strerror(errno.ENOSPC)}{_room(needed, free)}", where=str(where), fix=fix)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield the exception, those that it was raised from, and those of other processes that it holds."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop(0)
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            yield one
            failures = getattr(one, "failures", None)  # of torch.distributed.checkpoint, by rank
            waiting += [failure[0] for failure in failures.values()] if isinstance(failures, dict) else []
            waiting += [one.__cause__, one.__context__]


def _number(error: BaseException) -> int | None:
    """Return the system's number of an error, which may be in its text only."""
    if isinstance(error, (ConnectionError, TimeoutError)):
        return None
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    found = IN_TEXT.search(str(error))
    return int(found[1] or found[2]) if found else None


def _file_of(error: BaseException) -> str | None:
    name = error.filename if isinstance(error, OSError) else None
    return os.fsdecode(name) if isinstance(name, (str, bytes, os.PathLike)) else None


def _room(needed: int | None, free: int | None) -> str:
    parts = [f"{size_text(size)} {verb}" for size, verb in ((needed, "needed"), (free, "free")) if size is not None]
    return f" ({', '.join(parts)})" if parts else ""


def _fix(number: int | None, fix: str | None) -> str:
    if number in NO_FILES:
        return "raise the limit on open files, as with `ulimit -n 65536`"
    if number is None or number in NO_SPACE:
        return fix or MAKE_ROOM
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"change its permissions, or how its disk is mounted; or {fix or 'choose another directory'}"
    if number == errno.ENOENT:
        return "it was there before: find out what removed it, and start again"
    return f"check the disk (`dmesg` shows its errors); or {fix or 'choose another directory'}"


@contextmanager
def disk_errors_named(where: Path | str, *, needed: int | None = None, fix: str | None = None) -> Iterator[None]:
    """Raise a DiskError in place of an error of the disk. The arguments are those of `disk_error`."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:  # torch's CheckpointException is no Exception
        if (found := disk_error(error, where=where, needed=needed, fix=fix)) is None:
            raise
        raise found from error


def check_room(where: Path, needed: int, *, what: str, fix: str) -> None:
    """Raise DiskError if less than `needed` bytes are free.

    Args:
        what: what is to be written, such as "a checkpoint".
    """
    free = free_bytes(where)
    if free is not None and free < needed:
        raise DiskError(f"no space left on the disk for {what}{_room(needed, free)}", where=str(where), fix=fix)


def unwritten(error: OSError, path: Path) -> str:
    """Return the warning of a log or metrics file that cannot be written while the run continues."""
    kept = "; its lines are kept in memory until they can be written" if path.suffix in (".jsonl", ".log") else ""
    return f"warning: {disk_error(error, where=path) or error}\n  the run continues{kept}"


def silence_output(error: BaseException) -> str:
    """Send standard output nowhere from now on, and return a line that says so.

    What could not be written would be tried again, and fail again, when the process ends.
    """
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    return f"warning: standard output cannot be written ({error}); the run continues, and this file has every line"
