"""Atomic and durable file writes. None of them follows a link, so a link in a shared directory cannot send a write elsewhere."""

import errno
import os
import re
from pathlib import Path

UNFINISHED = re.compile(r".+\.[0-9a-f]{16}\.tmp")  # what replace_text writes, and leaves behind if it is killed


_NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # nor is a pipe waited for


def replace_text(path: Path, text: str, *, private: bool = False) -> None:
    """Replace a file atomically: a reader sees the old text or the new one, never a part, even after a power failure.

    Args:
        private: only the owner can read the file, because it holds settings.
    """
    temporary = path.with_name(f"{path.name}.{os.urandom(8).hex()}.tmp")  # nobody can guess the name and put a link there
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_LINK, 0o600 if private else 0o666)
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
        flush(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def real_folder(path: Path) -> Path:
    """Return a folder, which is created if it is missing. Raises OSError: it is a link or a file."""
    path.mkdir(exist_ok=True)
    if path.is_symlink():
        raise OSError(errno.ELOOP, "is a link", str(path))
    return path


def owner_only(path: str, flags: int) -> int:
    """Open a file that only its owner can read: the `opener` of Python's `open`. Raises OSError: it is a link."""
    return os.open(path, flags | _NO_LINK, 0o600)


def no_link(path: str, flags: int) -> int:
    """Open a file: the `opener` of Python's `open`. Raises OSError: it is a link."""
    return os.open(path, flags | _NO_LINK, 0o666)


def append_text(path: Path, text: str, *, private: bool = False) -> None:
    """Append to a file all of the text, or nothing of it if that fails. Only the owner can read a new file if it is `private`."""
    with open(path, "ab", buffering=0, opener=owner_only if private else no_link) as file:
        end, rest = file.tell(), memoryview(text.encode())
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            file.truncate(end)
            raise


def flush(path: Path) -> None:
    """Wait until a file's content, or a directory's entries, are on disk."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
