"""Labelled answers: rows with one answer that is good or bad, as in KTO."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from verl.config.pairs import PairsConfig
from verl.data.answers import (
    check_end,
    check_prompt,
    checked_messages,
    columns_beside,
    prompt_column,
    prompt_of,
    tools_of,
    whole_chat,
    with_system_of,
)
from verl.data.chat import ChatInput
from verl.data.documents import Documents, DocumentsConfig, load_documents
from verl.data.row import Row, describe
from verl.data.shapes import PAIR
from verl.data.source import read_rows
from verl.errors import UserError

GOOD, BAD = ("true", "1", "yes", "good", "desirable", "chosen"), ("false", "0", "no", "bad", "undesirable", "rejected")
LABELS: dict[object, bool] = {True: True, False: False, **dict.fromkeys(GOOD, True), **dict.fromkeys(BAD, False)}  # 1 and 1.0 equal True


@dataclass(frozen=True)
class LabelColumns:
    """The columns of labelled answers, as TRL names them. Prompt and answer have the forms of `verl.data.answers`."""

    prompt_key: str | None = "prompt"
    completion_key: str = "completion"
    label_key: str = "label"
    tools_key: str | None = None
    documents_per_row: int = 1

    @staticmethod
    def of(data: PairsConfig) -> "LabelColumns":
        return LabelColumns(data.prompt_key, data.completion_key, data.label_key, data.tools_key)

    def columns_read(self, names: Collection[str]) -> Collection[str]:
        """Return the columns that are named, and those that are read beside them."""
        keys = filter(None, (self.prompt_key, self.completion_key, self.label_key, self.tools_key))
        return (*keys, *columns_beside(self.prompt_key, names), *(() if self.completion_key in names else PAIR))

    def read(self, row: Row) -> list[ChatInput]:
        """Return the answer with its prompt; without a prompt column, the answer is the assistant's last turn of a whole chat.

        Raises:
            UserError: a column is invalid, or the chat does not end with the assistant's turn.
        """
        if row.is_text:
            raise UserError("plain text has no labels", where=row.where, fix="write the rows as JSONL, CSV or Parquet")
        if not row.has(self.completion_key) and row.values.keys() >= set(PAIR):
            what = "the row is a pair of answers (columns 'chosen' and 'rejected'), and the first row is one answer with a label"
            raise UserError(what, where=row.where, fix="give rows of one kind, for validation, too; pairs are read as two labelled answers")
        self.label(row)
        tools = tools_of(row, self.tools_key, "data.tools_key")
        prompt_key = prompt_column(row, self.prompt_key)
        prompt = prompt_of(row, prompt_key)
        chat = whole_chat(row, self.completion_key, "data.completion_key", prompt, prompt_key)
        messages = checked_messages(chat, f"{row.where}: {self.completion_key}")
        check_end(messages, f"{row.where}: {self.completion_key}")
        asked = [] if prompt is None else checked_messages(prompt, f"{row.where}: {prompt_key}")
        begins = len(asked) if asked and messages[: len(asked)] == asked else len(messages) - 1
        check_prompt(row, prompt_key, prompt, messages[:begins])
        context = sum(message["role"] == "assistant" for message in messages[:begins])
        return [ChatInput(with_system_of(row, chat), tools, context, f"{self.completion_key}: ")]

    def label(self, row: Row) -> bool:
        """Return whether the row's answer is good.

        Raises:
            UserError: the label is missing, or neither true nor false.
        """
        value: Any = row.value(self.label_key, "data.label_key")
        found = LABELS.get(value.strip().lower() if isinstance(value, str) else value) if isinstance(value, (str, int, float)) else None
        if found is None:
            what = f"column {self.label_key!r} is {describe(value)}, expected true (a good answer) or false (a bad one)"
            raise UserError(what, where=row.where, fix="write true or false; 1 and 0, yes and no, good and bad are read, too")
        return found


@dataclass(frozen=True, eq=False)
class LabelledDocuments:
    """Answers with their labels.

    Attributes:
        documents: one document per answer, with the prompt as context.
        is_good_N: label of each document, bool.
    """

    documents: Documents
    is_good_N: np.ndarray

    def __str__(self) -> str:
        good = int(self.is_good_N.sum())
        return f"{self.documents.report}; {good:,} good and {len(self.is_good_N) - good:,} bad answers"


def load_labelled(
    config: DocumentsConfig,
    columns: LabelColumns,
    files: object,
    tokenizer: PreTrainedTokenizerBase,
    *,
    key: str = "data.train_files",
    **options: Any,
) -> LabelledDocuments:
    """Load labelled answers. All arguments and errors are those of `verl.data.documents.load_documents`."""
    documents = load_documents(config, columns, files, tokenizer, key=key, **options)
    return LabelledDocuments(documents, values_of(documents, files, key, columns.label_key, columns.label).astype(bool))


def values_of(documents: Documents, files: object, key: str, column: str, read: Callable[[Row], float]) -> np.ndarray:
    """Return what `read` makes of a column of each used row, float32 [R].

    The cache of tokenized rows does not have it, so it is read from the files, up to the last row that is used.

    Args:
        files, key: as in `verl.data.source.resolve_entries`.
    """
    used_R = documents.row_numbers_N[:: documents.documents_per_row] // documents.documents_per_row
    rows = islice(read_rows(files, key, lambda names: (column,)), int(used_R[-1]) + 1)
    found: np.ndarray = np.array([read(row) for row in rows], dtype=np.float32)[used_R]
    return found
