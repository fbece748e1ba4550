"""A reward with keys of its own: the cosine length reward (arXiv:2502.03373), for answers that think no longer than they need to.

    verl ppo … reward.name=examples/rewards/cosine_length.py reward.longest=400
    verl eval … metric=examples/rewards/cosine_length.py reward.longest=400

Right answers earn more the shorter they are, wrong ones the longer they are. What counts as right is what `gsm8k` says.
"""

from dataclasses import dataclass, field
from math import cos, pi
from typing import Any

from verl.rewards import gsm8k


@dataclass
class Settings:
    # Words of the longest answer; who has more earns too_long.
    longest: int = 400
    # What a right answer earns, of no word and of the longest.
    right: list[float] = field(default_factory=lambda: [2.0, 1.0])
    # What a wrong answer earns, of no word and of the longest.
    wrong: list[float] = field(default_factory=lambda: [-10.0, 0.0])
    # What an answer earns that is too long, right or wrong.
    too_long: float = -10.0

    def check(self) -> None:
        if self.longest < 1:
            raise ValueError(f"longest={self.longest} words leave no room for an answer")
        if not len(self.right) == len(self.wrong) == 2:
            raise ValueError("right and wrong are two numbers each, such as [2,1]")


def score(prompt: str, response: str, row: dict[str, Any], settings: Settings) -> float:
    """A number between the two that stand for a right or a wrong answer, by the cosine of its length."""
    words = len(response.split())
    if words > settings.longest:
        return settings.too_long
    of_none, of_longest = settings.right if gsm8k.exact_match(response, row["reference"]) else settings.wrong
    return of_longest + 0.5 * (of_none - of_longest) * (1 + cos(pi * words / settings.longest))
