"""A reward with keys of its own: the cosine length reward (arXiv:2502.03373), which favours short right answers.

    verl ppo … reward.name=examples/rewards/cosine_length.py reward.longest=400
    verl eval … metric=examples/rewards/cosine_length.py reward.longest=400

Short right answers get the highest rewards, short wrong answers the lowest. `gsm8k` decides which answers are right.
"""

from dataclasses import dataclass, field
from math import cos, pi
from typing import Any

from verl.rewards import gsm8k


@dataclass
class Settings:
    # Longest answer, in words; longer ones get too_long.
    longest: int = 400
    # Rewards of a right answer: at length 0 and at the longest length.
    right: list[float] = field(default_factory=lambda: [2.0, 1.0])
    # Rewards of a wrong answer: at length 0 and at the longest length.
    wrong: list[float] = field(default_factory=lambda: [-10.0, 0.0])
    # Reward of an answer that is too long, right or wrong.
    too_long: float = -10.0

    def check(self) -> None:
        if self.longest < 1:
            raise ValueError(f"longest={self.longest} words leave no room for an answer")
        if not len(self.right) == len(self.wrong) == 2:
            raise ValueError("right and wrong are two numbers each, such as [2,1]")


def score(prompt: str, response: str, row: dict[str, Any], settings: Settings) -> float:
    """Interpolate between the two rewards of a right or a wrong answer, along a cosine of its length."""
    words = len(response.split())
    if words > settings.longest:
        return settings.too_long
    at_zero, at_longest = settings.right if gsm8k.exact_match(response, row["reference"]) else settings.wrong
    return at_longest + 0.5 * (at_zero - at_longest) * (1 + cos(pi * words / settings.longest))
