"""Read one file into rows: JSON Lines, a JSON array, CSV, plain text or Parquet, optionally gzipped.

Every row has its location, such as `train.jsonl:17`. Nothing is repaired silently: an invalid row is an error with its location.
"""

import csv
import difflib
import functools
import gzip
import io
import itertools
import json
import math
import operator
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from verl.errors import UserError

MAX_ROW_BYTES = 64 * 2**20  # a longer line is a broken file or a decompression bomb, not a row
MAX_WHOLE_FILE_BYTES = 2 * 2**30  # for formats that are read into memory: JSON arrays and gzipped Parquet
MAX_NESTING = 64
JSON_SUFFIXES, TEXT_SUFFIXES, TABLE_SUFFIXES = (".jsonl", ".ndjson", ".json"), (".txt", ".md"), (".csv", ".tsv")
SUFFIXES = (*JSON_SUFFIXES, *TABLE_SUFFIXES, *TEXT_SUFFIXES, ".parquet")
FORMATS = f"{', '.join(SUFFIXES)}, each also with .gz"
NOT_READ = {
    b"\x28\xb5\x2f\xfd": ("compressed with Zstandard", "decompress it, or compress it with gzip"),
    b"BZh": ("compressed with bzip2", "decompress it, or compress it with gzip"),
    b"\xfd7zXZ": ("compressed with xz", "decompress it, or compress it with gzip"),
    b"PK\x03\x04": ("a ZIP archive or a spreadsheet", "unpack it, or save it as CSV"),
    b"version https://git-lfs": ("a Git LFS pointer in place of the data", "run `git lfs pull` in its repository"),
    b"\xff\xfe": ("UTF-16", "convert it with `iconv -f UTF-16 -t UTF-8`"),
    b"\xfe\xff": ("UTF-16", "convert it with `iconv -f UTF-16 -t UTF-8`"),
}
BOM = b"\xef\xbb\xbf"
NUL = "\0"
NOT_TEXT = re.compile(f"[{NUL}\ud800-\udfff]")


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        where: location: `train.jsonl:17`, `train.json:40 (items[16])`, `train.parquet row 17`; lines and rows count from 1.
        values: value of each column.
        is_text: whether the row is a paragraph of a plain text file, in the column `text`.
    """

    where: str
    values: dict[str, Any]
    is_text: bool = False

    def value(self, column: str, key: str, *, may_be_null: bool = False) -> Any:
        """Return the column's value.

        Args:
            key: config key that names the column, for the error.
        Raises:
            UserError: the column is missing, or null although `may_be_null` is false.
        """
        if column not in self.values:
            found = ", ".join(map(str, self.values)) or "no columns"
            near = difflib.get_close_matches(column, list(self.values), n=1)
            fix = f"did you mean {key}={near[0]}?" if near else f"set {key} to the right column"
            raise UserError(f"column {column!r} is missing (found: {found})", where=self.where, fix=fix)
        if self.values[column] is None and not may_be_null:
            raise UserError(f"column {column!r} is null", where=self.where, fix="fill it in, or remove the row")
        return self.values[column]

    def text(self, column: str, key: str) -> str:
        """Return the column's value, which must be text and not blank. Raises UserError like `value`."""
        value = self.value(column, key)
        if not isinstance(value, str):
            is_chat = isinstance(value, list) and value and isinstance(value[0], dict)
            fix = f"data.messages_key={column} reads chats" if is_chat else "write it as a quoted string"
            raise UserError(f"column {column!r} is {describe(value)}, expected text", where=self.where, fix=fix)
        if not value.strip():
            raise UserError(f"column {column!r} is empty", where=self.where, fix="fill it in, or remove the row")
        return value


def describe(value: object) -> str:
    """Return a value's JSON type and its abbreviated value, such as `a number (42)`."""
    kinds = {bool: "a boolean", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object", type(None): "null"}
    kind = kinds.get(type(value), f"a {type(value).__name__}")
    if value is None:
        return kind
    shown = repr(value)
    return f"{kind} ({shown if len(shown) <= 60 else shown[:59] + '…'})"


Rows = Iterator[Row | UserError]  # an invalid row is replaced by its error


class ReadProgress:
    """Fraction of the input that has been read, from 0 to 1."""

    share = 0.0


@dataclass
class _File:
    """An open file: its decompressed bytes, and the fraction read, from 0 to 1."""

    path: Path
    stream: io.BufferedReader
    share: Callable[[], float]


def file_rows(path: Path, progress: ReadProgress) -> Rows:
    """Yield the rows of one file.

    Args:
        progress: updated with the fraction of the file that has been read.
    Raises:
        UserError: the format is unknown, or the file is damaged and cannot be read any further.
    """
    size = path.stat().st_size
    with path.open("rb") as raw:
        file = _File(path, _decompressed(raw), lambda: raw.tell() / size)
        try:
            for row in _reader(file)(file):
                progress.share = file.share()
                yield row
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            found = f"the gzip stream is damaged at byte {raw.tell():,}: {error}"
            raise UserError(found, where=str(path), fix="copy it again, or compress it again") from error
        except OSError as error:
            raise UserError(f"cannot be read: {error.strerror}", where=str(path), fix="copy the file again") from error


def _decompressed(raw: BinaryIO) -> io.BufferedReader:
    magic = raw.read(2)
    raw.seek(0)
    return io.BufferedReader(gzip.GzipFile(fileobj=raw) if magic == b"\x1f\x8b" else raw, buffer_size=2**18)  # type: ignore[arg-type]


def _reader(file: _File) -> Callable[[_File], Rows]:
    """Return the reader of the file's format, detected from its first bytes and then from its name."""
    path, head, suffix = file.path, file.stream.peek(4096), suffix_of(file.path)
    for magic, (found, fix) in NOT_READ.items():
        if head.startswith(magic):
            raise UserError(f"the file is {found}", where=str(path), fix=fix)
    if head.startswith(b"PAR1"):
        return _parquet_rows
    if suffix == ".parquet":
        raise UserError("not a Parquet file: it does not begin with PAR1", where=str(path), fix="write it again, or correct its suffix")
    if suffix in TABLE_SUFFIXES:
        return _csv_rows
    if suffix in TEXT_SUFFIXES:
        return _text_rows
    first = head.removeprefix(BOM).lstrip()[:1]
    if suffix not in JSON_SUFFIXES and first not in (b"{", b"["):
        raise UserError(f"unknown file format: {path.name!r}", where=str(path), fix=f"rename it with the suffix of its format: {FORMATS}")
    return _json_array_rows if first == b"[" else _json_lines_rows


def suffix_of(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


# Lines of text


def _raw_lines(file: _File) -> Iterator[tuple[int, int, bytes]]:
    """Yield each line's number from 1, byte offset, and bytes without the line end. Only a line feed ends a line."""
    offset = _skip_bom(file.stream)
    number = 0
    while line := file.stream.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(line) > MAX_ROW_BYTES:
            found = f"the line is longer than {MAX_ROW_BYTES // 2**20} MiB"
            raise UserError(found, where=f"{file.path}:{number}", fix="write one row per line")
        yield number, offset, line.removesuffix(b"\n").removesuffix(b"\r")
        offset += len(line)


def _skip_bom(stream: io.BufferedReader) -> int:
    return len(stream.read(len(BOM))) if stream.peek(len(BOM)).startswith(BOM) else 0


def _decode(data: bytes, offset: int, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"not UTF-8: byte 0x{data[error.start]:02x} at offset {offset + error.start:,}",
            where=where,
            fix="convert the file, for example with `iconv -f LATIN1 -t UTF-8`",
        ) from None


def _lines(file: _File) -> Iterator[tuple[int, str]]:
    for number, offset, line in _raw_lines(file):
        yield number, _decode(line, offset, f"{file.path}:{number}")


def _text_rows(file: _File) -> Rows:
    """Yield one row per paragraph, that is, the lines up to a blank one. Its location is its first line."""
    paragraph: list[str] = []
    start = 1
    for number, line in _lines(file):
        if line.strip():
            start = start if paragraph else number
            paragraph.append(line)
        elif paragraph:
            yield _paragraph(file.path, start, paragraph)
            paragraph = []
    if paragraph:
        yield _paragraph(file.path, start, paragraph)


def _paragraph(path: Path, start: int, lines: list[str]) -> Row | UserError:
    return row_or_error(f"{path}:{start}", {"text": "\n".join(lines)}, is_text=True)


def row_or_error(where: str, values: dict[str, Any], *, is_text: bool = False) -> Row | UserError:
    found = _unusable(values)
    return UserError(found, where=where, fix="remove it from the row") if found else Row(where, values, is_text)


def _unusable(value: Any, depth: int = 0) -> str | None:
    """Describe what no tokenizer or template accepts: a NUL, half of a surrogate pair, deep nesting. None if the value is fine."""
    if isinstance(value, str):
        return _unusable_character(value)
    if not isinstance(value, (dict, list)):
        return None
    if depth == MAX_NESTING:
        return f"nested more than {MAX_NESTING} levels deep"
    inside = [*value, *value.values()] if isinstance(value, dict) else value
    return next((found for item in inside if (found := _unusable(item, depth + 1))), None)


def _unusable_character(text: str) -> str | None:
    found = NOT_TEXT.search(text)
    if not found:
        return None
    around = text[max(0, found.start() - 20) : found.end() + 20]
    return f"{'a NUL character' if found[0] == NUL else 'half of a surrogate pair'} in {around!a}"


# JSON


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} occurs twice in one object")
    return values


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits} is too large for a number")
    return number


JSON = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite)
NO_JSON_SPACE = re.compile(r"[^ \t\n\r]")


def _json_lines_rows(file: _File) -> Rows:
    for number, offset, line in _raw_lines(file):
        if not line.strip():
            continue
        where = f"{file.path}:{number}"
        try:
            text = _decode(line, offset, where)
            value, end = JSON.raw_decode(text, _next(text, 0))
            if (extra := _next(text, end)) < len(text):
                raise json.JSONDecodeError("more text after the object", text, extra)
        except UserError as error:
            yield error
        except (ValueError, RecursionError) as error:
            yield _json_error(error, where)
        else:
            yield _json_row(where, value, suspect=_suspect(text))


def _json_array_rows(file: _File) -> Rows:
    """Yield the items of one array, decoded one at a time to get the line of each; invalid JSON ends the reading."""
    text = _whole_text(file)
    suspect, line, counted = _suspect(text), 1, 0
    position = _next(text, text.index("[") + 1)
    item, separator = 0, ","
    if text[position : position + 1] == "]":
        separator, position = "]", _next(text, position + 1)
    while separator == ",":
        line, counted = line + text.count("\n", counted, position), position
        where = f"{file.path}:{line} (items[{item}])"
        try:
            value, end = JSON.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise _json_error(error, where) from None
        yield _json_row(where, value, suspect=suspect)
        item, end = item + 1, _next(text, end)
        separator, position = text[end : end + 1], _next(text, end + 1)
        if separator not in (",", "]"):
            raise UserError(
                "not JSON: no ',' or ']' after the item", where=where, fix="correct the array, or write JSONL, one object per line"
            )
    if position < len(text):
        raise UserError("more text after the array", where=str(file.path), fix="write one array, or JSONL, one object per line")


def _whole_text(file: _File) -> str:
    offset = _skip_bom(file.stream)
    return _decode(_whole(file), offset, str(file.path))


def _whole(file: _File) -> bytes:
    data = file.stream.read(MAX_WHOLE_FILE_BYTES + 1)
    if len(data) > MAX_WHOLE_FILE_BYTES:
        found = f"larger than {MAX_WHOLE_FILE_BYTES // 2**30} GiB, in a format that must fit into memory"
        raise UserError(found, where=str(file.path), fix="write it as JSONL, one object per line, or as plain Parquet")
    return data


def _next(text: str, position: int) -> int:
    """Return the position of the next character that is not whitespace."""
    found = NO_JSON_SPACE.search(text, position)
    return found.start() if found else len(text)


def _suspect(text: str) -> bool:
    """Return whether the values of this JSON text must be checked with `_unusable`."""
    return "\\u" in text or text.count("{") + text.count("[") > MAX_NESTING


def _json_error(error: Exception, where: str) -> UserError:
    if isinstance(error, RecursionError):
        return UserError(f"nested more than {MAX_NESTING} levels deep", where=where, fix="remove the row")
    if isinstance(error, json.JSONDecodeError):
        found = f"not JSON: {error.msg} at column {error.colno}"
        return UserError(found, where=where, fix="write one object per line, or one array of objects")
    return UserError(str(error), where=where, fix="correct the row")


def _json_row(where: str, value: Any, *, suspect: bool) -> Row | UserError:
    if not isinstance(value, dict):
        found = f"found {describe(value)}, expected an object with named columns"
        return UserError(found, where=where, fix='write {"question": …, "answer": …}')
    return row_or_error(where, value) if suspect else Row(where, value)


# Tables


def _csv_rows(file: _File) -> Rows:
    csv.field_size_limit(MAX_ROW_BYTES)
    lines = (f"{line}\n" for _, line in _lines(file))
    first = next(lines, "")
    reader = csv.reader(itertools.chain([first], lines), delimiter=max(",;\t", key=first.count), strict=True)
    start = 1
    header = None
    try:
        for fields in reader:
            where = _span(file.path, start, reader.line_num)
            start = reader.line_num + 1
            if header is None:
                header = _csv_header(where, fields)
            elif fields:
                yield _csv_row(where, header, fields)
    except csv.Error as error:
        fix = 'enclose a field that contains quotes in quotes, and double the quotes inside it: ""'
        raise UserError(f"not CSV: {error}", where=_span(file.path, start, reader.line_num), fix=fix) from None


def _csv_header(where: str, names: list[str]) -> list[str]:
    if not names:
        raise UserError("the first line is blank, expected column names", where=where, fix="begin with a header")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"the header has the column {twice!r} twice", where=where, fix="give each column a different name")
    return names


def _csv_row(where: str, header: list[str], fields: list[str]) -> Row | UserError:
    if len(fields) != len(header):
        found = f"{len(fields)} fields, the header has {len(header)}"
        return UserError(found, where=where, fix="enclose fields that contain commas or line ends in quotes")
    return row_or_error(where, dict(zip(header, fields, strict=True)))


def _span(path: Path, start: int, end: int) -> str:
    return f"{path}:{start}" if end <= start else f"{path}:{start}-{end}"


def _parquet_rows(file: _File) -> Rows:
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    compressed = isinstance(file.stream.raw, gzip.GzipFile)
    try:
        table = parquet.ParquetFile(io.BytesIO(_whole(file)) if compressed else file.path)
        rows = itertools.chain.from_iterable(batch.to_pylist() for batch in table.iter_batches(batch_size=256))
        for number, values in enumerate(rows, start=1):
            file.share = functools.partial(operator.truediv, number, table.metadata.num_rows)
            yield row_or_error(f"{file.path} row {number}", present(values))
    except (pyarrow.ArrowException, OSError) as error:
        found = f"incomplete or damaged Parquet file: {first_line(error)}"
        raise UserError(found, where=str(file.path), fix="write it again, or copy it again") from error


def present(values: dict[str, Any]) -> dict[str, Any]:
    """Remove the nulls inside the columns of an Arrow row: Arrow fills in null for each key that an object lacks."""
    return {name: _without_nulls(value) for name, value in values.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
