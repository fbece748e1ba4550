"""Checks the format of an answer: the share of the required parts that it has, in order."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from verl.errors import UserError

PARTS = (r"\S", r"####[ \t]*[^\s#][^\n]*\Z")  # some text, then `#### answer` as the last line


@dataclass
class Settings:
    # Regular expressions that an answer must match one after the other; `.` also matches line ends. null: the answer must have some text
    # and end in a line `#### …`.
    format: list[str] | None = None

    def check(self) -> None:
        """Raises UserError: a part is not a regular expression."""
        compiled(self.format or [])


def score(prompt: str, response: str, row: dict[str, Any], settings: Settings) -> float:
    """Return the share of the required parts that the answer has, from 0 to 1. Each is searched for after the last one that was found.

    Args:
        prompt: the question, as text.
        response: the model's answer, as text, without its stop token.
        row: the data row; it is not used.
    """
    parts = settings.format or PARTS
    text, done, found = response.rstrip(), 0, 0
    for part in compiled(parts):
        match = part.search(text, done)
        if match is not None:
            done, found = match.end(), found + 1
    return found / len(parts)


def needs_limit(settings: Settings) -> bool:
    """Return whether the patterns are the user's own: one such as `(a+)+$` may run for years, so it needs the time limit of a worker."""
    return tuple(settings.format or PARTS) != tuple(PARTS)


def compiled(parts: Sequence[str]) -> list[re.Pattern[str]]:
    """Compile the parts. Raises UserError: a part is not a regular expression."""
    return [_compiled(part) for part in parts]


def _compiled(part: str) -> re.Pattern[str]:
    try:
        return re.compile(part, re.DOTALL)
    except (re.error, TypeError) as error:
        fix = r"give regular expressions, such as [<think>,</think>,\S]"
        raise UserError(f"{part!r} is not a regular expression: {error}", where="format", fix=fix) from error
