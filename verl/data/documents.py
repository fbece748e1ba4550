"""Data files to tokenized documents: rows are rendered once, cached on disk, and read from the cache by index.

Dimensions: N documents, R documents before any is dropped, B tokens of one cached table.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from verl.data import cache
from verl.data.fingerprint import Fingerprint, digest, fingerprint, row_digests
from verl.data.loader import RowChoice
from verl.data.render import Renderer
from verl.data.report import Report
from verl.data.row import Notes
from verl.data.source import Entry, content_hash, describe_sources, resolve_entries, sources_of
from verl.data.tables import ROWS_PER_TABLE, RowReader, tokenized
from verl.errors import DiskError, UserError

NOTHING_TRAINED = "without a trained token within data.max_length"
SAME_ANSWERS = "with two equal answers"
SAME_WHEN_CUT = "with two answers that are equal up to data.max_length"


@dataclass(frozen=True, eq=False)
class Table:
    """ROWS_PER_TABLE cached documents, memory-mapped; the last table may have fewer."""

    ids_B: np.ndarray
    mask_B: np.ndarray
    ends: np.ndarray  # end offset of each row in B, beginning with 0
    places: pa.Array
    rows_with_control_text: int
    metadata: Mapping[bytes, bytes]  # as `verl.data.tables.tokenized` writes it
    ids_digests: np.ndarray  # hash of each row's token ids, uint64
    mask_digests: np.ndarray

    @staticmethod
    def mapped(table: pa.RecordBatch) -> "Table":
        ids, mask = table.column("input_ids"), table.column("loss_mask")
        return Table(
            ids_B=_numbers(ids.values, np.int32),
            mask_B=_numbers(mask.values, bool),
            ends=_numbers(ids.offsets, np.int32),
            places=table.column("where"),
            rows_with_control_text=table.column("has_control_text").true_count,
            metadata=table.schema.metadata or {},
            ids_digests=_numbers(table.column("ids_digest"), np.uint64),
            mask_digests=_numbers(table.column("mask_digest"), np.uint64),
        )

    def stop_ids(self) -> np.ndarray:
        """Ids of the trained tokens that an untrained token or the end of the row follows."""
        next_is_trained = np.append(self.mask_B[1:], False)
        next_is_trained[self.ends[1:] - 1] = False
        return np.unique(self.ids_B[self.mask_B & ~next_is_trained])

    def trained(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Count the trained tokens of each range of B, without the range's first token, which has no prediction."""
        before = np.concatenate([[0], np.cumsum(self.mask_B, dtype=np.int64)])
        trained: np.ndarray = before[starts + lengths] - before[starts + 1]
        return trained


@dataclass(frozen=True, eq=False)
class Documents:
    """Tokenized documents with random access.

    Attributes:
        lengths_N: number of tokens, int32.
        trained_N: number of trained tokens, int32; a document's first token has no prediction and is not counted.
        row_numbers_N: index of the document among all documents of the files, from 0, int64; with one document per row, the row number.
        stop_ids: ids of the tokens that end a trained span, such as `<|im_end|>`.
        fingerprint: identity of the tokens, what is trained of them, and their order.
        report: counts of rows read, used, cut and dropped.
        documents_per_row: consecutive documents that form a row; 2 for preference pairs, the chosen answer first.
        values: per field of the Batch, such as "ref_logprob_M", one array per document, with one value per trained token.
        choice: choice of an epoch's rows, if the files are a mixture; None: all rows.
        row_digests_R: hash of each row's tokens and of what is trained of them, uint64; copies of a row have the same one.
    """

    lengths_N: np.ndarray
    trained_N: np.ndarray
    row_numbers_N: np.ndarray
    stop_ids: list[int]
    fingerprint: Fingerprint
    report: Report
    _starts_N: np.ndarray
    _tables: list[Table]
    documents_per_row: int = 1
    values: Mapping[str, Sequence[np.ndarray]] = field(default_factory=dict)
    choice: RowChoice | None = None
    row_digests_R: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.lengths_N) // self.documents_per_row

    def document(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a document's token ids, int32, and loss mask, bool."""
        table = self._tables[self.row_numbers_N[index] // ROWS_PER_TABLE]
        start = self._starts_N[index]
        stop = start + self.lengths_N[index]
        return table.ids_B[start:stop], table.mask_B[start:stop]

    def place(self, index: int) -> str:
        """Location of the document's row, such as `train.jsonl:17`."""
        return _place(self._tables, int(self.row_numbers_N[index]))


class DocumentsConfig(Protocol):
    """Settings of rows that become documents, as in DataConfig of verl.config.sft."""

    max_length: int
    truncation: str
    num_workers: int | None
    cache_dir: str | None


def load_documents(
    config: DocumentsConfig,
    columns: RowReader,
    files: object,
    tokenizer: PreTrainedTokenizerBase,
    *,
    key: str = "data.train_files",
    max_samples: int | None = None,
    console: Console | None = None,
) -> Documents:
    """Load the documents of the files, from the cache if it has them.

    Processes may load the same files at the same time: each finds a complete cache, or writes its own.

    Args:
        config: maximum length, truncation and cache directory.
        columns: mapping from a row's columns to its documents.
        files: as in `verl.data.source.resolve_entries`.
        key: the config key that names the files, for errors.
        max_samples: number of rows to use, from the start; None or -1 uses all.
        console: console of the progress bar, which is drawn only in a terminal; None uses standard error.
    Raises:
        UserError: a file, a row or the chat template is invalid, or a row is too long.
    """
    entries = resolve_entries(files, key)
    sources = sources_of(entries)
    limit = None if max_samples == -1 else max_samples
    name = _hash(content_hash(sources), list(map(str, sources)), limit, asdict(columns), Renderer(tokenizer).fingerprint(), _code_hash())
    path = _cache_folder(config) / f"{name}.arrow"
    tables = cache.read(path)
    left_aside = [f"left aside {path}, which another user can write; the rows are tokenized again"] if cache.is_of_another(path) else []
    uncached: list[str] = []
    if tables is None:

        def new() -> Iterator[pa.RecordBatch]:
            return tokenized(sources, tokenizer, columns, limit=limit, workers=config.num_workers, console=console, key=key)

        try:
            tables = cache.written(path, new())
        except DiskError as error:
            uncached.append(f"warning: the tokenized rows are kept in memory, not in the cache: {error}")
            tables = list(new())
    mapped = [Table.mapped(table) for table in tables]
    _check_ids(mapped, len(tokenizer), path)
    documents = cut(mapped, config, key, tokenizer.chat_template, columns.documents_per_row)
    if not len(documents):
        from verl.data.document_errors import none_left

        raise none_left(documents.report, SAME_ANSWERS, config.max_length, key)
    notes = [*describe_sources(entries), *_notes(mapped).lines(), *left_aside, *uncached]
    if any(entry.has_share for entry in entries):
        documents, shares = _mixed(documents, entries, key)
        notes.append(shares)
    return replace(documents, report=replace(documents.report, notes=notes))


def _check_ids(tables: list[Table], vocabulary: int, path: Path) -> None:
    """Raises UserError: the tokenizer has no such token."""
    for table in tables:
        if len(table.ids_B) and not 0 <= int(table.ids_B.min()) <= int(table.ids_B.max()) < vocabulary:
            found = f"has a token id that the tokenizer, with {vocabulary:,} tokens, does not have"
            raise UserError(found, where=str(path), fix="delete this file of the cache")


def _notes(tables: list[Table]) -> Notes:
    notes = Notes()
    for table in tables:
        notes.merge(Notes(json.loads(table.metadata.get(b"notes", b"{}"))))
    return notes


def _mixed(documents: Documents, entries: list[Entry], key: str) -> tuple[Documents, str]:
    """Return the documents with the choice of an epoch's rows, and a line that says it."""
    from verl.data.mixture import mixture_of  # most runs train all rows

    per_row = documents.documents_per_row
    rows_by_source = json.loads(documents._tables[-1].metadata[b"rows_by_source"])
    mixture = mixture_of(entries, rows_by_source, documents.row_numbers_N[::per_row] // per_row, key)
    assert mixture is not None
    fingerprint = replace(documents.fingerprint, order=mixture.identity)
    tokens_N = documents.lengths_N.reshape(-1, per_row).sum(1)
    return replace(documents, choice=mixture, fingerprint=fingerprint), mixture.describe(tokens_N)


def _cache_folder(config: DocumentsConfig) -> Path:
    if config.cache_dir is not None:
        return Path(config.cache_dir).expanduser() / "documents"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "verl" / "documents"


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _code_hash() -> str:
    """Hash of this package's source, so that a cache that other code wrote is not read."""
    return _hash([path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.rglob("*.py"))])


def cut(tables: list[Table], config: DocumentsConfig, key: str, template: object, per_row: int) -> Documents:
    """Cut the documents to `data.max_length` tokens, and drop the rows that then have no trained token.

    Raises:
        UserError: a document is too long and `data.truncation` is "error".
    """
    lengths_R = np.concatenate([np.diff(table.ends) for table in tables])
    starts_R = np.concatenate([table.ends[:-1] for table in tables]).astype(np.int64)
    whole = starts_R.copy(), lengths_R
    is_long_R = lengths_R > config.max_length
    if config.truncation == "error" and is_long_R.any():
        from verl.data.document_errors import too_long

        raise too_long(lengths_R, lambda row: _place(tables, row), config.max_length, key, per_row)
    if config.truncation == "left":
        starts_R += np.maximum(0, lengths_R - config.max_length)
    lengths_R = np.minimum(lengths_R, config.max_length)
    first_rows = itertools.accumulate((len(table.places) for table in tables[:-1]), initial=0)
    parts = [slice(first, first + len(table.places)) for table, first in zip(tables, first_rows, strict=True)]
    trained_R = np.concatenate([table.trained(starts_R[part], lengths_R[part]) for table, part in zip(tables, parts, strict=True)])
    untrained = (trained_R.reshape(-1, per_row) == 0).any(1)
    same, same_when_cut = np.zeros_like(untrained), untrained
    if per_row == 2:
        from verl.data.equal_pairs import equal_pairs

        same, same_when_cut = equal_pairs([table.ids_B for table in tables], whole, (starts_R, lengths_R))
    kept_N = np.flatnonzero(np.repeat(~(untrained | same | same_when_cut), per_row))
    dropped = {
        SAME_ANSWERS: int(same.sum()),
        NOTHING_TRAINED: int((untrained & ~same).sum()),
        SAME_WHEN_CUT: int((same_when_cut & ~untrained & ~same).sum()),
    }
    report = Report(
        read=len(lengths_R) // per_row,
        used=len(kept_N) // per_row,
        cut=int(is_long_R[kept_N].reshape(-1, per_row).any(1).sum()),
        dropped={reason: rows for reason, rows in dropped.items() if rows},
        tokens=int(lengths_R[kept_N].sum()),
        trained_tokens=int(trained_R[kept_N].sum()),
        rows_with_control_text=sum(table.rows_with_control_text for table in tables),
    )
    digests = _digests(tables, starts_R, lengths_R, kept_N)
    return Documents(
        lengths_N=lengths_R[kept_N].astype(np.int32),
        trained_N=trained_R[kept_N].astype(np.int32),
        row_numbers_N=kept_N.astype(np.int64),
        stop_ids=sorted({int(i) for table in tables for i in table.stop_ids()}),
        fingerprint=fingerprint("rows", *digests, report.tokens, template, documents_per_row=per_row),
        report=report,
        documents_per_row=per_row,
        row_digests_R=row_digests(digests, per_row),
        _starts_N=starts_R[kept_N],
        _tables=tables,
    )


def _digests(tables: list[Table], starts_R: np.ndarray, lengths_R: np.ndarray, kept_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return hashes of the token ids and of the loss mask of each kept document, as it is cut, uint64 [N]."""
    ids_R, mask_R = (np.concatenate([getattr(table, name) for table in tables]) for name in ("ids_digests", "mask_digests"))
    whole_R = np.concatenate([np.diff(table.ends) for table in tables])
    for row in kept_N[whole_R[kept_N] != lengths_R[kept_N]]:
        table, part = tables[row // ROWS_PER_TABLE], slice(starts_R[row], starts_R[row] + lengths_R[row])
        ids_R[row], mask_R[row] = digest(table.ids_B[part].tobytes()), digest(table.mask_B[part].tobytes())
    return ids_R[kept_N], mask_R[kept_N]


def _numbers(column: pa.Array, dtype: type) -> np.ndarray:
    """View a column's buffer as an array: `to_numpy` would first import pandas, which takes half a second."""
    return np.frombuffer(column.buffers()[1], dtype)[column.offset : column.offset + len(column)]


def _place(tables: list[Table], row: int) -> str:
    return str(tables[row // ROWS_PER_TABLE].places[row % ROWS_PER_TABLE].as_py())
