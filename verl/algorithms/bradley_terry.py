"""Bradley-Terry: a reward model learns to score the chosen answer of a pair above the rejected one.

Documents are pairs, as in `verl.algorithms._pairs`; the scorer is a RewardScorer.

Dimensions: S documents; P pairs.
"""

import torch.nn.functional as F
from torch import Tensor

from verl.algorithms._pairs import count_pairs, pairs
from verl.data.batch import Batch
from verl.engine.contract import LossOut, ScoreOut

scorer, trains = "score", "a reward model"
measures = "accuracy margin chosen_reward rejected_reward"


class Loss:
    """-log sigmoid(chosen - rejected), a sum over pairs."""

    def __init__(self, settings: object):
        """`settings` is empty: this method has no keys."""

    def loss(self, out: ScoreOut, batch: Batch) -> LossOut:
        """Metrics are means over pairs: `accuracy`, `margin`, `chosen_reward` and `rejected_reward`."""
        chosen_P, rejected_P = pairs(out.score_S)
        margin_P = chosen_P - rejected_P
        metrics = {"accuracy": (margin_P > 0).float(), "margin": margin_P, "chosen_reward": chosen_P, "rejected_reward": rejected_P}
        sums = {name: values_P.detach().sum() / batch.parts for name, values_P in metrics.items()}
        return LossOut(-F.logsigmoid(margin_P).sum() / batch.parts, {}, sums)

    def slope(self, batch: Batch) -> Tensor | None:
        return None

    def count(self, batch: Batch) -> float:
        return count_pairs(batch)
