"""Match of what a regular expression of yours finds in an answer: `metric=regex reward.pattern='Label: (\\w+)'`.

The pattern runs in a process of its own with a time limit (`reward.timeout_seconds`), because one such as `(a+)+$` may take years.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from verl.errors import UserError

EXAMPLE = r"write e.g. reward.pattern='Label: (\w+)'"


@dataclass
class Settings:
    # The pattern of an answer; what its first group matches is the answer, without a group the whole match. `.` matches line ends
    # too. A reference that it does not match is compared whole.
    pattern: str | None = None
    # Which match counts: the "last" or the "first".
    pattern_match: str = "last"

    def check(self) -> None:
        """Raises UserError: there is no pattern, or it is no regular expression."""
        if self.pattern is None:
            raise UserError("metric regex needs a pattern", where="pattern", fix=EXAMPLE)
        compiled(self.pattern)
        if self.pattern_match not in ("last", "first"):
            raise UserError(f"found {self.pattern_match!r}", where="pattern_match", fix='choose "last" or "first"')


def score(prompt: str, response: str, row: dict[str, Any], settings: Settings) -> float:
    """Return 1.0 if what the pattern finds in the response is what it finds in the reference, else 0.0."""
    return float(exact_match(response, row["reference"], "strict", settings))


def exact_match(response: str, reference: str, method: Literal["strict", "flexible"], settings: Settings) -> bool:
    """Return whether both texts have the same answer. "flexible" ignores case."""
    found, expected = extract_answer(response, settings), reference_answer(reference, settings)
    if found is None or expected is None:
        return False
    return found == expected or (method == "flexible" and found.casefold() == expected.casefold())


FLEXIBLE = "the same without case"  # name of the flexible method in the evaluator's table


def reference_answer(reference: str, settings: Settings) -> str | None:
    """Return what the pattern finds in a reference, else the whole reference; None if it is empty."""
    return extract_answer(reference, settings) or " ".join(reference.split()) or None


def extract_answer(text: str, settings: Settings) -> str | None:
    """Return what the pattern finds in a text, with single spaces; None if it does not match, or matches nothing but white space."""
    chosen = None
    for match in compiled(settings.pattern or "").finditer(text):
        chosen = match
        if settings.pattern_match == "first":
            break
    if chosen is None:
        return None
    found = next((group for group in chosen.groups() if group), "") if chosen.re.groups else chosen[0]
    return " ".join(found.split()) or None


def needs_limit(settings: Settings) -> bool:
    """Return True: the pattern is the user's own."""
    return True


@lru_cache(maxsize=4)
def compiled(pattern: str) -> re.Pattern[str]:
    """Compile a pattern. Raises UserError: it is no regular expression."""
    try:
        return re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise UserError(f"{pattern!r} is not a regular expression: {error}", where="pattern", fix=EXAMPLE) from error
