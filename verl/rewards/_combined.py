"""How the rewards of an answer become one number: thresholds, a weighted sum, and gates.

Dimensions: A answers.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from verl.errors import UserError

GATED = "gated"  # name of the share of answers that miss a gate, among the rewards


@dataclass(frozen=True)
class Combined:
    """The rule of a sum.

    Attributes:
        weights: weight of each reward, by name.
        thresholds: rewards from which on an answer counts as right, by name.
        gates: rewards that an answer must reach, by name.
        gated: reward of an answer that does not.
    Raises:
        UserError: a threshold or a gate is of a reward that is not there.
    """

    weights: Mapping[str, float]
    thresholds: Mapping[str, float]
    gates: Mapping[str, float]
    gated: float = 0.0

    def __post_init__(self) -> None:
        for key, named in (("reward.thresholds", self.thresholds), ("reward.gates", self.gates)):
            for name in named:
                if name not in self.weights:
                    near = difflib.get_close_matches(name, self.weights, n=1)
                    fix = f"did you mean {near[0]}?" if near else f"name one of {', '.join(self.weights)}, or add it to reward.name"
                    raise UserError(f"there is no reward {name!r}", where=key, fix=fix)

    def of(self, each: Mapping[str, np.ndarray], answers: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Return the sum of the rewards, float32 [A], and the rewards with what the gates did.

        Gates look at the rewards as they are, before thresholds and weights; a reward with the weight 0 is a gate alone.
        """
        total = np.zeros(answers)
        for name, values in each.items():
            counted = (values >= self.thresholds[name]).astype(np.float64) if name in self.thresholds else values
            total = total + self.weights[name] * counted
        if not self.gates:
            return np.asarray(total, dtype=np.float32), dict(each)
        misses = np.zeros(answers, dtype=bool)
        for name, least in self.gates.items():
            misses |= ~(each[name] >= np.float32(least))
        total = np.where(misses, self.gated, total)
        return np.asarray(total, dtype=np.float32), {**each, GATED: misses.astype(np.float32)}
