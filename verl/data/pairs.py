"""Preference data: rows with a chosen and a rejected answer to the same question become two chats each."""

import itertools
import re
from dataclasses import dataclass

from verl.config.pairs import PairsConfig
from verl.data.chat import Message
from verl.data.row import Row, describe
from verl.data.tables import ChatInput
from verl.errors import UserError

TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")  # the start of a turn, in preference data that holds whole chats as text
SPEAKERS = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True)
class PairColumns:
    """The columns of preference data. A row becomes two documents, the chosen one first.

    An answer is text or messages that follow the prompt, which is itself text or messages. Or it is a whole chat: a list of messages,
    or, if the row has no prompt column, text whose turns begin with `Human:` and `Assistant:`. Any other text is a whole document only
    if `prompt_key` is None; otherwise a prompt column with another name would go unnoticed.
    """

    prompt_key: str | None
    chosen_key: str
    rejected_key: str
    documents_per_row: int = 2

    @staticmethod
    def of(data: PairsConfig) -> "PairColumns":
        return PairColumns(data.prompt_key, data.chosen_key, data.rejected_key)

    def read(self, row: Row) -> list[ChatInput] | list[str]:
        """Return the two chats, or two whole texts. Their common beginning is context and not trained.

        Raises:
            UserError: a column is invalid, or the two chats do not begin with the same message.
        """
        if row.is_text:
            raise UserError("plain text has no pairs", where=row.where, fix="write the pairs as JSONL or Parquet")
        if self.prompt_key is None and (texts := self._texts(row)):
            return texts
        chosen = self._chat(row, self.chosen_key, "data.chosen_key")
        rejected = self._chat(row, self.rejected_key, "data.rejected_key")
        common = list(itertools.takewhile(lambda both: both[0] == both[1], zip(chosen, rejected, strict=False)))
        if not common:
            what = f"{self.chosen_key!r} and {self.rejected_key!r} do not begin with the same message"
            raise UserError(what, where=row.where, fix="pair two answers to the same question")
        asked = common[:-1] if len(common) == len(chosen) == len(rejected) else common  # of two equal chats, the last message is the answer
        turns = sum(isinstance(message, dict) and message.get("role") == "assistant" for message, _ in asked)
        names = (self.chosen_key, self.rejected_key)
        return [ChatInput(chat, None, turns, f"{name}: ") for chat, name in zip((chosen, rejected), names, strict=True)]

    def _texts(self, row: Row) -> list[str]:
        """Return both columns if they are texts without turns, else an empty list."""
        answers = [row.value(self.chosen_key, "data.chosen_key"), row.value(self.rejected_key, "data.rejected_key")]
        if not all(isinstance(answer, str) and not TURN.match(answer) for answer in answers):
            return []
        return [row.text(self.chosen_key, "data.chosen_key"), row.text(self.rejected_key, "data.rejected_key")]

    def _chat(self, row: Row, column: str, key: str) -> list[Message]:
        """Return the messages of a column's answer, including those of the prompt."""
        answer = row.value(column, key)
        if isinstance(answer, str):
            if self.prompt_key not in row.values and TURN.match(answer):
                return _turns(answer)
            return [*self._prompt(row), {"role": "assistant", "content": row.text(column, key)}]
        if not isinstance(answer, list) or not answer or not isinstance(answer[0], dict):
            what = f"column {column!r} is {describe(answer)}, expected text or a list of messages"
            raise UserError(what, where=row.where, fix='write the answer as text, or as [{"role": …, "content": …}, …]')
        return [*self._prompt(row), *answer] if answer[0].get("role") == "assistant" else answer

    def _prompt(self, row: Row) -> list[Message]:
        if self.prompt_key is None:
            fix = "name the prompt column, or write both answers as whole chats, or both as whole texts"
            raise UserError("an answer without its prompt", where=f"{row.where}: data.prompt_key=null", fix=fix)
        try:
            prompt = row.value(self.prompt_key, "data.prompt_key")
        except UserError as error:
            fix = f"{error.fix}; or, if both answers are whole texts, data.prompt_key=null"
            raise UserError(error.what, where=error.where, fix=fix) from None
        if isinstance(prompt, list):
            return prompt
        return [{"role": "user", "content": row.text(self.prompt_key, "data.prompt_key")}]


def _turns(text: str) -> list[Message]:
    """Split a chat that is written as text into messages."""
    _, *parts = TURN.split(text)
    return [{"role": SPEAKERS[speaker], "content": text.strip()} for speaker, text in zip(parts[::2], parts[1::2], strict=True)]
