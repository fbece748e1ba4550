"""Open a data file, find its format, and read its rows. Any file may be gzipped.

Every row has its location, such as `train.jsonl:17`. Nothing is repaired silently: an invalid row is an error with its location, and so is
an invalid value where it is read.
"""

import gzip
import io
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from verl.data.formats.csv import csv_rows
from verl.data.formats.encoding import BOM
from verl.data.formats.json import json_array_rows, json_lines_rows
from verl.data.formats.stream import File, as_utf8
from verl.data.formats.text import text_rows
from verl.data.row import ReadProgress, Rows, Wanted
from verl.errors import UserError

JSON_SUFFIXES, TEXT_SUFFIXES, TABLE_SUFFIXES = (".jsonl", ".ndjson", ".json"), (".txt", ".md"), (".csv", ".tsv")
SUFFIXES = (*JSON_SUFFIXES, *TABLE_SUFFIXES, *TEXT_SUFFIXES, ".parquet", ".arrow")
FORMATS = f"{', '.join(SUFFIXES)}, each also with .gz"
NOT_READ = {
    b"\x28\xb5\x2f\xfd": ("compressed with Zstandard", "decompress it, or compress it with gzip"),
    b"BZh": ("compressed with bzip2", "decompress it, or compress it with gzip"),
    b"\xfd7zXZ": ("compressed with xz", "decompress it, or compress it with gzip"),
    b"PK\x03\x04": ("a ZIP archive, or a spreadsheet such as Excel's", "save a spreadsheet as CSV UTF-8, or unpack the archive"),
    b"\xd0\xcf\x11\xe0": ("an old Excel or Word document", "save it as CSV UTF-8"),
    b"version https://git-lfs": ("a Git LFS pointer in place of the data", "run `git lfs pull` in its repository"),
    b"<!DOCTYPE": ("a web page", "download the data itself, not the page that shows it"),
    b"<html": ("a web page", "download the data itself, not the page that shows it"),
}


def file_rows(path: Path, progress: ReadProgress, wanted: Wanted | None = None) -> Rows:
    """Yield the rows of one file.

    Args:
        progress: updated with the fraction of the file that has been read.
        wanted: as in `verl.data.source.read_rows_and_errors`.
    Raises:
        UserError: the format is unknown, or the file is damaged and cannot be read any further.
    """
    size = path.stat().st_size
    with path.open("rb") as raw:
        try:
            stream = _decompressed(raw)  # stays open while the reader takes another one, decoded from it
            file = File(path, stream, lambda: raw.tell() / size, wanted)
            for row in _reader(file)(file):
                progress.share = file.share()
                yield row
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            found = f"the gzip stream is damaged at byte {raw.tell():,}: {error}"
            raise UserError(found, where=str(path), fix="copy it again, or compress it again") from error
        except OSError as error:
            raise UserError(f"cannot be read: {error.strerror or error}", where=str(path), fix="copy the file again") from error


def _decompressed(raw: BinaryIO) -> io.BufferedReader:
    magic = raw.read(2)
    raw.seek(0)
    return io.BufferedReader(gzip.GzipFile(fileobj=raw) if magic == b"\x1f\x8b" else raw, buffer_size=2**18)  # type: ignore[arg-type]


def _reader(file: File) -> Callable[[File], Rows]:
    """Return the reader of the file's format, detected from its first bytes and then from its name."""
    path, head, suffix = file.path, file.stream.peek(4096), suffix_of(file.path)
    for magic, (found, fix) in NOT_READ.items():
        if head.startswith(magic):
            raise UserError(f"the file is {found}", where=str(path), fix=fix)
    if head.startswith((b"PAR1", b"ARROW1")) or suffix == ".arrow":
        from verl.data.formats.arrow import arrow_rows, parquet_rows

        return parquet_rows if head.startswith(b"PAR1") else arrow_rows
    if suffix == ".parquet":
        raise UserError("not a Parquet file: it does not begin with PAR1", where=str(path), fix="write it again, or correct its suffix")
    file.stream = as_utf8(file)
    if suffix in TABLE_SUFFIXES:
        return csv_rows
    if suffix in TEXT_SUFFIXES:
        return text_rows
    first = file.stream.peek(4096).removeprefix(BOM).lstrip()[:1]
    if suffix in (".yaml", ".yml") and first not in (b"{", b"["):
        raise UserError("the file is YAML, which is not read as data", where=str(path), fix="write its rows as JSONL, one object per line")
    if suffix not in JSON_SUFFIXES and first not in (b"{", b"["):
        raise UserError(f"unknown file format: {path.name!r}", where=str(path), fix=f"rename it with the suffix of its format: {FORMATS}")
    return json_array_rows if first == b"[" else json_lines_rows


def suffix_of(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix
