"""An environment of your own in one file: reach a number by adding small ones, without going over it.

    verl ppo data.train_files=train.jsonl data.response_key=null model.partial_pretrain=MODEL reward.name=null algorithm.name=grpo \\
      environment.name=examples/environments/countdown.py environment.most=5

Each row has a question and a `target`. Each turn, the model says a number from 1 to `environment.most`, and hears what is left.
"""

from dataclasses import dataclass
from typing import Any

from verl.environments import Message, Start, Step
from verl.errors import at_least


@dataclass
class Settings:
    # countdown: the largest number that may be added in a turn.
    most: int = 5

    def check(self) -> None:
        """Raises UserError naming the key."""
        at_least("most", self.most, 1)


class Environment:
    """One game. Reaching the target is worth 1, going over it nothing; a turn without such a number costs 0.1, and does not count."""

    def __init__(self, settings: Settings):
        self._most, self._left = settings.most, 0

    def reset(self, row: dict[str, Any], seed: int) -> Start:
        self._left = int(row["target"])
        return Start([{"role": "user", "content": f"Left: {self._left}. Say a number from 1 to {self._most}."}])

    def step(self, message: Message) -> Step:
        said = message["content"].strip()
        if not (said.isdecimal() and 1 <= int(said) <= self._most):
            return Step([{"role": "user", "content": f"A number from 1 to {self._most}!"}], reward=-0.1)
        self._left -= int(said)
        if self._left > 0:
            return Step([{"role": "user", "content": f"Left: {self._left}."}])
        solved = float(self._left == 0)
        return Step(reward=solved, done=True, metrics={"solved": solved})

    def close(self) -> None:
        pass
