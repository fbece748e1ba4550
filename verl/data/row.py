"""One row of a data file, and what was noticed about rows, counted."""

import difflib
import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from verl.errors import UserError

MAX_NESTING = 64
NUL = "\0"
NOT_TEXT = re.compile(f"[{NUL}\ud800-\udfff]")
# Columns that are not read, but are named if a row has them, or refused (verl.data.beside): marks, which messages have too, with
# whether true means that something is trained, and thoughts.
MARKS = {"weight": True, "train": True, "training": True, "loss": True, "trainable": True, "loss_mask": True, "masked": False}
THOUGHT_COLUMNS = ("thinking", "thoughts", "thought", "reasoning", "reasoning_content", "cot", "chain_of_thought", "rationale")
PICTURES = ("images", "image", "videos", "video", "audios", "audio")  # columns of what only text cannot say
UNREAD = frozenset((*MARKS, *THOUGHT_COLUMNS, *PICTURES))


@dataclass(frozen=True)
class Fault:
    """Why a value cannot be used. It is an error only where somebody reads the value."""

    what: str
    fix: str = "correct it, or remove the row"


@dataclass(frozen=True)
class Row:
    """One row.

    Columns inside an object are named by a path: `extra_info.answer` is the key `answer` of the object in `extra_info`, which may also be
    written as JSON text. A column whose own name contains the dot comes first.

    Attributes:
        where: location: `train.jsonl:17`, `train.json:40 (items[16])`, `train.parquet row 17`; lines and rows count from 1.
        values: value of each column, without those in `faults`.
        is_text: whether the row is a paragraph of a plain text file, in the column `text`.
        faults: the columns and paths whose values cannot be used.
        notes: what readers of the row noticed, each with an example; see `Notes`.
        unread: columns of the file that were not read, for errors that list the columns; the keys of an object are known, its values not.
    """

    where: str
    values: dict[str, Any]
    is_text: bool = False
    faults: dict[str, Fault] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict, compare=False, repr=False)
    unread: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def found(self) -> str:
        """The names of all columns of the row, for errors."""
        return ", ".join(map(str, self._all())) or "no columns"

    def _all(self) -> dict[str, Any]:
        return {**self.values, **self.unread} if self.unread else self.values

    def value(self, column: str, key: str, *, may_be_null: bool = False) -> Any:
        """Return the column's value.

        Args:
            column: name of a column, or a path.
            key: config key that names the column, for the error.
        Raises:
            UserError: the column is missing or cannot be used, or it is null although `may_be_null` is false.
        """
        if self.faults and (fault := self._fault(column)):
            raise UserError(f"column {column!r}: {fault.what}", where=self.where, fix=fault.fix)
        found = [self.values[column]] if column in self.values else self._inside(column)
        if not found:
            raise self._missing(column, key)
        if found[0] is None and not may_be_null:
            raise UserError(f"column {column!r} is null", where=self.where, fix="fill it in, or remove the row")
        return found[0]

    def has(self, column: str) -> bool:
        """Return whether the row has the column, or path, even if its value cannot be used."""
        try:
            return column in self.values or self._fault(column) is not None or bool(self._inside(column))
        except UserError:
            return True

    def text(self, column: str, key: str) -> str:
        """Return the column's value as text. A number, or a list of one text or number, is taken as text, and noted.

        Raises:
            UserError: as `value`; or the value is of another type, or blank.
        """
        value = self.value(column, key)
        if not isinstance(value, str):
            value = self._as_text(value, column)
        if not value.strip():
            raise UserError(f"column {column!r} is empty", where=self.where, fix="fill it in, or remove the row")
        return value

    def note(self, what: str, example: str = "") -> None:
        """Record something about this row that the run counts and prints once for all rows."""
        self.notes[what] = example

    def _inside(self, column: str) -> list[Any]:
        """Return the values at a path. Raises UserError if one is in JSON text with a value that cannot be used."""
        try:
            found = list(_inside(self.values, column))
        except ValueError as error:
            raise UserError(f"column {column!r}: in its JSON: {error}", where=self.where, fix="correct it, or remove the row") from None
        if found and (fault := _fault_in(found[0], unusable, 0)):
            raise UserError(f"column {column!r}: {fault.what}", where=self.where, fix=fault.fix)
        return found

    def _as_text(self, value: object, column: str) -> str:
        item = value[0] if isinstance(value, list) and len(value) == 1 else value
        text = item if isinstance(item, str) else number_text(item)
        if text is None:
            is_chat = isinstance(value, list) and value and isinstance(value[0], dict)
            fix = f"data.messages_key={column} reads chats" if is_chat else "store it as text"
            if isinstance(value, dict) and value:
                fix = f"name a column inside it, such as {column}.{next(iter(value))}"
            raise UserError(f"column {column!r} is {describe(value)}, expected text", where=self.where, fix=fix)
        kind = "numbers" if item is value else "lists of one item"
        self.note(f"column {column!r}: {kind} taken as text", text)
        return text

    def _fault(self, column: str) -> Fault | None:
        """Return why the value at this path, a part of it, or what it is part of cannot be used."""
        if column in self.values and column not in self.faults and not any(path.startswith(f"{column}.") for path in self.faults):
            return None
        paths = (path for path in self.faults if f"{path}.".startswith(f"{column}.") or column.startswith(f"{path}."))
        return next((self.faults[path] for path in paths), None)

    def _missing(self, column: str, key: str) -> UserError:
        paths = list(_paths(self._all()))
        head = column.rpartition(".")[0]
        beside = [path for path in paths if head and path.startswith(f"{head}.")]
        found = ", ".join(beside) or self.found
        last = [path for path in paths if path.rpartition(".")[2] == column.rpartition(".")[2]]
        near = difflib.get_close_matches(column, beside or list(self._all()), n=1) or last or difflib.get_close_matches(column, paths, n=1)
        fix = f"did you mean {key}={near[0]}?" if near else f"set {key} to the right column"
        what = f"column {column!r} is missing (found: {found})"
        if self.faults and not near:  # it may be the column whose name cannot be read
            path, fault = next(iter(self.faults.items()))
            what, fix = f"{what}; column {path!r} cannot be read: {fault.what}", fault.fix
        return UserError(what, where=self.where, fix=fix)


def _inside(values: dict[str, Any], path: str) -> Iterator[Any]:
    """Yield the value at a path of keys, if it is there; a key may contain dots itself."""
    for dot in re.finditer(r"\.", path):
        head, rest = path[: dot.start()], path[dot.end() :]
        inner = _object(values.get(head))
        if inner is not None:
            yield from [inner[rest]] if rest in inner else _inside(inner, rest)


def _object(value: object) -> dict[str, Any] | None:
    """Return an object as it is, or parsed from JSON text; None for anything else.

    Raises:
        ValueError: the JSON has a key twice, or a number that is none.
    """
    if isinstance(value, str) and value.lstrip()[:1] == "{":
        from verl.data.strict_json import STRICT  # most rows have no path

        try:
            value = STRICT.decode(value)
        except (json.JSONDecodeError, RecursionError):
            return None
    return value if isinstance(value, dict) else None


def _paths(values: dict[str, Any], depth: int = 3) -> Iterator[str]:
    """Yield the names of the columns, and those of objects inside them as paths."""
    for name, value in values.items():
        yield str(name)
        inner = None
        with suppress(ValueError):
            inner = _object(value) if depth else None
        yield from (f"{name}.{path}" for path in _paths(inner, depth - 1)) if inner else ()


def number_text(value: object) -> str | None:
    """Write a number as text, without an exponent if it is a decimal; None if it is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float, Decimal)) or not math.isfinite(value):
        return None
    return format(value, "f") if isinstance(value, Decimal) else str(value)


def describe(value: object) -> str:
    """Return a value's JSON type and its abbreviated value, such as `a number (42)`."""
    kinds = {bool: "a boolean", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object", type(None): "null"}
    kind = kinds.get(type(value), f"a {type(value).__name__}")
    if value is None:
        return kind
    shown = repr(value)
    return f"{kind} ({shown if len(shown) <= 60 else shown[:59] + '…'})"


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


Rows = Iterator[Row | UserError]  # an invalid row is replaced by its error
Wanted = Callable[[Collection[str]], Collection[str]]  # given the columns of a table: names and paths of those to read


class ReadProgress:
    """How much has been read: the fraction of the input, from 0 to 1, the number of rows of each file so far, and the file that is read."""

    def __init__(self) -> None:
        self.share = 0.0
        self.source = 0
        self.rows_by_source: list[int] = []


# Values that cannot be used


def unusable(text: str) -> Fault | None:
    """Find what no tokenizer or template accepts: a NUL, or half of a surrogate pair. None if the text is fine."""
    found = NOT_TEXT.search(text)
    if not found:
        return None
    around = text[max(0, found.start() - 20) : found.end() + 20]
    return Fault(f"{'a NUL character' if found[0] == NUL else 'half of a surrogate pair'} in {around!a}", "remove it from the row")


def checked_row(
    where: str,
    values: dict[str, Any],
    find: Callable[[str], Fault | None] = unusable,
    *,
    is_text: bool = False,
    unread: dict[str, Any] | None = None,
) -> Row:
    """Return a row whose unusable values are in `faults`.

    A fault inside an object is charged to its key alone; a fault inside a list to the whole list.

    Args:
        values: may contain Faults.
        find: returns why a text cannot be used, or None.
        is_text, unread: as in Row.
    """
    faults: dict[str, Fault] = {}
    return Row(where, _usable_part(values, "", find, faults, 0), is_text, faults, unread=unread or {})


def _usable_part(values: dict[str, Any], path: str, find: Callable[[str], Fault | None], faults: dict[str, Fault], depth: int) -> Any:
    usable = {}
    for name, value in values.items():
        here = f"{path}{name}"
        if fault := find(name) if isinstance(name, str) else None:
            faults[f"{path}{name!a}"] = fault
        elif isinstance(value, dict) and depth < MAX_NESTING:
            usable[name] = _usable_part(value, f"{here}.", find, faults, depth + 1)
        elif fault := _fault_in(value, find, depth):
            faults[here] = fault
        else:
            usable[name] = value
    return usable


def _fault_in(value: Any, find: Callable[[str], Fault | None], depth: int) -> Fault | None:
    if isinstance(value, str):
        return find(value)
    if isinstance(value, Fault):
        return value
    if not isinstance(value, (dict, list)):
        return None
    if depth >= MAX_NESTING:
        return Fault(f"nested more than {MAX_NESTING} levels deep", "remove the row")
    inside = [*value, *value.values()] if isinstance(value, dict) else value
    return next((fault for item in inside if (fault := _fault_in(item, find, depth + 1))), None)


# Notes


class Notes:
    """What was noticed about rows: for each kind, the number of rows, and the location and an example of the first."""

    def __init__(self, found: dict[str, tuple[int, str, str]] | None = None):
        self.found = {} if found is None else found

    def add_row(self, row: Row) -> None:
        for what, example in row.notes.items():
            self.add(what, 1, row.where, example)

    def add_left_out(self, row: Row) -> None:
        """Note the values that a reward or a tool does not get, because they cannot be used."""
        for path, fault in row.faults.items():
            self.add(f"column {path!r} is left out of rows where it cannot be read", 1, row.where, fault.what)

    def add(self, what: str, rows: int, where: str, example: str) -> None:
        count, *first = self.found.get(what, (0, where, example))
        self.found[what] = (count + rows, *first)  # type: ignore[assignment]

    def merge(self, other: "Notes") -> None:
        for what, (rows, where, example) in other.found.items():
            self.add(what, rows, where, example)

    def lines(self) -> list[str]:
        return [
            f"{what}: {rows:,} row{'s' if rows != 1 else ''}, the first {where}{f' ({example:.60})' if example else ''}"
            for what, (rows, where, example) in self.found.items()
        ]


def notes_of(rows: Iterable[Row]) -> list[str]:
    """Return what is to be said about rows that are handed to rewards whole, one line each."""
    notes = Notes()
    for row in rows:
        notes.add_row(row)
        notes.add_left_out(row)
    return notes.lines()
