"""Pairs of answers to one question, the better one chosen: rows to two chats each, as preference data has them."""

import itertools
import re
from dataclasses import dataclass

from verl.config.pairs import PairsConfig
from verl.data.chat import Message
from verl.data.formats import Row, describe
from verl.data.tables import ChatInput
from verl.errors import UserError

TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")  # where one begins, in preference data that has whole chats as text
SPEAKERS = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True)
class PairColumns:
    """Which columns hold what, by the names that the config has for them. A row becomes two documents, the chosen one first.

    An answer is a text or messages behind the prompt, which is text or messages too, or a whole chat with what was asked in it: as
    messages, or, without a column of prompts, as text whose turns begin with `Human:` and `Assistant:`. Other texts that are to be
    whole are so by their config alone (`prompt_key` None), or a prompt under another name would be missing unnoticed.
    """

    prompt_key: str | None
    chosen_key: str
    rejected_key: str
    documents_per_row: int = 2

    @staticmethod
    def of(data: PairsConfig) -> "PairColumns":
        return PairColumns(data.prompt_key, data.chosen_key, data.rejected_key)

    def read(self, row: Row) -> list[ChatInput] | list[str]:
        """The two chats, or whole texts. What they begin with alike is context.

        Raises:
            UserError: a column is not right, or the two are no pair.
        """
        if row.is_text:
            raise UserError("plain text holds no pairs", where=row.where, fix="write them as JSONL or Parquet")
        if self.prompt_key is None and (texts := self._texts(row)):
            return texts
        chosen = self._chat(row, self.chosen_key, "data.chosen_key")
        rejected = self._chat(row, self.rejected_key, "data.rejected_key")
        common = list(itertools.takewhile(lambda both: both[0] == both[1], zip(chosen, rejected, strict=False)))
        if not common:
            what = f"{self.chosen_key!r} and {self.rejected_key!r} do not begin with the same message"
            raise UserError(what, where=row.where, fix="pair two answers to the same question")
        asked = common[:-1] if len(common) == len(chosen) == len(rejected) else common  # of two equal chats, all but the answer
        turns = sum(isinstance(message, dict) and message.get("role") == "assistant" for message, _ in asked)
        names = (self.chosen_key, self.rejected_key)
        return [ChatInput(chat, None, turns, f"{name}: ") for chat, name in zip((chosen, rejected), names, strict=True)]

    def _texts(self, row: Row) -> list[str]:
        """The two columns, where they are texts without turns in them; else nothing."""
        answers = [row.value(self.chosen_key, "data.chosen_key"), row.value(self.rejected_key, "data.rejected_key")]
        if not all(isinstance(answer, str) and not TURN.match(answer) for answer in answers):
            return []
        return [row.text(self.chosen_key, "data.chosen_key"), row.text(self.rejected_key, "data.rejected_key")]

    def _chat(self, row: Row, column: str, key: str) -> list[Message]:
        """A column's answer with what stands before it."""
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
            fix = "name the column of prompts, or write both answers as whole chats or both as whole texts"
            raise UserError("an answer without what was asked", where=f"{row.where}: data.prompt_key=null", fix=fix)
        try:
            prompt = row.value(self.prompt_key, "data.prompt_key")
        except UserError as error:
            fix = f"{error.fix}; or, where both answers are whole texts, data.prompt_key=null"
            raise UserError(error.what, where=error.where, fix=fix) from None
        if isinstance(prompt, list):
            return prompt
        return [{"role": "user", "content": row.text(self.prompt_key, "data.prompt_key")}]


def _turns(text: str) -> list[Message]:
    """The messages of a chat that is written as text."""
    _, *parts = TURN.split(text)
    return [{"role": SPEAKERS[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True)]
