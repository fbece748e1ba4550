"""Preference data: rows with a chosen and a rejected answer to the same question become two chats each."""

from collections.abc import Collection
from dataclasses import dataclass

from verl.config.pairs import PairsConfig
from verl.data.answers import (
    check_end,
    check_prompt,
    checked_messages,
    columns_beside,
    is_chat,
    prompt_column,
    prompt_of,
    tools_of,
    whole_chat,
    with_system_of,
)
from verl.data.chat import ChatInput, Message
from verl.data.row import Row
from verl.data.shapes import ANSWERS, LABELLED
from verl.errors import UserError

SAME_QUESTION = "pair two answers to the same question"


@dataclass(frozen=True)
class PairColumns:
    """The columns of preference data. A row becomes two documents, the chosen one first.

    Both answers are completed to whole chats (`verl.data.answers`). The messages that both begin with are context. The chats part at the
    assistant's turn, and end with the assistant's turn. If `prompt_key` is None, two texts are whole documents; otherwise texts need a
    prompt, so that a prompt column with another name is noticed.
    """

    prompt_key: str | None
    chosen_key: str
    rejected_key: str
    tools_key: str | None = None
    documents_per_row: int = 2

    @staticmethod
    def of(data: PairsConfig) -> "PairColumns":
        return PairColumns(data.prompt_key, data.chosen_key, data.rejected_key, data.tools_key)

    def columns_read(self, names: Collection[str]) -> Collection[str]:
        """Return the columns that the config names, and those that are read beside them."""
        keys = filter(None, (self.prompt_key, self.chosen_key, self.rejected_key, self.tools_key))
        return (*keys, *columns_beside(self.prompt_key, names), *(() if self.chosen_key in names else LABELLED))

    def read(self, row: Row) -> list[ChatInput] | list[str]:
        """Return the two chats, or two whole texts. Their common beginning is context and not trained.

        Raises:
            UserError: a column is invalid, or the two chats are not two answers to the same question.
        """
        if row.is_text:
            raise UserError("plain text has no pairs", where=row.where, fix="write the pairs as JSONL or Parquet")
        self._refuse_one_answer(row)
        if self.prompt_key is None and (texts := self._texts(row)):
            return texts
        tools = tools_of(row, self.tools_key, "data.tools_key")
        prompt_key = prompt_column(row, self.prompt_key)
        prompt = prompt_of(row, prompt_key)
        chosen = with_system_of(row, whole_chat(row, self.chosen_key, "data.chosen_key", prompt, prompt_key))
        rejected = with_system_of(row, whole_chat(row, self.rejected_key, "data.rejected_key", prompt, prompt_key))
        common = self._common_messages(row, chosen, rejected)
        check_prompt(row, prompt_key, prompt, common)
        context = sum(message["role"] == "assistant" for message in common)
        named = ((self.chosen_key, chosen), (self.rejected_key, rejected))
        return [ChatInput(chat, tools, context, f"{column}: ") for column, chat in named]

    def _texts(self, row: Row) -> list[str]:
        """Return both columns if they are texts without turns, else an empty list."""
        if is_chat(row.value(self.chosen_key, "data.chosen_key")) or is_chat(row.value(self.rejected_key, "data.rejected_key")):
            return []
        return [row.text(self.chosen_key, "data.chosen_key"), row.text(self.rejected_key, "data.rejected_key")]

    def _refuse_one_answer(self, row: Row) -> None:
        """Raise UserError if the row is one answer, with a label or without."""
        if row.has(self.chosen_key) or row.has(self.rejected_key):
            return
        if row.values.keys() >= set(LABELLED):
            what = "the row is one answer with a label (columns 'completion' and 'label'), not a pair of answers"
            raise UserError(what, where=row.where, fix="algorithm.name=kto learns from such rows; the other methods compare two answers")
        if one := [column for column in ANSWERS if column in row.values or column in row.unread]:
            what = f"the row has one answer (column {one[0]!r}), not a pair of answers (column {self.chosen_key!r} is missing)"
            fix = "verl sft trains on such rows; verl reward needs a better and a worse answer: data.chosen_key, data.rejected_key"
            raise UserError(what, where=row.where, fix=fix)

    def _common_messages(self, row: Row, chosen: list[Message], rejected: list[Message]) -> list[Message]:
        """Return the messages before the two answers.

        Raises:
            UserError: the chats do not begin alike, do not part at the assistant's turn, or do not end with it.
        """
        chats = {
            column: checked_messages(chat, f"{row.where}: {column}")
            for column, chat in ((self.chosen_key, chosen), (self.rejected_key, rejected))
        }
        common = _common(*chats.values())
        if not common:
            what = f"{self.chosen_key!r} and {self.rejected_key!r} do not begin with the same message"
            raise UserError(what, where=row.where, fix=SAME_QUESTION)
        _check_structure(chats, len(common), row.where)
        if all(len(chat) == len(common) for chat in chats.values()):
            common = common[:-1]  # of two equal chats, the last turn is the answer; they are counted and dropped later
        return common


def _common(chosen: list[Message], rejected: list[Message]) -> list[Message]:
    """Return the messages that both chats begin with."""
    parting = next((number for number, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    return chosen[: min(len(chosen), len(rejected)) if parting is None else parting]


def _check_structure(chats: dict[str, list[Message]], common: int, where: str) -> None:
    """Check that both chats end with the assistant's turn, and go on with it after the `common` messages that both begin with.

    Args:
        chats: the two chats by their columns.
    Raises:
        UserError: they do not.
    """
    for column, chat in chats.items():
        check_end(chat, f"{where}: {column}")
    lengths = [len(chat) for chat in chats.values()]
    if common == min(lengths) < max(lengths):
        raise UserError("one chat is the beginning of the other, so it has no answer of its own", where=where, fix=SAME_QUESTION)
    for column, chat in chats.items():
        if common < len(chat) and chat[common]["role"] != "assistant":
            what = f"the two chats part at a message of the {chat[common]['role']}, so they answer different questions"
            raise UserError(what, where=f"{where}: {column}: messages[{common}]", fix=SAME_QUESTION)
