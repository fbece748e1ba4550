"""Exact match of a short text: an answer is right if it is the reference, but for white space.

What stands in `<think>…</think>` is not part of an answer. If a text has a mark `####`, the answer is the line behind the last one.
"""

import unicodedata
from dataclasses import dataclass
from typing import Any, Literal

from verl.rewards import _statement
from verl.rewards._words import is_punctuation

FLEXIBLE = "exact match without case and punctuation"  # name of the flexible method in the evaluator's table


@dataclass
class Settings:
    # Treat upper and lower case as equal.
    ignore_case: bool = False
    # Leave out punctuation marks.
    ignore_punctuation: bool = False


def score(prompt: str, response: str, row: dict[str, Any], settings: Settings) -> float:
    """Return 1.0 if the response equals the reference, else 0.0."""
    return float(exact_match(response, row["reference"], "strict", settings))


def exact_match(response: str, reference: str, method: Literal["strict", "flexible"], settings: Settings) -> bool:
    """Return whether two texts are equal. "flexible" ignores case and punctuation, whatever the settings say."""
    settings = Settings(ignore_case=True, ignore_punctuation=True) if method == "flexible" else settings
    answer = extract_answer(response, settings)
    return answer is not None and answer == extract_answer(reference, settings)


def extract_answer(text: str, settings: Settings) -> str | None:
    """Return the text as it is compared, with single spaces; None if nothing is left of it."""
    text = _statement.visible(text)
    marks = list(_statement.HASHES.finditer(text))
    if marks:
        text = text[marks[-1].end() :].strip().partition("\n")[0]
    text = unicodedata.normalize("NFC", text)
    text = text.lower() if settings.ignore_case else text
    if settings.ignore_punctuation:
        text = "".join(character for character in text if not is_punctuation(character))
    return " ".join(text.split()) or None
