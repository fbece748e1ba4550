"""The share of a file in a mixture, as an entry of a list of files has it: a weight, or a number of rows."""

import math
from collections.abc import Mapping
from pathlib import Path

from verl.errors import UserError

SHARE_FORMS = "write it as {path: a.jsonl, weight: 2.0} or {path: a.jsonl, rows: 5000}"


def read_share(given: Mapping[object, object], key: str, *, for_training: bool) -> tuple[str, float | None, int | None]:
    """Return the path, the weight and the number of rows that an entry of a list of files has; None for what it has not.

    Args:
        key: config key of the list.
        for_training: whether the list names training data; only then may an entry have a share.
    Raises:
        UserError: the entry has no path, another key, both kinds of a share, or a wrong value.
    """
    if not {"path", "weight", "rows"} & given.keys():
        fix = "write them to a JSON Lines file, one object per line, and give its path"
        raise UserError(f"an entry has no path: {dict(given)!r:.80}; rows in memory are not read", where=key, fix=fix)
    unknown = [str(name) for name in given if name not in ("path", "weight", "rows")]
    if unknown or "path" not in given or not isinstance(given["path"], (str, Path)):
        what = f"an entry has the unknown key {unknown[0]!r}" if unknown else f"an entry has no path: {dict(given)}"
        raise UserError(what, where=key, fix=SHARE_FORMS)
    name, weight, rows = str(given["path"]), given.get("weight"), given.get("rows")
    if not for_training and (weight is not None or rows is not None):
        raise UserError(f"{name} has a share, but all rows are used here", where=key, fix="give the path alone")
    if weight is not None and rows is not None:
        raise UserError(f"{name} has both a weight and a number of rows", where=key, fix="give one of them")
    if weight is not None and not (_is_number(weight) and math.isfinite(weight) and weight > 0):  # type: ignore[arg-type,operator]
        raise UserError(f"the weight of {name} is {weight!r}", where=key, fix="give a number above 0, such as 2.0")
    if rows is not None and not (isinstance(rows, int) and _is_number(rows) and rows > 0):
        raise UserError(f"the rows of {name} are {rows!r}", where=key, fix="give a whole number above 0, such as 5000")
    return name, None if weight is None else float(weight), rows  # type: ignore[arg-type]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
