"""Atomic and durable file writes."""

import os
from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Replace a file atomically: a reader sees the old text or the new one, never a part, even after a power failure."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    flush(temporary)
    os.replace(temporary, path)


def append_text(path: Path, text: str) -> None:
    """Append to a file all of the text, or nothing of it if that fails."""
    with path.open("ab", buffering=0) as file:
        end, rest = file.tell(), memoryview(text.encode())
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            file.truncate(end)
            raise


def flush(path: Path) -> None:
    """Wait until a file's content, or a directory's entries, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
