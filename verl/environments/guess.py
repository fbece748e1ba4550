"""A game of several turns: guess a hidden number, and hear after each guess whether it is higher or lower.

A row has the number in the column `secret`; `write_rows` writes rows. A turn is the guess alone, such as `12`. It is worth 1 if it is
right, and the game ends. A guess that cannot be right after what was said, and a turn that is no number of the game, cost
`environment.penalty`. Each turn sees all before it, so that a model can learn to halve what is left: 3 turns find each of 7 numbers. The
metric `episode/solved` is the share of games that are won.
"""

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl.environments import Message, Start, Step
from verl.errors import UserError, at_least

GUESS = re.compile(r"\s*([0-9]{1,9})\s*")
QUESTION = "I think of a number from 1 to {largest}. Guess it."
HIGHER, LOWER, UNREAD = "It is higher.", "It is lower.", "Say a number from 1 to {largest}."


@dataclass
class Settings:
    # guess: the largest number that is thought of.
    largest: int = 7
    # guess: what a turn costs that is no number of the game, or cannot be right after what was said.
    penalty: float = 0.2

    def check(self) -> None:
        """Raises UserError naming the key."""
        at_least("largest", self.largest, 2)
        at_least("penalty", self.penalty, 0.0)


class Environment:
    """See `verl.environments`."""

    def __init__(self, settings: Settings):
        self._settings, self._secret = settings, 0
        self._low, self._high = 1, settings.largest  # the numbers that are left

    def reset(self, row: dict[str, Any], seed: int) -> Start:
        """Think of the row's number."""
        secret, largest = row.get("secret"), self._settings.largest
        if type(secret) is not int or not 1 <= secret <= largest:
            what = f"found {secret!r} in the column secret, expected a number from 1 to {largest}"
            raise UserError(what, where="environment.name=guess", fix="correct the row, or set environment.largest")
        self._secret, self._low, self._high = secret, 1, largest
        return Start([{"role": "user", "content": QUESTION.format(largest=largest)}])

    def step(self, message: Message) -> Step:
        """Answer to a guess."""
        found = GUESS.fullmatch(message["content"])
        guess = int(found[1]) if found else 0
        if guess == self._secret:
            return Step(reward=1.0, done=True, metrics={"solved": 1.0})
        if not 1 <= guess <= self._settings.largest:
            said = UNREAD.format(largest=self._settings.largest)
            return Step([_said(said)], reward=-self._settings.penalty, metrics={"solved": 0.0})
        cost = 0.0 if self._low <= guess <= self._high else -self._settings.penalty
        if guess < self._secret:
            self._low = max(self._low, guess + 1)
        else:
            self._high = min(self._high, guess - 1)
        return Step([_said(HIGHER if guess < self._secret else LOWER)], reward=cost, metrics={"solved": 0.0})

    def close(self) -> None:
        """Do nothing: a game holds nothing."""


def _said(text: str) -> Message:
    return {"role": "user", "content": text}


def write_rows(path: Path, rows: int, seed: int, largest: int = Settings.largest) -> None:
    """Write rows with numbers drawn by the seed."""
    draw = random.Random(seed)
    found = [{"question": QUESTION.format(largest=largest), "secret": draw.randint(1, largest)} for _ in range(rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
