"""Errors of documents that are too long, or of which none is left.

Dimensions: R documents before any is dropped.
"""

from collections.abc import Callable

import numpy as np

from verl.data.report import Report
from verl.errors import UserError


def too_long(lengths_R: np.ndarray, place: Callable[[int], str], max_length: int, key: str, per_row: int) -> UserError:
    """Return the error of documents that are longer than `data.max_length`.

    Args:
        place: returns the location of a document's row.
        key: config key that names the files.
        per_row: documents of a row.
    """
    count, longest = int((lengths_R > max_length).reshape(-1, per_row).any(1).sum()), int(lengths_R.argmax())
    what = (
        f"{count:,} of {len(lengths_R) // per_row:,} rows are longer than data.max_length={max_length}; "
        f"the longest has {lengths_R[longest]:,} tokens ({place(longest)})"
    )
    fix = f"data.max_length={lengths_R[longest]} keeps them whole; data.truncation=right or data.truncation=left cuts them"
    return UserError(what, where=key, fix=fix)


def none_left(report: Report, same_answers: str, max_length: int, key: str) -> UserError:
    """Return the error of a file without a row to train, with what helps against the reasons for which all were dropped.

    Args:
        same_answers: the reason of rows with two equal answers.
    """
    fixes = []
    if same_answers in report.dropped:
        fixes.append("give each row two different answers (data.chosen_key, data.rejected_key)")
    if report.dropped.keys() - {same_answers}:
        fixes.append(f"raise data.max_length above {max_length}, or set data.truncation=left, which keeps the end of each row")
    return UserError(f"no row is left to train: {report}", where=key, fix="\n       ".join(fixes))
