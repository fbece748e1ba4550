"""The data files that a config names, and their rows in order. A data set on the Hub is a source too."""

import glob
import hashlib
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from verl.data.row import ReadProgress, Row, Rows, Wanted, describe
from verl.errors import UserError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[^:/]*){0,2}")
FORMS = "give a path, a glob, a Hub data set id (org/name, org/name:config or org/name:config:split), or a list of these"
LARGE_BYTES = 32 * 2**20
Source = Path | str  # a local file, or a data set on the Hub as `org/name:config:split`


@dataclass(frozen=True)
class Entry:
    """An entry of a list of files.

    Attributes:
        name: the path, glob or Hub id, as the config has it.
        weight: relative number of its rows in an epoch; None: not given.
        rows: number of its rows in each epoch; None: not given.
    """

    name: str
    sources: list[Source]
    weight: float | None = None
    rows: int | None = None

    @property
    def has_share(self) -> bool:
        return self.weight is not None or self.rows is not None


def read_rows(files: object, key: str = "data.train_files", wanted: Wanted | None = None) -> Iterator[Row]:
    """Yield the rows of the files, in order.

    Args:
        files, key: as in `resolve_entries`.
        wanted: as in `read_rows_and_errors`.
    Raises:
        UserError: a file is missing or its format unknown, or a row is invalid.
    """
    return valid_rows(resolve_files(files, key), ReadProgress(), wanted)


def valid_rows(sources: list[Source], progress: ReadProgress, wanted: Wanted | None = None) -> Iterator[Row]:
    """Yield the rows of the sources. Raises UserError if one is invalid."""
    for row in read_rows_and_errors(sources, progress, wanted):
        if isinstance(row, UserError):
            raise row
        yield row


def read_rows_and_errors(sources: list[Source], progress: ReadProgress | None = None, wanted: Wanted | None = None) -> Rows:
    """Yield the rows of the sources; an invalid row is replaced by its error.

    Args:
        wanted: returns the columns that the caller uses; None: all. Parquet, Arrow and the Hub decode no others, and a row has the names
            of the others in `Row.unread`.
    Raises:
        UserError: a file cannot be read any further.
    """
    from verl.data.formats.files import file_rows  # whoever has the rows in the cache reads no file

    progress = progress or ReadProgress()
    progress.rows_by_source = [0] * len(sources)
    for number, source in enumerate(sources):
        progress.source, within = number, ReadProgress()
        for row in _hub_rows(source, wanted) if isinstance(source, str) else file_rows(source, within, wanted):
            progress.share = (number + within.share) / len(sources)
            progress.rows_by_source[number] += 1
            yield row
        if not progress.rows_by_source[number]:
            raise UserError("the file has no rows", where=str(source), fix="add rows to it, or remove it from the list of files")


def resolve_files(files: object, key: str = "data.train_files") -> list[Source]:
    """Return the sources of `resolve_entries`, in order."""
    return sources_of(resolve_entries(files, key))


def sources_of(entries: Sequence[Entry]) -> list[Source]:
    return [source for entry in entries for source in entry.sources]


def resolve_entries(files: object, key: str = "data.train_files") -> list[Entry]:
    """Return what a config value names, with globs expanded in alphabetical order.

    Args:
        files: a path, a glob, the id of a data set on the Hub, or a list of these. An entry of the list may also be an object with `path`
            and `weight`, or `path` and `rows`, if the key names training data.
        key: config key that names the files, for errors. Of a data set on the Hub without a named split, `data.train_files` takes the
            split `train`; any other key takes `test`, or else `validation`.
    Raises:
        UserError: the value names no file, or names a directory, a missing file or an unreadable one.
    """
    given = list(files) if isinstance(files, (list, tuple)) else [files]
    if not given:
        raise UserError("names no file", where=key, fix=FORMS)
    entries = [_with_share(one, key) if isinstance(one, Mapping) else _entry(one, key) for one in given]
    if any(entry.weight is not None for entry in entries) and any(entry.rows is not None for entry in entries):
        raise UserError("some entries have a weight, others a number of rows", where=key, fix="give weights only, or numbers of rows only")
    return entries


def is_training(key: str) -> bool:
    """Return whether a config key names rows to train on, rather than rows to evaluate with."""
    return key.endswith("train_files")


def _with_share(given: Mapping[object, object], key: str) -> Entry:
    from verl.data.shares import read_share  # most lists of files have none

    name, weight, rows = read_share(given, key, for_training=is_training(key))
    return Entry(name, _resolve(name, key), weight, rows)


def _entry(given: object, key: str) -> Entry:
    name = str(given) if isinstance(given, Path) else given
    if not isinstance(name, str) or not name:
        raise UserError(f"found {describe(given)}", where=key, fix=FORMS)
    return Entry(name, _resolve(name, key))


def _resolve(entry: str, key: str) -> list[Source]:
    if "\0" in entry:
        raise UserError(f"found {describe(entry)}", where=key, fix=FORMS)
    path = Path(os.path.expanduser(entry))  # Path's own raises an error for a user that does not exist
    if _exists(path, key):
        return [_checked(path, key)]
    from verl.data.path_errors import no_file  # most names are those of files

    if glob.has_magic(entry):
        from verl.data.globs import expand

        found = expand(str(path), key)
        if not found:
            raise no_file(entry, key)
        return [_checked(Path(name), key) for name in found]
    if is_on_hub(entry):
        from verl.data import hub  # it takes half a second, and most data comes from files

        return [hub.resolve(entry, for_training=is_training(key))]
    raise no_file(entry, key)


def is_on_hub(entry: str) -> bool:
    """Return whether a name is that of a data set on the Hub, and not of a file or of files that match it."""
    from verl.data.path_errors import is_file_name

    path = Path(os.path.expanduser(entry))
    is_name = HUB_ID.fullmatch(entry) is not None and not is_file_name(entry)
    return is_name and not path.exists() and not path.parent.is_dir()


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
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{str(path)!r} cannot be opened: {reason}", where=key, fix="check the path and its permissions") from error


def _checked(path: Path, key: str) -> Path:
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        from verl.data.path_errors import files_in

        raise UserError(f"{str(path)!r} is a directory", where=key, fix=files_in(path, for_training=is_training(key)))
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


def size_bytes(sources: list[Source], wanted: Wanted | None = None) -> int:
    """Return the total size of the sources' files; of large Parquet and Arrow files, that of the columns that are read."""
    size = sum(path.stat().st_size for path in _files(sources))
    if size < LARGE_BYTES:
        return size
    from verl.data.formats.arrow import read_bytes  # small files have no need of it

    return sum(read_bytes(path, wanted) for path in _files(sources))


def _files(sources: list[Source]) -> Iterator[Path]:
    for source in sources:
        if isinstance(source, str):
            from verl.data import hub

            yield from hub.files(source)
        else:
            yield source


def _hub_rows(source: str, wanted: Wanted | None) -> Rows:
    from verl.data import hub

    return hub.rows(source, wanted)


def describe_sources(entries: Sequence[Entry]) -> list[str]:
    """Return what is to be said about the choice of the sources, one line each: the configuration and the split of data sets on the Hub."""
    on_hub = [source for source in sources_of(entries) if isinstance(source, str)]
    if not on_hub:
        return []
    from verl.data import hub

    return [hub.describe(source) for source in on_hub]
