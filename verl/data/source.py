"""The data files that a config names, and their rows in order. A data set on the Hub is a source too."""

import difflib
import functools
import glob
import hashlib
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from verl.data.formats import FORMATS, SUFFIXES, ReadProgress, Row, Rows, describe, file_rows, first_line, present, row_or_error, suffix_of
from verl.errors import UserError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
Source = Path | str  # a local file, or the id of a data set on the Hub


def read_rows(files: object, key: str = "data.train_files") -> Iterator[Row]:
    """Yield the rows of the files, in order.

    Args:
        files: a path, a glob, the id of a data set on the Hub (its split `train` is read), or a list of these.
        key: config key that names the files, for errors.
    Raises:
        UserError: a file is missing or its format unknown, or a row is invalid.
    """
    for row in read_rows_and_errors(resolve_files(files, key)):
        if isinstance(row, UserError):
            raise row
        yield row


def read_rows_and_errors(sources: list[Source], progress: ReadProgress | None = None) -> Rows:
    """Yield the rows of the sources; an invalid row is replaced by its error.

    Raises:
        UserError: a file cannot be read any further.
    """
    progress = progress or ReadProgress()
    for number, source in enumerate(sources):
        within, empty = ReadProgress(), True
        for row in _hub_rows(source) if isinstance(source, str) else file_rows(source, within):
            progress.share, empty = (number + within.share) / len(sources), False
            yield row
        if empty:
            raise UserError("the file has no rows", where=str(source), fix="add rows to it, or remove it from the list of files")


def resolve_files(files: object, key: str = "data.train_files") -> list[Source]:
    """Return the files that a config value names, with globs expanded in alphabetical order.

    Returns:
        a path for each file, and a string for each data set on the Hub.
    Raises:
        UserError: the value names no file, or names a directory, a missing file or an unreadable one.
    """
    entries = list(files) if isinstance(files, (list, tuple)) else [files]
    if not entries:
        raise UserError("names no file", where=key, fix="give a path, a glob, a Hub data set id, or a list of these")
    return [source for entry in entries for source in _resolve(entry, key)]


def _resolve(entry: object, key: str) -> list[Source]:
    if isinstance(entry, Path):
        entry = str(entry)
    if not isinstance(entry, str) or not entry:
        raise UserError(f"found {describe(entry)}", where=key, fix="give a path, a glob, a Hub data set id, or a list of these")
    path = Path(entry).expanduser()
    if _exists(path, key):
        return [_checked(path, key)]
    if glob.has_magic(entry):
        found = sorted(glob.glob(str(path), recursive=True))
        if not found:
            raise UserError(f"no file matches {str(path)!r}", where=key, fix=f"check the path; the current folder is {Path.cwd()}")
        return [_checked(Path(name), key) for name in found]
    if HUB_ID.fullmatch(entry) and not path.parent.is_dir() and not entry.lower().endswith((*SUFFIXES, ".gz")):
        return [entry]
    raise _missing(path, key)


def _exists(path: Path, key: str) -> bool:
    try:
        return bool(path.stat())
    except FileNotFoundError:
        if path.is_symlink():
            found = f"{str(path)!r} is a link to {str(path.readlink())!r}, which does not exist"
            raise UserError(found, where=key, fix="restore the file") from None
        return False
    except NotADirectoryError:
        return False
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be opened: {error.strerror}", where=key, fix="check the path and its permissions") from error


def _missing(path: Path, key: str) -> UserError:
    beside = sorted(other.name for other in path.parent.iterdir()) if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, beside, n=1)
    hint = f"did you mean {path.parent / near[0]}? " if near else "" if beside else f"there is no folder {path.parent}. "
    return UserError(f"no file {str(path)!r}", where=key, fix=f"{hint}The current folder is {Path.cwd()}")


def _checked(path: Path, key: str) -> Path:
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        inside = sorted({p.name.removesuffix(".gz").rpartition(".")[2] for p in path.iterdir() if suffix_of(p) in SUFFIXES})
        fix = f"name its files with a glob, such as {path}/*.{inside[0]}" if inside else f"put data files into it ({FORMATS})"
        raise UserError(f"{str(path)!r} is a directory", where=key, fix=fix)
    if not stat.S_ISREG(mode):
        raise UserError(f"{str(path)!r} is not a regular file", where=key, fix="write the rows to a file first")
    try:
        path.open("rb").close()
    except OSError as error:
        found = f"{str(path)!r} cannot be read: {error.strerror} (its mode is {stat.filemode(mode)})"
        raise UserError(found, where=key, fix="change its permissions") from error
    if not path.stat().st_size:
        raise UserError("the file is empty", where=str(path), fix="add rows to it, or remove it from the list of files")
    return path


def content_hash(sources: list[Source]) -> str:
    """Hash the content of the sources, for the cache's file name."""
    digest = hashlib.sha256()
    for path in _files(sources):
        digest.update(f"{path.stat().st_size} ".encode())
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def size_bytes(sources: list[Source]) -> int:
    """Return the total size of the sources' files."""
    return sum(path.stat().st_size for path in _files(sources))


def _files(sources: list[Source]) -> Iterator[Path]:
    for source in sources:
        yield from (Path(part["filename"]) for part in _hub_dataset(source).cache_files) if isinstance(source, str) else [source]


def _hub_rows(name: str) -> Rows:
    for number, values in enumerate(_hub_dataset(name), start=1):
        yield row_or_error(f"{name} row {number}", present(values))


@functools.cache
def _hub_dataset(name: str) -> Any:
    import datasets  # takes half a second, and most data comes from files

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(name, split="train")
    except Exception as error:  # the Hub, the network or the data set's own reader may raise anything
        found = f"no such file, and the data set cannot be loaded from the Hub: {first_line(error)}"
        fix = f"check the name and the network, or give a path; the current folder is {Path.cwd()}"
        raise UserError(found, where=name, fix=fix) from error
