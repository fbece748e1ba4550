"""How episodes in an environment ended, and what is counted of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from verl import dist
from verl.errors import UserError
from verl.rewards._scoring import Scored

# How an episode ends: the environment says so, the turns or the tokens are used up, or something went wrong.
DONE, TURNS, LENGTH, FAILED, HUNG, LATE = "done", "turns", "length", "failed", "hung", "late"
ENDINGS = {DONE: "done", TURNS: "out_of_turns", LENGTH: "out_of_tokens", FAILED: "failed", HUNG: "hung", LATE: "late"}  # in metrics


@dataclass
class Outcome:
    """How an episode ended.

    Attributes:
        ending: one of ENDINGS.
        rewards: of each turn that the environment has answered.
        metrics: the environment's own numbers, by name.
        errors: what failed, and ended it.
        unclosed: what failed afterwards, when the environment was closed.
        waited: seconds for the environment.
    """

    ending: str = FAILED
    rewards: list[float] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    errors: list[UserError] = field(default_factory=list)
    unclosed: list[UserError] = field(default_factory=list)
    waited: float = 0.0

    @property
    def reward(self) -> float:
        return sum(self.rewards)


def with_outcomes(scored: Scored, outcomes: Sequence[Outcome], name: str) -> tuple[Scored, list[UserError]]:
    """Return the scores with the rewards of episodes added, under a name of their own, and what has failed in the episodes."""
    reward_A = np.array([outcome.reward for outcome in outcomes], dtype=np.float32)
    errors = [error for outcome in outcomes for error in outcome.errors]
    return replace(scored, reward_A=scored.reward_A + reward_A, each={**scored.each, name: reward_A}), errors


def metrics_of(outcomes: Sequence[Outcome], turns: Sequence[int]) -> tuple[dict[str, float], dict[str, float]]:
    """Return metrics of the episodes of all ranks, and those of the environment's own. Every rank calls it.

    One of the environment's own is the mean over all episodes; one that does not have it counts as 0.

    Args:
        turns: number of the model's turns in each episode.
    """
    endings = [float(sum(outcome.ending == ending for outcome in outcomes)) for ending in ENDINGS]
    sums = [sum(outcome.reward for outcome in outcomes), float(sum(turns)), sum(outcome.waited for outcome in outcomes)]
    episodes, reward, turned, waited, *counts = dist.total([float(len(outcomes)), *sums, *endings])
    n = max(episodes, 1.0)
    means = {"reward_mean": reward / n, "turns_mean": turned / n, "seconds_mean": waited / n}
    found = means | dict(zip(ENDINGS.values(), counts, strict=True))
    names = sorted({name for of_rank in dist.gathered({name for outcome in outcomes for name in outcome.metrics}) for name in of_rank})
    totals = dist.total([sum(outcome.metrics.get(name, 0.0) for outcome in outcomes) for name in names]) if names else []
    own = {name: value / n for name, value in zip(names, totals, strict=True)}
    return {f"environment/{name}": value for name, value in found.items()}, own
