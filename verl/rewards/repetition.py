"""A penalty for repetition: the share of an answer's n-grams of words that are there already (arXiv:2502.03373).

reward.name=[gsm8k,repetition] reward.weights=[1,0.5]
"""

from dataclasses import dataclass
from typing import Any

from verl.errors import UserError, at_least
from verl.rewards._words import words_of

MEASURE = "mean penalty for repetition"  # name of the mean score


@dataclass
class Settings:
    # Words of an n-gram; in scripts without spaces, each character is a word.
    repetition_words: int = 4
    # Share of repeated n-grams that costs nothing.
    repetition_free: float = 0.0

    def check(self) -> None:
        """Raises UserError: a value is out of range."""
        at_least("repetition_words", self.repetition_words, 1)
        if not 0.0 <= self.repetition_free < 1.0:
            raise UserError(f"found {self.repetition_free}", where="repetition_free", fix="give a share from 0 to below 1, such as 0.1")


def score(prompt: str, response: str, row: dict[str, Any], settings: Settings) -> float:
    """Return the penalty, from nearly -1 to 0. An answer without an n-gram repeats nothing.

    Args:
        prompt, row: they are not used.
        response: the model's answer, as text, without its stop token.
    """
    words, size = words_of(response), settings.repetition_words
    grams = [tuple(words[at : at + size]) for at in range(len(words) - size + 1)]
    if not grams:
        return 0.0
    repeated = 1.0 - len(set(grams)) / len(grams)
    return -max(0.0, repeated - settings.repetition_free)
