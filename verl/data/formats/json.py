"""JSON Lines, and JSON files with one array of objects."""

import json
import re
from typing import Any

from verl.data.formats.stream import MARK, MARK_INSIDE, REMOVE_MARKS, File, decoded, finder, raw_lines, whole_text
from verl.data.row import MAX_NESTING, NUL, Fault, Row, Rows, checked_row, describe
from verl.data.strict_json import STRICT, decoder
from verl.errors import UserError

NO_JSON_SPACE = re.compile(r"[^ \t\n\r]")
Bad = tuple[int, int] | None  # the first byte that is not UTF-8, and its offset


def _integer(digits: str) -> Any:
    try:
        return int(digits)
    except ValueError as error:  # more digits than Python reads
        return Fault(str(error).partition(";")[0])


LENIENT = decoder(Fault, _integer)  # puts a Fault in place of a value that cannot be used


def json_in_text(text: str, where: str) -> Any:
    """Return the value that a column has as JSON text; None if the text is not JSON.

    Args:
        where: location of the column, for errors.
    Raises:
        UserError: it is JSON, but a value in it cannot be used: a key that occurs twice, NaN, a NUL character, or too deep.
    """
    fix = "correct it, or remove the row"
    try:
        found = STRICT.decode(text)
    except json.JSONDecodeError:
        return None
    except (ValueError, RecursionError) as error:
        what = f"nested more than {MAX_NESTING} levels deep" if isinstance(error, RecursionError) else str(error)
        raise UserError(f"in its JSON: {what}", where=where, fix=fix) from None
    for fault in checked_row(where, {"value": found}).faults.values():
        raise UserError(f"in its JSON: {fault.what}", where=where, fix=fault.fix)
    return found


def json_lines_rows(file: File) -> Rows:
    for number, offset, line in raw_lines(file):
        if not line.strip():
            continue
        where = f"{file.path}:{number}"
        text, bad = decoded(line, offset)
        text = text.removeprefix(MARK)  # joining files leaves them at the beginning of lines
        try:
            value, end, has_faults = _value(text, _next(text, 0))
            if (extra := _next(text, end)) < len(text):
                raise json.JSONDecodeError("more text after the object", text, extra)
        except (ValueError, RecursionError) as error:
            yield _error(error, where, text, file, bad)
        else:
            yield _row(where, value, file, bad, suspect=has_faults or bad is not None or _is_suspect(text))


def json_array_rows(file: File) -> Rows:
    """Yield the items of one array, decoded one at a time to get the line of each; invalid JSON ends the reading."""
    text, bad = whole_text(file)
    suspect, line, counted = bad is not None or _is_suspect(text), 1, 0
    position = _next(text, text.index("[") + 1)
    item, separator = 0, ","
    if text[position : position + 1] == "]":
        separator, position = "]", _next(text, position + 1)
    while separator == ",":
        line, counted = line + text.count("\n", counted, position), position
        where = f"{file.path}:{line} (items[{item}])"
        try:
            value, end, has_faults = _value(text, position)
        except (ValueError, RecursionError) as error:
            raise _error(error, where, text[position : position + 1000], file, bad) from None
        yield _row(where, value, file, bad, suspect=suspect or has_faults)
        item, end = item + 1, _next(text, end)
        separator, position = text[end : end + 1], _next(text, end + 1)
        if separator not in (",", "]"):
            raise UserError(
                "not JSON: no ',' or ']' after the item", where=where, fix="correct the array, or write JSONL, one object per line"
            )
    if text[position : position + 1] == "[":
        line += text.count("\n", counted, position)
        fix = 'write one object per line, such as {"messages": […]} for a chat'
        raise UserError("a second array begins here", where=f"{file.path}:{line}", fix=fix)
    if position < len(text):
        raise UserError("more text after the array", where=str(file.path), fix="write one array, or JSONL, one object per line")


def _value(text: str, position: int) -> tuple[Any, int, bool]:
    """Return the value at a position, the position after it, and whether it contains Faults.

    Raises:
        ValueError, RecursionError: there is no JSON.
    """
    try:
        return *STRICT.raw_decode(text, position), False
    except json.JSONDecodeError:
        raise
    except ValueError:
        return *LENIENT.raw_decode(text, position), True


def _next(text: str, position: int) -> int:
    """Return the position of the next character that is not whitespace."""
    found = NO_JSON_SPACE.search(text, position)
    return found.start() if found else len(text)


def _is_suspect(text: str) -> bool:
    """Return whether the values of this JSON text must be checked one by one."""
    return "\\u" in text or text.count("{") + text.count("[") > MAX_NESTING


def _error(error: Exception, where: str, text: str, file: File, bad: Bad) -> UserError:
    if bad is not None and (fault := finder(file.path, bad)(text)):
        return UserError(fault.what, where=where, fix=fault.fix)
    if isinstance(error, RecursionError):
        return UserError(f"nested more than {MAX_NESTING} levels deep", where=where, fix="remove the row")
    if MARK in text:
        return UserError(f"not JSON: {MARK_INSIDE}", where=where, fix=REMOVE_MARKS)
    if isinstance(error, json.JSONDecodeError):
        if NUL in text:
            found = f"not JSON: a NUL byte at column {text.index(NUL) + 1}"
            return UserError(found, where=where, fix="write the file again: an interrupted write, or another encoding, leaves NUL bytes")
        found = f"not JSON: {error.msg.removesuffix(' at')} at column {error.colno}"
        return UserError(found, where=where, fix="write one object per line, or one array of objects")
    return UserError(str(error), where=where, fix="correct the row")


def _row(where: str, value: Any, file: File, bad: Bad, *, suspect: bool) -> Row | UserError:
    if not isinstance(value, dict):
        found = f"found {describe(value)}, expected an object with named columns"
        is_chat = isinstance(value, list) and value and all(isinstance(item, dict) and {"role", "from"} & item.keys() for item in value)
        return UserError(found, where=where, fix='write {"messages": […]}' if is_chat else 'write {"question": …, "answer": …}')
    return checked_row(where, value, finder(file.path, bad)) if suspect else Row(where, value)
