"""Rows of `verl reward`, as its method reads them: pairs of answers, pairs with a margin, or single answers with a label."""

import math
from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np

from verl.config.pairs import PairsConfig
from verl.data.documents import Documents
from verl.data.labelled import LabelColumns, values_of
from verl.data.mismatched import mismatched
from verl.data.numbered import NumberedRows, numbered, unpaired
from verl.data.pairs import PairColumns
from verl.data.row import Row, describe
from verl.data.source import read_rows
from verl.errors import UserError

Reads = Literal["pairs", "margins", "labels"]
READS = get_args(Reads)


def columns_of(data: PairsConfig, reads: Reads) -> PairColumns | LabelColumns:
    """Return the reader of the rows. For a method that reads labels, the first row says whether they are there, or pairs.

    Raises:
        UserError: there is no such file, or its first row is invalid; or `data.margin_key` is set for a method that reads none.
    """
    if reads != "margins" and data.margin_key is not None:
        fix = "remove it, or set algorithm.name=odpo"
        raise UserError("the method reads no margins", where=f"data.margin_key={data.margin_key}", fix=fix)
    return LabelColumns.of(data) if reads == "labels" and not _are_pairs(data) else PairColumns.of(data)


def _are_pairs(data: PairsConfig) -> bool:
    columns = (data.chosen_key, data.rejected_key, data.completion_key)
    first = next(read_rows(data.train_files, "data.train_files", lambda names: columns))
    return first.has(data.chosen_key) and first.has(data.rejected_key) and not first.has(data.completion_key)


def with_numbers(documents: Documents, data: PairsConfig, reads: Reads, kind: str) -> Documents:
    """Return the rows as their method reads them: pairs as they are, or with their numbers.

    Args:
        documents: the rows, read with `columns_of`.
        kind: "train" or "val".
    Raises:
        UserError: a margin is invalid; or no two questions differ, so that nothing can be estimated from another one's answer.
    """
    files, key = getattr(data, f"{kind}_files"), f"data.{kind}_files"
    if reads == "labels":
        return _labelled(documents, data, files, key)
    if reads == "pairs" or data.margin_key is None:
        return documents
    margins = values_of(documents, files, key, data.margin_key, lambda row: margin_of(row, str(data.margin_key)))
    return numbered(documents, margins)


def _labelled(documents: Documents, data: PairsConfig, files: Any, key: str) -> NumberedRows:
    if documents.documents_per_row == 2:
        rows = unpaired(documents)
        labelled = numbered(rows, np.tile([1.0, 0.0], len(documents)))
    else:
        columns = LabelColumns.of(data)
        labelled = numbered(documents, values_of(documents, files, key, columns.label_key, columns.label))
    return replace(labelled, mismatched=mismatched(labelled, data.max_length, key))


def margin_of(row: Row, column: str) -> float:
    """Return by how much the better answer of a pair is better.

    Raises:
        UserError: it is missing, no finite number, or negative.
    """
    value: Any = row.value(column, "data.margin_key")
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        what = f"column {column!r} is {describe(value)}, expected a number: by how much the chosen answer is better"
        raise UserError(what, where=row.where, fix="correct it, or remove the row")
    if found < 0:
        what = f"column {column!r} is {found:g}, so that the rejected answer would be the better one"
        raise UserError(what, where=row.where, fix="swap the answers of the row, or remove it")
    return found
