r"""Multiple choice: the letter of an option, as in `B`, `(B)`, `B) Paris`, `The answer is (B).`, `\boxed{B}` or `答案：B`.

The last statement of an answer counts (verl.rewards._statement), not an option that is only discussed. Without a statement, the answer has
to begin or end with the letter of an option: in a line of its own, or with a mark behind it.
"""

import re
import unicodedata
from dataclasses import dataclass
from typing import Any, Literal

from verl.errors import UserError
from verl.rewards import _statement, math

FLEXIBLE = "match of the last letter"  # name of the flexible method in the evaluator's table
DECORATION = r"[\s*_`\"'“”$(\[{（【]*"  # before a letter
SMALL = re.compile(rf"{DECORATION}[a-z][\s*_`\"'”$)\]}}）】.]*")  # `(b)`
TEXT_COMMAND = re.compile(r"\\(?:text|mathrm|mathbf|textbf|bf|rm)\s*(?=\{)")


@dataclass
class Settings:
    # Letters of the options.
    letters: str = "ABCDEFGHIJ"

    def check(self) -> None:
        """Raises UserError: these are not different capital letters."""
        if not re.fullmatch("[A-Z]+", self.letters) or len(set(self.letters)) < len(self.letters):
            raise UserError(f"{self.letters!r} are not different capital letters", where="letters", fix="write them in a row, such as ABCD")


def score(prompt: str, response: str, row: dict[str, Any], settings: Settings) -> float:
    """Return 1.0 if the response chooses the reference's option, else 0.0."""
    return float(exact_match(response, row["reference"], "strict", settings))


def exact_match(response: str, reference: str, method: Literal["strict", "flexible"], settings: Settings) -> bool:
    """Return whether the response chooses the reference's option. "flexible" then takes the last capital letter that stands alone."""
    chosen = extract_answer(response, settings)
    if chosen is None and method == "flexible":
        chosen = _last_letter(_statement.visible(response), settings.letters)
    return chosen is not None and chosen == reference_answer(reference, settings)


def reference_answer(reference: str, settings: Settings) -> str | None:
    """Return the letter of a reference; None if it has none."""
    return extract_answer(reference, settings)


def extract_answer(text: str, settings: Settings) -> str | None:
    """Return the letter of the option that a text chooses, or None."""
    text = unicodedata.normalize("NFKC", text)
    stated = math.extract_answer(text)
    if stated is not None and (letter := letter_of(stated, settings.letters)):
        return letter
    lines = [line for line in _statement.visible(text).splitlines() if line.strip()]
    for line in (lines[-1], lines[0]) if lines else ():
        if letter := letter_of(line, settings.letters):
            return letter
    return None


def letter_of(text: str, letters: str) -> str | None:
    """Return the letter of an option that a line begins with: alone, or with a mark behind it. `A cat` is a sentence."""
    text = TEXT_COMMAND.sub("", text)
    text = text.upper() if SMALL.fullmatch(text) else text
    marked = re.match(rf"{DECORATION}([{letters}])(?:[\s*_`\"'“”$)\]}}）】.:,;、。]*$|[*_`$]*[)\]}}）】.:,、](?!\w\.))", text)
    return marked[1] if marked else None


def _last_letter(text: str, letters: str) -> str | None:
    """Return the last letter that stands alone and is not the word `A` or `I`."""
    found = re.findall(rf"(?<![\w'’])([{letters}])(?![\w'’])(?!(?<=[AI]) +[a-z])", text)
    return found[-1] if found else None
