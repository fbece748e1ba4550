"""Rows for classification: a text or a chat, and its label.

A text becomes the tokens that the tokenizer gives it alone, as in transformers' pipelines, and a chat those of its chat template. The rows
are tokenized when a run begins, and are not kept in the cache.

Dimensions: N documents, L labels.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from verl.data.cache import table_of
from verl.data.chat import checked
from verl.data.document_errors import too_long
from verl.data.documents import Documents, DocumentsConfig, Table
from verl.data.fingerprint import digest, fingerprint, row_digests
from verl.data.formats.json import json_in_text
from verl.data.labels import Labels
from verl.data.render import Rendered, Renderer
from verl.data.report import Report
from verl.data.row import ReadProgress, Row, describe, notes_of
from verl.data.source import describe_sources, resolve_entries, sources_of, valid_rows
from verl.data.tables import ROWS_PER_TABLE
from verl.errors import UserError

# Columns that stand for each other: the first that a row has is read, if the config names one of them that the row lacks.
TEXTS = ("text", "prompt", "question", "sentence", "messages")
LABELS = ("label", "labels", "answer")
ROWS_AT_A_TIME = 1024


@dataclass(frozen=True)
class ClassColumns:
    """The columns of rows for classification.

    Attributes:
        text_key, label_key: columns of the text or chat, and of the label; see TEXTS and LABELS.
        text_name, label_name: the config keys that name the columns, for errors.
    """

    text_key: str
    label_key: str
    text_name: str = "data.prompt_key"
    label_name: str = "data.label_key"

    def columns_read(self, names: Collection[str]) -> Collection[str]:
        """Return the columns that are read of a table with these columns."""
        return (self.text_key, self.label_key, *TEXTS, *LABELS)

    def text(self, row: Row) -> str | list[dict[str, Any]]:
        """Return the row's text, or the messages of its chat. Raises UserError: there is none, or it is not valid."""
        if row.is_text:
            raise UserError("plain text has no labels", where=row.where, fix="write the rows as JSONL, CSV or Parquet")
        column = _column(row, self.text_key, TEXTS)
        value = row.value(column, self.text_name)
        if isinstance(value, str) and value.lstrip().startswith("[{"):
            value = json_in_text(value, f"{row.where}: {column}") or value
        if not isinstance(value, list) or not value or not isinstance(value[0], dict):
            return row.text(column, self.text_name)
        try:
            return checked(value).messages
        except UserError as error:
            raise UserError(error.what, where=f"{row.where}: {column}: {error.where}", fix=error.fix) from None

    def label(self, row: Row) -> Any:
        """Return the row's label as it is. Raises UserError: there is none."""
        return row.value(_column(row, self.label_key, LABELS), self.label_name)


def _column(row: Row, key: str, others: Sequence[str]) -> str:
    return key if key not in others or row.has(key) else next((name for name in others if row.has(name)), key)


@dataclass(frozen=True, eq=False)
class Classified:
    """Documents with their labels.

    Attributes:
        documents: one document a row.
        labels: the names of the labels.
        labels_N: the label of each document: its number, int64 [N]; of several, which it has, float32 [N, L]; or a number, float32 [N].
    """

    documents: Documents
    labels: Labels
    labels_N: np.ndarray

    def __str__(self) -> str:
        return f"{self.documents.report}; {self.counts()}"

    def counts(self) -> str:
        """Return the number of rows of each label in words, or the range of the numbers."""
        if self.labels.problem == "number":
            return f"numbers from {self.labels_N.min():g} to {self.labels_N.max():g}, their mean {self.labels_N.mean():.4g}"
        counts = rows_of_labels(self.labels_N, len(self.labels.names))
        shown = [f"{name} {count:,}" for name, count in zip(self.labels.shown, counts.tolist(), strict=True)]
        return f"labels: {', '.join(shown[:20])}{f', and {len(shown) - 20:,} more' if len(shown) > 20 else ''}"


def rows_of_labels(labels_N: np.ndarray, labels: int) -> np.ndarray:
    """Return how many rows have each label, int64 [L]."""
    return np.bincount(labels_N, minlength=labels) if labels_N.ndim == 1 else (labels_N > 0).sum(0)


def load_classified(
    config: DocumentsConfig,
    columns: ClassColumns,
    labels: Labels,
    files: object,
    tokenizer: PreTrainedTokenizerBase,
    *,
    key: str = "data.train_files",
    max_samples: int | None = None,
) -> Classified:
    """Read rows and tokenize them.

    Args:
        config: the longest document, and what happens to longer ones.
        labels: without names, these are the labels of the rows, sorted.
        files, key: as in `verl.data.source.resolve_entries`; shares are refused.
    Raises:
        UserError: a file, a row, a label or the chat template is invalid, or a document is too long.
    """
    entries = resolve_entries(files, key)
    if any(entry.has_share for entry in entries):
        raise UserError("shares of files are not supported in classification", where=key, fix="give the files without weight and rows")
    progress, sources = ReadProgress(), sources_of(entries)
    rows = list(islice(valid_rows(sources, progress, columns.columns_read), None if max_samples == -1 else max_samples))
    given = [value_of(row, columns, labels) for row in rows]
    found = labels if labels.names else Labels(names_in(given), labels.problem)
    numbers_N = numbers_of(given, found, rows, columns)
    documents = _documents(config, columns, rows, numbers_N, tokenizer, key)
    notes = [*describe_sources(entries), *notes_of(rows)]
    return Classified(replace(documents, report=replace(documents.report, notes=notes)), found, numbers_N)


# Labels


def value_of(row: Row, columns: ClassColumns, labels: Labels) -> Any:
    """Return a row's label as it is written: a text, or a whole number; a list of these, of several; or a number.

    Raises:
        UserError: it is none of that.
    """
    value = columns.label(row)
    if labels.problem == "number":
        found = _number(value)
        if found is None:
            raise _wrong(row, columns, value, "a number")
        return found
    if labels.problem == "one":
        if (one := _one(value)) is None:
            raise _wrong(row, columns, value, "a label: a text or a whole number", lists=isinstance(value, list))
        return one
    many = [_one(item) for item in value] if isinstance(value, list) else [None]
    if None in many:
        raise _wrong(row, columns, value, "a list of labels")
    return many


def _one(value: object) -> str | int | None:
    """Return a label as it is written; None if it is none. A whole number may be a float, as in a table that lacks some of them."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return (value.strip() or None) if isinstance(value, str) else value if isinstance(value, int) else None


def _number(value: object) -> float | None:
    try:
        found = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else float("nan")
    except (ValueError, OverflowError):
        return None
    return found if abs(found) < 1e30 else None  # NaN compares false


def _wrong(row: Row, columns: ClassColumns, value: object, expected: str, *, lists: bool = False) -> UserError:
    what = f"column {columns.label_key!r} is {describe(value)}, expected {expected}"
    fix = "set algorithm.problem=several, which reads lists of labels" if lists else f"correct the row, or set {columns.label_name}"
    return UserError(what, where=row.where, fix=fix)


def names_in(given: Sequence[Any]) -> tuple[str, ...]:
    """Return the labels of the rows as names, sorted; whole numbers by their value."""
    values = {value for one in given for value in (one if isinstance(one, list) else [one])}
    numbers, texts = sorted(v for v in values if isinstance(v, int)), sorted(v for v in values if isinstance(v, str))
    return tuple(dict.fromkeys([*map(str, numbers), *texts]))


def numbers_of(given: Sequence[Any], labels: Labels, rows: Sequence[Row], columns: ClassColumns) -> np.ndarray:
    """Return the labels of the rows as `Classified.labels_N` has them. Raises UserError: a row has a label that is not named."""
    if labels.problem == "number":
        return np.array(given, dtype=np.float32)
    places = {name: number for number, name in enumerate(labels.names)}

    def number(value: str | int, row: Row) -> int:
        place = places.get(str(value), value if isinstance(value, int) and 0 <= value < len(places) else None)
        if place is None:
            shown = ", ".join(labels.shown[:20]) + (", …" if len(labels.names) > 20 else "")
            fix = "correct the row, or add the label to algorithm.labels, before the run begins"
            raise UserError(f"column {columns.label_key!r} has the label {str(value)!r:.60}, none of {shown}", where=row.where, fix=fix)
        assert isinstance(place, int)
        return place

    if labels.problem == "one":
        return np.array([number(value, row) for value, row in zip(given, rows, strict=True)], dtype=np.int64)
    has_NL = np.zeros((len(given), len(places)), dtype=np.float32)
    for at, (values, row) in enumerate(zip(given, rows, strict=True)):
        has_NL[at, [number(value, row) for value in values]] = 1.0
    return has_NL


# Documents


def tokens_of(texts: Sequence[str | list[dict[str, Any]]], tokenizer: PreTrainedTokenizerBase) -> Iterator[Rendered]:
    """Yield the tokens of each text, as the tokenizer gives them to a text alone, or of each chat, as its template gives them.

    Raises:
        UserError: the template rejects a chat, or a text has been rendered with one already.
    """
    renderer = Renderer(tokenizer)
    ends = 0 if tokenizer("a").input_ids[-1:] == [tokenizer.eos_token_id] else 1  # the token that verl adds after a text
    for first in range(0, len(texts), ROWS_AT_A_TIME):
        some = texts[first : first + ROWS_AT_A_TIME]
        plain = iter(renderer.texts([text for text in some if isinstance(text, str)]))
        for text in some:
            if not isinstance(text, str):
                ids = renderer.whole(text)
                yield Rendered(ids, [True] * len(ids))
                continue
            found = next(plain)
            if isinstance(found, UserError):
                raise found
            ids = found.input_ids[: len(found.input_ids) - ends]
            yield Rendered(ids, [True] * len(ids), found.has_control_text)


def _documents(
    config: DocumentsConfig,
    columns: ClassColumns,
    rows: Sequence[Row],
    numbers_N: np.ndarray,
    tokenizer: PreTrainedTokenizerBase,
    key: str,
) -> Documents:
    """Return the rows as documents whose labels are part of their fingerprint. Raises UserError: see `load_classified`."""
    whole = list(tokens_of([columns.text(row) for row in rows], tokenizer))
    lengths_N = np.array([len(one.input_ids) for one in whole])
    longest = config.max_length
    if config.truncation == "error" and (lengths_N > longest).any():
        raise too_long(lengths_N, lambda number: rows[number].where, longest, key, 1)
    part = slice(-longest, None) if config.truncation == "left" else slice(longest)
    cut = [replace(one, input_ids=one.input_ids[part], loss_mask=one.loss_mask[part]) for one in whole]
    places = [row.where for row in rows]
    starts = range(0, len(rows), ROWS_PER_TABLE)
    tables = [Table.mapped(table_of(places[at : at + ROWS_PER_TABLE], cut[at : at + ROWS_PER_TABLE])) for at in starts]
    ids_N = np.concatenate([table.ids_digests for table in tables])
    labels_N = np.array([digest(label.tobytes()) for label in numbers_N], dtype=np.uint64)
    kept_N = np.array([len(one.input_ids) for one in cut], dtype=np.int32)
    report = Report(
        read=len(rows),
        used=len(rows),
        cut=int((lengths_N > longest).sum()),
        tokens=int(kept_N.sum()),
        trained_tokens=int(kept_N.sum()),
        rows_with_control_text=sum(one.has_control_text for one in cut),
    )
    return Documents(
        lengths_N=kept_N,
        trained_N=kept_N - 1,
        row_numbers_N=np.arange(len(rows), dtype=np.int64),
        stop_ids=[],
        fingerprint=fingerprint("rows", ids_N, labels_N, report.tokens, tokenizer.chat_template),
        report=report,
        row_digests_R=row_digests([ids_N, labels_N], 1),
        _starts_N=np.concatenate([table.ends[:-1] for table in tables]).astype(np.int64),
        _tables=tables,
    )
