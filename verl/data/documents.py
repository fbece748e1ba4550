"""Files to tokenized documents: rows are rendered once, kept in a cache, and read from there by number.

Dimensions: N documents, R rows of the files, B tokens of one table of the cache.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from verl.data import cache
from verl.data.render import Renderer
from verl.data.report import Report
from verl.data.source import content_hash, resolve_files
from verl.data.tables import ROWS_PER_TABLE, RowReader, tokenized
from verl.errors import UserError

NOTHING_TRAINED = "without a trained token within data.max_length"
SAME_ANSWERS = "whose two answers are the same"


@dataclass(frozen=True, eq=False)
class _Table:
    """ROWS_PER_TABLE documents of the cache, mapped into memory; the last table may have fewer."""

    ids_B: np.ndarray
    mask_B: np.ndarray
    ends: np.ndarray  # of each row in B, with 0 before the first
    places: pa.Array
    rows_with_control_text: int

    @staticmethod
    def mapped(table: pa.RecordBatch) -> "_Table":
        ids, mask = table.column("input_ids"), table.column("loss_mask")
        return _Table(
            ids_B=_numbers(ids.values, np.int32),
            mask_B=_numbers(mask.values, bool),
            ends=_numbers(ids.offsets, np.int32),
            places=table.column("where"),
            rows_with_control_text=table.column("has_control_text").true_count,
        )

    def stop_ids(self) -> np.ndarray:
        """Ids of the tokens after which nothing more is trained, or not at once."""
        next_is_trained = np.append(self.mask_B[1:], False)
        next_is_trained[self.ends[1:] - 1] = False
        return np.unique(self.ids_B[self.mask_B & ~next_is_trained])

    def trained(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Trained tokens in each part of B, without the part's first token, which nothing predicts."""
        before = np.concatenate([[0], np.cumsum(self.mask_B, dtype=np.int64)])
        return before[starts + lengths] - before[starts + 1]


@dataclass(frozen=True, eq=False)
class Documents:
    """Tokenized documents with random access.

    Attributes:
        lengths_N: tokens of each, int32.
        trained_N: tokens of each that are predicted and trained, int32; nothing predicts a document's first token.
        row_numbers_N: number of each one's row in the files, from 0, int64; with several documents a row, its place among all of them.
        stop_ids: ids of the tokens that end what is trained, such as that of `<|im_end|>`.
        fingerprint: differs when a document differs.
        report: what became of the rows.
        documents_per_row: neighbours that belong together: 2 where rows are pairs, the chosen answer first.
        values: by field of the Batch, such as "ref_logprob_M", an array for each document, as long as it has trained tokens.
    """

    lengths_N: np.ndarray
    trained_N: np.ndarray
    row_numbers_N: np.ndarray
    stop_ids: list[int]
    fingerprint: str
    report: Report
    _starts_N: np.ndarray
    _tables: list[_Table]
    documents_per_row: int = 1
    values: Mapping[str, Sequence[np.ndarray]] = field(default_factory=dict)

    def __len__(self) -> int:
        """Rows."""
        return len(self.lengths_N) // self.documents_per_row

    def document(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids, int32, and whether each is trained, bool."""
        table = self._tables[self.row_numbers_N[index] // ROWS_PER_TABLE]
        start = self._starts_N[index]
        stop = start + self.lengths_N[index]
        return table.ids_B[start:stop], table.mask_B[start:stop]

    def place(self, index: int) -> str:
        """Where the document's row stands, such as `train.jsonl:17`."""
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
    """The documents of the files, from the cache where they are in it.

    Processes that load the same at the same time do not disturb each other: each finds the cache whole, or makes it.

    Args:
        config: the longest document and what happens to longer ones, and where the cache is.
        columns: how a row is read.
        files: a path, a glob, a Hub data set id, or a list of these.
        key: the config key that names the files, for errors.
        max_samples: use only the first rows; None or -1: all.
        console: shows a progress bar if it is a terminal; None: standard error.
    Raises:
        UserError: a file, a row, the chat template or the lengths are not right.
    """
    sources = resolve_files(files, key)
    limit = None if max_samples == -1 else max_samples
    name = _hash(content_hash(sources), list(map(str, sources)), limit, asdict(columns), Renderer(tokenizer).fingerprint(), _code_hash())
    path = _cache_folder(config) / f"{name}.arrow"
    tables = cache.read(path)
    if tables is None:
        new = tokenized(sources, tokenizer, columns, limit=limit, workers=config.num_workers, console=console, key=key)
        cache.write(path, new)
        tables = cache.read(path)
    if tables is None:
        raise UserError(f"what was written to {path} cannot be read back", where="data.cache_dir", fix="name a folder on another disk")
    return _cut([_Table.mapped(table) for table in tables], config, key, name, columns.documents_per_row)


def _cache_folder(config: DocumentsConfig) -> Path:
    if config.cache_dir is not None:
        return Path(config.cache_dir).expanduser() / "documents"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "verl" / "documents"


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _code_hash() -> str:
    """Of this package's code, so that what another version of it has written is not read."""
    return _hash([path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("*.py"))])


def _cut(tables: list[_Table], config: DocumentsConfig, key: str, name: str, per_row: int) -> Documents:
    """Documents of at most `data.max_length` tokens, without the rows that have nothing left to train."""
    lengths_R = np.concatenate([np.diff(table.ends) for table in tables])
    starts_R = np.concatenate([table.ends[:-1] for table in tables]).astype(np.int64)
    is_long_R = lengths_R > config.max_length
    if config.truncation == "error" and is_long_R.any():
        raise _too_long(tables, lengths_R, config, key, per_row)
    if config.truncation == "left":
        starts_R += np.maximum(0, lengths_R - config.max_length)
    lengths_R = np.minimum(lengths_R, config.max_length)
    first_rows = itertools.accumulate((len(table.places) for table in tables[:-1]), initial=0)
    parts = [slice(first, first + len(table.places)) for table, first in zip(tables, first_rows, strict=True)]
    trained_R = np.concatenate([table.trained(starts_R[part], lengths_R[part]) for table, part in zip(tables, parts, strict=True)])
    untrained = (trained_R.reshape(-1, per_row) == 0).any(1)
    same = ~untrained & (_same(tables, starts_R, lengths_R) if per_row == 2 else False)
    kept_N = np.flatnonzero(np.repeat(~untrained & ~same, per_row))
    dropped = {NOTHING_TRAINED: int(untrained.sum()), SAME_ANSWERS: int(same.sum())}
    report = Report(
        read=len(lengths_R) // per_row,
        used=len(kept_N) // per_row,
        cut=int(is_long_R[kept_N].reshape(-1, per_row).any(1).sum()),
        dropped={reason: rows for reason, rows in dropped.items() if rows},
        tokens=int(lengths_R[kept_N].sum()),
        trained_tokens=int(trained_R[kept_N].sum()),
        rows_with_control_text=sum(table.rows_with_control_text for table in tables),
    )
    if not len(kept_N):
        fix = f"raise data.max_length above {config.max_length}, or set data.truncation=left, which keeps the end of each row"
        raise UserError(f"no row is left to train: {report}", where=key, fix=fix)
    return Documents(
        lengths_N=lengths_R[kept_N].astype(np.int32),
        trained_N=trained_R[kept_N].astype(np.int32),
        row_numbers_N=kept_N.astype(np.int64),
        stop_ids=sorted({int(i) for table in tables for i in table.stop_ids()}),
        fingerprint=_hash(name, config.max_length, config.truncation),
        report=report,
        documents_per_row=per_row,
        _starts_N=starts_R[kept_N],
        _tables=tables,
    )


def _same(tables: list[_Table], starts_R: np.ndarray, lengths_R: np.ndarray) -> np.ndarray:
    """Of each pair of neighbours, whether their tokens are the same."""
    same = np.diff(lengths_R)[::2] == 0
    for pair in np.flatnonzero(same):
        ids_B, both = tables[2 * pair // ROWS_PER_TABLE].ids_B, slice(2 * pair, 2 * pair + 2)
        first, second = (ids_B[start : start + length] for start, length in zip(starts_R[both], lengths_R[both], strict=True))
        same[pair] = np.array_equal(first, second)
    return same


def _numbers(column: pa.Array, dtype: type) -> np.ndarray:
    """A column's numbers where they lie in memory: `to_numpy` would import pandas first, which takes half a second."""
    return np.frombuffer(column.buffers()[1], dtype)[column.offset : column.offset + len(column)]


def _too_long(tables: list[_Table], lengths_R: np.ndarray, config: DocumentsConfig, key: str, per_row: int) -> UserError:
    count, longest = int((lengths_R > config.max_length).reshape(-1, per_row).any(1).sum()), int(lengths_R.argmax())
    what = (
        f"{count:,} of {len(lengths_R) // per_row:,} rows are longer than data.max_length={config.max_length}; "
        f"the longest has {lengths_R[longest]:,} tokens ({_place(tables, longest)})"
    )
    fix = f"data.max_length={lengths_R[longest]} trains them whole; data.truncation=right or data.truncation=left cuts them"
    return UserError(what, where=key, fix=fix)


def _place(tables: list[_Table], row: int) -> str:
    return tables[row // ROWS_PER_TABLE].places[row % ROWS_PER_TABLE].as_py()
