"""The bytes and lines of an open data file."""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from verl.data.formats.encoding import BOM, marked, not_utf8, wide
from verl.data.row import Fault, Wanted, unusable
from verl.errors import UserError

MAX_ROW_BYTES = 64 * 2**20  # a longer line is a broken file or a decompression bomb, not a row
MAX_BLANK_BYTES = 2**20  # of consecutive blank lines
MAX_WHOLE_FILE_BYTES = 2 * 2**30  # for what is read into memory: JSON arrays, UTF-16, and gzipped Parquet
MARK = BOM.decode()
MARK_INSIDE = "a byte order mark (U+FEFF) inside the file, as joining files leaves it"
REMOVE_MARKS = r"remove the marks, for example with `sed -i 's/\xEF\xBB\xBF//g'`"


@dataclass
class File:
    """An open file.

    Attributes:
        stream: the decompressed bytes.
        share: returns the fraction that has been read, from 0 to 1.
        wanted: the columns to read, as in `verl.data.source.read_rows_and_errors`. Formats whose columns are not stored apart read all.
    """

    path: Path
    stream: io.BufferedReader
    share: Callable[[], float]
    wanted: Wanted | None = None


@dataclass(frozen=True)
class Line:
    """A line of text, without its end.

    Attributes:
        number: from 1.
        text: bytes that are not UTF-8 are surrogates (Python's surrogateescape).
        bad: the first byte that is not UTF-8, and its offset in the file; None if there is none.
    """

    number: int
    text: str
    bad: tuple[int, int] | None = None


Find = Callable[[str], Fault | None]


def as_utf8(file: File) -> io.BufferedReader:
    """Return the file's stream, decoded from UTF-16 or UTF-32 if a byte order mark says so.

    Raises:
        UserError: the file is in one of these without a byte order mark, or damaged.
    """
    head = file.stream.peek(4096)[:4096]
    if name := marked(head):
        try:
            return io.BufferedReader(io.BytesIO(whole(file).decode(name).encode()))
        except UnicodeError as error:
            what = f"begins with the byte order mark of {name}, but is not {name}: {error}"
            raise UserError(what, where=str(file.path), fix="write the file again, as UTF-8") from error
    if name := wide(head):
        order = "little" if name.endswith("LE") else "big"
        found = f"the file is {name[:6]} ({order}-endian) without a byte order mark"
        raise UserError(found, where=str(file.path), fix=f"convert it with `iconv -f {name} -t UTF-8`")
    return file.stream


def raw_lines(file: File) -> Iterator[tuple[int, int, bytes]]:
    """Yield each line's number from 1, byte offset, and bytes without the line end.

    Only a line feed ends a line; in a file that begins without one, a carriage return does, as Excel for old Macs writes it.
    """
    offset = _skip_mark(file.stream)
    head = file.stream.peek()
    source = io.BytesIO(whole(file).replace(b"\r\n", b"\n").replace(b"\r", b"\n")) if b"\r" in head and b"\n" not in head else file.stream
    number, blank = 0, 0
    while line := source.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(line) > MAX_ROW_BYTES:
            found = f"the line is longer than {MAX_ROW_BYTES // 2**20} MiB"
            raise UserError(found, where=f"{file.path}:{number}", fix="write one row per line")
        text = line.removesuffix(b"\n").rstrip(b"\r")
        blank = 0 if text and not text.isspace() else blank + len(line)
        if blank > MAX_BLANK_BYTES:
            found = f"more than {MAX_BLANK_BYTES // 2**20} MiB of blank lines, as in a decompression bomb"
            raise UserError(found, where=f"{file.path}:{number}", fix="remove the blank lines")
        yield number, offset, text
        offset += len(line)


def lines(file: File) -> Iterator[Line]:
    """Yield the lines of text. Raises UserError if one is too long."""
    for number, offset, line in raw_lines(file):
        text, bad = decoded(line, offset)
        yield Line(number, text, bad)


def decoded(data: bytes, offset: int) -> tuple[str, tuple[int, int] | None]:
    """Decode UTF-8; also return the first byte that is not, and its offset in the file."""
    try:
        return data.decode("utf-8"), None
    except UnicodeDecodeError as error:
        return data.decode("utf-8", errors="surrogateescape"), (data[error.start], offset + error.start)


def finder(path: Path, bad: tuple[int, int] | None) -> Find:
    """Return the function that says why a text of a line, or of several, cannot be used. `bad` is as in Line."""
    return unusable if bad is None else partial(_not_text, path, *bad)


def _not_text(path: Path, byte: int, offset: int, text: str) -> Fault | None:
    is_bad = any("\udc80" <= character <= "\udcff" for character in text)
    return not_utf8(path, byte, offset) if is_bad else unusable(text)


def _skip_mark(stream: io.BufferedReader) -> int:
    return len(stream.read(len(BOM))) if stream.peek(len(BOM)).startswith(BOM) else 0


def whole_text(file: File) -> tuple[str, tuple[int, int] | None]:
    """Return the file's text, as `decoded` does."""
    offset = _skip_mark(file.stream)
    return decoded(whole(file), offset)


def whole(file: File) -> bytes:
    """Return the rest of the file. Raises UserError if that is too large for memory."""
    data = file.stream.read(MAX_WHOLE_FILE_BYTES + 1)
    if len(data) > MAX_WHOLE_FILE_BYTES:
        found = f"larger than {MAX_WHOLE_FILE_BYTES // 2**30} GiB, in a format that must fit into memory"
        raise UserError(found, where=str(file.path), fix="write it as JSONL in UTF-8, one object per line, or as plain Parquet")
    return data
