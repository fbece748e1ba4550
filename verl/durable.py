"""Atomic and durable file writes."""

import os
from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Replace a file atomically: a reader sees the old text or the new one, never a part, even after a power failure."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    flush(temporary)
    os.replace(temporary, path)


def flush(path: Path) -> None:
    """Wait until a file's content, or a directory's entries, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
