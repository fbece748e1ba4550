"""A penalty for long answers that grows before the limit: the soft overlong punishment of DAPO (arXiv:2503.14476, equation 13).

An answer loses nothing up to `limit - buffer`, then linearly more, and 1 from the limit on: `reward.name=[gsm8k,overlong]`. It counts what
is in the text; `algorithm.overlong_buffer_tokens` is the same penalty by the tokens that were drawn, and knows which answers were cut off.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from verl.errors import UserError, at_least, one_of
from verl.rewards._words import words_of

MEASURE = "mean penalty for length"  # name of the mean score
UNITS = ("words", "characters", "tokens")


@dataclass
class Settings:
    # Length from which on an answer loses 1, in overlong_unit.
    overlong_limit: int | None = None
    # Length before the limit over which the penalty grows from 0 to 1; 0: all of it at the limit.
    overlong_buffer: int = 0
    # What is counted: "words" (each character in scripts without spaces), "characters", or "tokens" of overlong_tokenizer.
    overlong_unit: str = "words"
    # With tokens: directory or Hub name of a model whose tokenizer counts.
    overlong_tokenizer: str | None = None

    def check(self) -> None:
        """Raises UserError: a key is missing or wrong."""
        if self.overlong_limit is None:
            raise UserError("reward overlong needs a limit", where="overlong_limit", fix="set reward.overlong_limit, such as 400")
        at_least("overlong_limit", self.overlong_limit, 1)
        at_least("overlong_buffer", self.overlong_buffer, 0)
        if self.overlong_buffer > self.overlong_limit:
            what = f"{self.overlong_buffer} is more than overlong_limit={self.overlong_limit}"
            raise UserError(what, where="overlong_buffer", fix="give a part of the limit, such as a fifth of it")
        one_of("overlong_unit", self.overlong_unit, UNITS)
        if (self.overlong_unit == "tokens") != (self.overlong_tokenizer is not None):
            what = "tokens are counted by a tokenizer" if self.overlong_tokenizer is None else f"{self.overlong_unit} need no tokenizer"
            fix = "set it to a model" if self.overlong_tokenizer is None else "remove it, or set reward.overlong_unit=tokens"
            raise UserError(what, where="overlong_tokenizer", fix=fix)


def score(prompt: str, response: str, row: dict[str, Any], settings: Settings) -> float:
    """Return the penalty, from -1 to 0.

    Args:
        prompt, row: they are not used.
        response: the model's answer, as text, without its stop token.
    Raises:
        UserError: there is no such tokenizer.
    """
    assert settings.overlong_limit is not None
    over = length_of(response, settings) - (settings.overlong_limit - settings.overlong_buffer)
    if over <= 0:
        return 0.0
    return -1.0 if over >= settings.overlong_buffer else -over / settings.overlong_buffer


def length_of(text: str, settings: Settings) -> int:
    """Return the length of a text in the unit of the settings."""
    if settings.overlong_unit == "tokens":
        return len(_tokenizer(str(settings.overlong_tokenizer))(text, add_special_tokens=False).input_ids)
    return len(text) if settings.overlong_unit == "characters" else len(words_of(text))


@lru_cache(maxsize=2)
def _tokenizer(path: str) -> Any:
    from verl.models.load import load_tokenizer  # words need none

    return load_tokenizer(path)
