"""Whether an answer has the required form: the share of its parts that are there, one behind the other."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from verl.errors import UserError

PARTS = (r"\S", r"####[ \t]*[^\s#][^\n]*\Z")  # something, and then `#### answer` as the last line


@dataclass
class Settings:
    # Regular expressions that an answer must match one after the other, in which `.` matches line ends too; null: the answer has to say
    # something and end in a line `#### …`.
    format: list[str] | None = None

    def check(self) -> None:
        """Raises UserError: a part is not a regular expression."""
        compiled(self.format or [])


def score(prompt: str, response: str, row: dict[str, Any], settings: Settings) -> float:
    """The share of the required parts, from 0 to 1: each is looked for behind the one that was found before it.

    Args:
        prompt: the question, as text.
        response: the model's answer, as text, without its stop token.
        row: the data row, of which nothing is read.
    """
    parts = settings.format or PARTS
    text, done, found = response.rstrip(), 0, 0
    for part in compiled(parts):
        match = part.search(text, done)
        if match is not None:
            done, found = match.end(), found + 1
    return found / len(parts)


def compiled(parts: Sequence[str]) -> list[re.Pattern[str]]:
    """Raises UserError: a part is not a regular expression."""
    return [_compiled(part) for part in parts]


def _compiled(part: str) -> re.Pattern[str]:
    try:
        return re.compile(part, re.DOTALL)
    except (re.error, TypeError) as error:
        fix = r"give regular expressions, such as [<think>,</think>,\S]"
        raise UserError(f"{part!r} is not a regular expression: {error}", where="format", fix=fix) from error
