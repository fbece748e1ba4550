"""Columns beside those that are trained whose names say something about training: marks are checked, thoughts named, and pictures refused.

Marks belong to messages (verl.data.messages). A mark of the whole row is obeyed only if it says that the row is trained.
"""

from verl.data.row import MARKS, PICTURES, UNREAD, Row, describe
from verl.errors import UserError

SPELLED = {"0": 0, "0.0": 0, "false": 0, "1": 1, "1.0": 1, "true": 1}  # as CSV files have them


def check_beside(row: Row, named: tuple[str | None, ...]) -> None:
    """Note the columns that are not read.

    Args:
        named: the columns, or paths, that the config names.
    Raises:
        UserError: a mark asks not to train the row, or only parts of it; or the row has pictures.
    """
    check_pictures(row, named)
    read = {name.partition(".")[0] for name in named if name}
    for name in sorted((UNREAD & row.values.keys()) - read):
        value = row.values[name]
        if name in PICTURES or value is None or value == "" or value == []:
            continue
        if name not in MARKS:
            row.note(f"column {name!r} is not read, so the thoughts in it are not trained")
        elif (mark := _mark(value, name, row)) is None:
            row.note(f"column {name!r} is not read")
        elif mark is not MARKS[name]:
            fix = "remove the row; or rename or remove the column, if it means something else"
            raise UserError(f"column {name!r} is {value!r}: it asks not to train the row", where=row.where, fix=fix)


def check_pictures(row: Row, named: tuple[str | None, ...]) -> None:
    """Raise UserError if the row has pictures, videos or sound, which a model of text would not see. `named` as in `check_beside`."""
    for name in PICTURES:
        value = row.values.get(name)
        if name not in named and value is not None and value != "" and value != []:
            what = f"column {name!r} has {describe(value)}; only text is trained and asked"
            raise UserError(what, where=row.where, fix="remove the row; or rename or remove the column, if the text does not need it")


def _mark(value: object, name: str, row: Row) -> bool | None:
    """Return the value as true or false; None if it is no mark. Raises UserError if it is a list."""
    if isinstance(value, list):
        what = f"column {name!r} is a list, which asks to train parts of the row, but only messages have marks"
        fix = 'write "weight": 0 into the messages that are context, and remove the column'
        raise UserError(what, where=row.where, fix=fix)
    number = SPELLED.get(value.strip().lower()) if isinstance(value, str) else value
    return bool(number) if isinstance(number, (bool, int, float)) and number in (0, 1) else None
