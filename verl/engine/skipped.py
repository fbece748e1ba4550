"""What is said of updates that were skipped, because the loss or the gradient was not finite."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from verl import dist
from verl.durable import real_folder, replace_text
from verl.errors import UserError

SHOWN_ROWS = 3


def tell(place: str, found: str, what: str, rows: Sequence[dict[str, Any]], path: Path) -> str:
    """Write the rows of a skipped update, and return a warning.

    Args:
        place: the step, such as `step 7`.
        found: the loss and the gradient norm.
        what: what was skipped, such as "the update was skipped".
        path: a JSON Lines file; its folder is created.
    """
    its, are = (f"its {len(rows):,} rows", "are") if len(rows) != 1 else ("its row", "is")
    where = f"{are} in {path}"
    if dist.is_main():
        try:
            real_folder(path.parent)
            replace_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        except OSError as error:  # training does not need the file
            where = f"could not be written into {path}: {error.strerror}"
    return f"warning: {place}: {found}: {what}; {its} {where}"


def refuse_more(place: str, found: str, rows: Sequence[dict[str, Any]], in_a_row: int, most: int) -> None:
    """Raise a UserError if too many updates in a row were skipped.

    Args:
        rows: those of the last one, each with its `place`.
        most: the number that ends the run (trainer.max_nonfinite_steps).
    """
    if in_a_row < most:
        return
    more = f" and {len(rows) - SHOWN_ROWS:,} more" if len(rows) > SHOWN_ROWS else ""
    named = ", ".join(row["place"] for row in rows[:SHOWN_ROWS]) + more
    what = f"{found}, {in_a_row} times in a row (trainer.max_nonfinite_steps); the last time with the rows {named}"
    fix = "lower optim.lr, or look at the rows in the folder `skipped` of the run; the last checkpoint is complete"
    raise UserError(what, where=place, fix=fix)
