"""How each trainer reads its rows: columns to documents, or prompts; documents to tokens, cut and dropped as in training."""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]

from verl.config.ppo import PromptConfig
from verl.data.chat import ChatInput
from verl.data.documents import Documents, DocumentsConfig, Table, cut
from verl.data.prompts import read_prompt
from verl.data.render import Renderer
from verl.data.row import Notes, Row
from verl.data.shapes import read_question
from verl.data.tables import RowReader, render_rows
from verl.errors import UserError

Note = tuple[int, str, str]  # of Notes: number of rows, location and example of the first


@dataclass
class Tokens:
    """The tokens of rows.

    Attributes:
        places: location of each valid row; `used` is whether it is trained or asked.
        whole: length of each document of the valid rows, before it is cut; the documents of a row are consecutive.
        lengths, trained: tokens of each document of the used rows, and those of them that are trained.
        errors: of rows that stop a trainer.
        long: location of each row over the limit, which is cut, dropped or an error.
        dropped: reason and location of each row that a trainer leaves out.
        stop_ids: tokens that end an answer.
        documents: token ids and loss mask of each document of the used rows, if they were asked for.
        columns: the columns of each used prompt, if they were asked for.
    """

    places: list[str] = field(default_factory=list)
    used: list[bool] = field(default_factory=list)
    whole: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    lengths: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    trained: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    errors: list[UserError] = field(default_factory=list)
    long: list[str] = field(default_factory=list)
    dropped: list[tuple[str, str]] = field(default_factory=list)
    notes: dict[str, Note] = field(default_factory=dict)
    stop_ids: set[int] = field(default_factory=set)
    documents: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    columns: list[dict[str, Any]] = field(default_factory=list)


class Reading(Protocol):
    """How a trainer reads its rows. Other processes get a copy."""

    @property
    def names(self) -> tuple[str, ...]:
        """What the documents of a row are called."""
        ...

    def columns_read(self, names: Collection[str]) -> Collection[str]:
        """Return the columns to read, as `verl.data.tables.RowReader` does."""
        ...

    def read(self, row: Row) -> Sequence[object]:
        """Return the row's documents as texts and chats. Raises UserError if a column is invalid."""
        ...

    def tokens(self, renderer: Renderer, rows: list[Row], *, keep: bool = False) -> Tokens:
        """Tokenize rows, and cut and drop them as the trainer does.

        Args:
            keep: whether to return the tokens themselves.
        """
        ...


@dataclass(frozen=True)
class DocumentReading:
    """Rows of `verl sft` and `verl reward`.

    Attributes:
        columns: mapping from a row's columns to its documents.
        config: the `data` section.
    """

    columns: RowReader
    config: DocumentsConfig

    @property
    def names(self) -> tuple[str, ...]:
        return ("row",) if self.columns.documents_per_row == 1 else ("chosen", "rejected")

    def columns_read(self, names: Collection[str]) -> Collection[str]:
        return self.columns.columns_read(names)

    def read(self, row: Row) -> Sequence[object]:
        return self.columns.read(row)

    def tokens(self, renderer: Renderer, rows: list[Row], *, keep: bool = False) -> Tokens:
        table, errors = render_rows(renderer, self.columns, list(rows))
        found, per_row = Tokens(errors=errors), self.columns.documents_per_row
        if not len(table):
            return found
        documents, found.places = self._cut(table), table.column("where").to_pylist()[::per_row]
        found.notes, found.stop_ids = _notes(table), set(documents.stop_ids)
        found.whole = np.diff(table.column("input_ids").offsets.to_numpy())
        is_long_R = np.asarray((found.whole.reshape(-1, per_row) > self.config.max_length).any(1))
        found.long = [found.places[row] for row in np.flatnonzero(is_long_R)]
        kept_R = np.zeros(len(found.places), dtype=bool)
        kept_R[documents.row_numbers_N // per_row] = True
        stops_R = is_long_R if self.config.truncation == "error" else np.zeros_like(is_long_R)
        for row in np.flatnonzero(~kept_R & ~stops_R).tolist():
            of_row = list(range(row * per_row, (row + 1) * per_row))
            (reason,) = self._cut(table.take(of_row)).report.dropped
            found.dropped.append((reason, found.places[row]))
        found.used = (kept_R & ~stops_R).tolist()
        used = [number for number, place in enumerate(documents.row_numbers_N // per_row) if not stops_R[place]]
        found.lengths, found.trained = documents.lengths_N[used], documents.trained_N[used]
        found.documents = [documents.document(number) for number in used] if keep else []
        return found

    def _cut(self, table: pa.RecordBatch) -> Documents:
        """Cut and drop, but do not stop at rows that are too long."""
        config: Any = self.config
        lenient = replace(config, truncation="right") if config.truncation == "error" else config
        return cut([Table.mapped(table)], lenient, "", None, self.columns.documents_per_row)


@dataclass(frozen=True)
class PromptReading:
    """Rows of `verl ppo`."""

    config: PromptConfig

    @property
    def names(self) -> tuple[str, ...]:
        return ("prompt",)

    def columns_read(self, names: Collection[str]) -> Collection[str]:
        return names  # rewards and tools get the whole row

    def read(self, row: Row) -> Sequence[object]:
        asked = read_question(row, self.config, self.config.system_prompt, "data.")
        return [ChatInput(asked.messages), asked.reference or ""]

    def tokens(self, renderer: Renderer, rows: list[Row], *, keep: bool = False) -> Tokens:
        found, notes, limit = Tokens(), Notes(), self.config.max_prompt_length
        prompts = []
        for row in rows:
            try:
                prompts.append(read_prompt(row, self.config, renderer))
            except UserError as error:
                found.errors.append(error)
                continue
            notes.add_row(row)
            notes.add_left_out(row)
        found.notes, found.places = notes.found, [prompt.where for prompt in prompts]
        found.whole = np.array([len(prompt.token_ids) for prompt in prompts], dtype=np.int32)
        found.used = (found.whole <= limit).tolist()
        found.long = [place for place, used in zip(found.places, found.used, strict=True) if not used]
        if self.config.overlong_prompts == "drop":
            found.dropped = [(f"longer than data.max_prompt_length={limit}", place) for place in found.long]
        found.lengths = found.whole[found.whole <= limit]
        found.trained = np.zeros_like(found.lengths)
        if keep:
            asked = [prompt for prompt, used in zip(prompts, found.used, strict=True) if used]
            ids = [np.array(prompt.token_ids, dtype=np.int32) for prompt in asked]
            found.documents = [(of_one, np.zeros(len(of_one), dtype=bool)) for of_one in ids]
            found.columns = [prompt.row for prompt in asked]
        return found


def _notes(table: pa.RecordBatch) -> dict[str, Note]:
    found: dict[str, Note] = json.loads((table.schema.metadata or {}).get(b"notes", b"{}"))
    return found
