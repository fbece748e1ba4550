"""CSV and TSV: the first line names the columns."""

import csv
import itertools
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from verl.data.formats.stream import MARK, MARK_INSIDE, MAX_ROW_BYTES, REMOVE_MARKS, File, Line, finder, lines
from verl.data.row import NUL, Fault, Row, Rows, checked_row
from verl.errors import UserError

QUOTED = re.compile(r'"[^"]*"')
SEPARATOR_LINE = re.compile(r'"?sep=(.)"?', re.IGNORECASE)  # Excel's, before the header
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
# Until Python 3.11, csv refuses NUL. This stands for it meanwhile; no decoded text contains it.
IN_PLACE_OF_NUL = "\0" if sys.version_info >= (3, 11) else "\ud800"
TWICE = Fault("the header has this column twice", "give each column a different name")


class _Records:
    """The records of a file, each a list of fields.

    Attributes:
        where: location of the newest record.
        bad: the first byte of the newest record that is not UTF-8, as in Line.
        begins_with_mark, has_mark: where the newest record has a byte order mark.
    """

    def __init__(self, file: File):
        self.path, self._lines, self._taken = file.path, lines(file), list[Line]()
        first = next(self._lines, Line(1, ""))
        separator = SEPARATOR_LINE.fullmatch(first.text)
        if separator:
            first = next(self._lines, Line(2, ""))
        self._first = [first, *itertools.islice(self._lines, 1)]
        is_tsv = file.path.name.lower().removesuffix(".gz").endswith(".tsv")
        self.delimiter = separator[1] if separator else "\t" if is_tsv else _delimiter([line.text for line in self._first])
        _refuse_comment(file.path, self._first)

    def __iter__(self) -> Iterator[list[str]]:
        reader = csv.reader(self._taken_lines(), delimiter=self.delimiter, strict=True)
        try:
            for fields in reader:
                yield fields if IN_PLACE_OF_NUL == "\0" else [field.replace(IN_PLACE_OF_NUL, "\0") for field in fields]
                self._taken.clear()
        except csv.Error as error:
            raise self._error(str(error)) from None

    def _taken_lines(self) -> Iterable[str]:
        size = 0
        for line in itertools.chain(self._first, self._lines):
            size = size + len(line.text) if self._taken else len(line.text)
            self._taken.append(line)
            if size > MAX_ROW_BYTES:
                raise self._error(f"a record of more than {MAX_ROW_BYTES // 2**20} million characters")
            yield line.text.replace("\0", IN_PLACE_OF_NUL) + "\n"

    @property
    def where(self) -> str:
        start, end = self._taken[0].number, self._taken[-1].number
        return f"{self.path}:{start}" if end <= start else f"{self.path}:{start}-{end}"

    @property
    def bad(self) -> tuple[int, int] | None:
        return next((line.bad for line in self._taken if line.bad), None)

    @property
    def begins_with_mark(self) -> bool:
        return self._taken[0].text.startswith(MARK)

    @property
    def has_mark(self) -> bool:
        return any(MARK in line.text for line in self._taken)

    def _error(self, what: str) -> UserError:
        fix = 'enclose a field that contains quotes in quotes, and double the quotes inside it: ""'
        if "new-line" in what:
            what, fix = "a carriage return (CR) inside a line that ends with a line feed", "write one kind of line end, as `mac2unix` does"
        return UserError(f"not CSV: {what}", where=self.where, fix=fix)


def csv_rows(file: File) -> Rows:
    """Yield the rows. A blank line is no row."""
    csv.field_size_limit(MAX_ROW_BYTES)
    records, header = _Records(file), None
    for fields in records:
        if header is None:
            header = _header(records, fields)
            unreadable = _unreadable(records, header)
        elif fields:
            yield _row(records, header, fields, unreadable)


def _delimiter(lines: list[str]) -> str:
    """Return what separates the fields: what the first line has most of outside quotes, of those that the second has as many of, if any."""
    header, second = (QUOTED.sub("", line) for line in (*lines, "", "")[:2])
    agreeing = [one for one in DELIMITERS if 0 < header.count(one) == second.count(one)]
    return max(agreeing or DELIMITERS, key=header.count)


def _refuse_comment(path: Path, lines: list[Line]) -> None:
    """Raise UserError if the first line is a comment: it begins with #, and the next line has another number of fields, or is one too."""
    first, second = (line.text for line in (*lines, Line(2, ""), Line(2, ""))[:2])
    separator = _delimiter([second])
    has_other_fields = len({QUOTED.sub("", text).count(separator) for text in (first, second)}) == 2
    if first.startswith("#") and second.strip() and (has_other_fields or (first.startswith("# ") and second.startswith("# "))):
        what = f"the first line is a comment, expected column names: {first!r:.80}"
        raise UserError(what, where=f"{path}:{lines[0].number}", fix="remove the comment, so that the file begins with its header")


def _header(records: _Records, names: list[str]) -> list[str]:
    if not names or not any(name.strip() for name in names):
        raise UserError("the first line is blank, expected column names", where=records.where, fix="begin with a header")
    if any(NUL in name for name in names):
        fix = "write the file again: an interrupted write, or another encoding, leaves NUL bytes"
        raise UserError("the header has NUL bytes", where=records.where, fix=fix)
    return names[: _last(names)]


def _unreadable(records: _Records, header: list[str]) -> dict[str, Fault]:
    """Return the columns whose names cannot be used."""
    find = finder(records.path, records.bad)
    return {name: fault for name in header if (fault := find(name))}


def _row(records: _Records, header: list[str], fields: list[str], unreadable: dict[str, Fault]) -> Row | UserError:
    if records.begins_with_mark:
        return UserError(MARK_INSIDE, where=records.where, fix=f"{REMOVE_MARKS}, and the header that follows one")
    if fields[: len(header)] == header and len(header) > 1:
        return UserError("the header again, as joining files leaves it", where=records.where, fix="remove this line")
    named = len(header)
    if len(fields) != named and (len(fields) < named or _last(fields) > named):
        mark = f"; the record has {MARK_INSIDE}" if records.has_mark else ""
        found = f"{len(fields)} fields, the header has {named}{mark}"
        return UserError(
            found,
            where=records.where,
            fix=f"enclose fields that contain {DELIMITERS.get(records.delimiter, records.delimiter)} or line ends in quotes",
        )
    values: dict[str, str | Fault] = {}
    for name, text in zip(header, fields, strict=False):
        values[name] = TWICE if name in values else text
    for name, fault in unreadable.items():
        del values[name]
        values[name.encode(errors="surrogateescape").decode(errors="backslashreplace")] = fault
    return checked_row(records.where, values, finder(records.path, records.bad))


def _last(fields: list[str]) -> int:
    """Number of fields up to the last one with text: spreadsheets write empty columns behind it."""
    return next((number for number in range(len(fields), 0, -1) if fields[number - 1].strip()), 0)
