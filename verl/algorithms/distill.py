"""Distillation: a student learns the probabilities of a teacher, on its own answers or on given ones (GKD, arXiv:2306.13649).

`Loss` is for the student's own answers (`verl ppo`), alone or beside a reward; `FixedLoss` for given answers (`verl sft`). The keys of the
teacher are those of `verl.config.shared`.

Dimensions: M trained positions, C positions of a chunk.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from verl import dist
from verl.algorithms._advantage import finished, group_advantages
from verl.algorithms._policy import PolicyLoss
from verl.algorithms._settings import GroupSettings
from verl.algorithms.answers import Advantages, Answers
from verl.config.shared import TeacherConfig
from verl.data.batch import Batch
from verl.engine.contract import LossOut, Slope, TokenOut
from verl.errors import UserError

needs_critic, needs_groups, needs_teacher = False, False, True


@dataclass
class Settings(GroupSettings):
    norm_by_std: bool = True
    # Without a KL penalty there is no use for the model that the run starts from.
    keep_reference: bool = False

    def check(self) -> None:
        super().check()
        if self.entropy_coef > 0:
            what = "the gradient of the entropy bonus is not computed together with that of a divergence"
            fix = "set it to 0; teacher.divergence=forward keeps answers diverse"
            raise UserError(what, where="entropy_coef", fix=fix)


def advantages(answers: Answers, settings: Settings) -> Advantages:
    """Same as in GRPO, for the reward beside the teacher; 0 if no prompt has several answers, as a student without a reward may draw."""
    _, sizes = np.unique(answers.group_A, return_counts=True)
    if dist.most(int(sizes.max(initial=0))) > 1:
        return group_advantages(answers, settings)
    return finished(answers, settings, [np.zeros(length) for length in answers.lengths_A])


class Loss:
    """weight × divergence + (1 - weight) × GRPO's loss; `loss_aggregation` weighs the tokens of both."""

    def __init__(self, settings: Settings, max_new_tokens: int, teacher: TeacherConfig):
        self._policy, self._weight = _Policy(settings, max_new_tokens), teacher.weight

    def loss(self, out: TokenOut, batch: Batch) -> LossOut:
        """Means over trained tokens: those of the policy loss; `divergence`; `teacher_gap`, the mean log-probability minus the teacher's,
        which estimates the reverse KL on the student's own answers; `teacher_agreement`, the share of positions where both have the same
        likeliest token.
        """
        assert out.divergence_M is not None
        policy = self._policy.loss(out, batch)
        taught = (out.divergence_M * self._policy.share(batch)).sum()
        total = self._weight * taught
        if self._weight < 1.0:
            total = total + (1 - self._weight) * policy.sum
        return LossOut(total, {**policy.metric_sums, **_metrics(out)}, metric_maxima=policy.metric_maxima)

    def slope(self, batch: Batch) -> Slope:
        """Return the derivatives by divergence and log-probability (`verl.engine.divergence.Slopes`)."""
        share, weight = self._policy.share(batch), self._weight
        policy = None if weight == 1.0 else self._policy.slope(batch)

        def slopes(logprob_C: Tensor, rows: slice) -> Tensor:
            by_divergence_C = torch.full_like(logprob_C, weight) * (share[rows] if isinstance(share, Tensor) else share)
            if policy is None:
                return by_divergence_C[None]
            by_logprob_C = policy[rows] if isinstance(policy, Tensor) else policy(logprob_C, rows)
            return torch.stack([by_divergence_C, (1 - weight) * by_logprob_C])

        return slopes

    def count(self, batch: Batch) -> float:
        return self._policy.count(batch)


class _Policy(PolicyLoss):
    """The policy loss, with the weights of its tokens."""

    def share(self, batch: Batch) -> Tensor | float:
        """Return each token's weight in the loss."""
        return self._share(batch)


class FixedLoss:
    """weight × divergence + (1 - weight) × cross-entropy, a sum over trained tokens."""

    def __init__(self, teacher: TeacherConfig):
        self._weight = teacher.weight

    def loss(self, out: TokenOut, batch: Batch) -> LossOut:
        """Means over trained tokens: `cross_entropy`, and those of `Loss` that a teacher gives."""
        assert out.divergence_M is not None
        total = self._weight * out.divergence_M.sum() - (1 - self._weight) * out.logprob_M.sum()
        return LossOut(total, {"cross_entropy": -out.logprob_M.detach().sum(), **_metrics(out)})

    def slope(self, batch: Batch) -> Slope:
        """Return the derivatives by divergence and log-probability (`verl.engine.divergence.Slopes`)."""
        by_each = [self._weight, *([] if self._weight == 1.0 else [self._weight - 1])]
        return lambda logprob_C, rows: torch.stack([torch.full_like(logprob_C, value) for value in by_each])

    def count(self, batch: Batch) -> float:
        """Return the number of trained tokens. Having it, the loss is not captured in a CUDA graph, which would hold no teacher."""
        return len(batch.trained_M)


def _metrics(out: TokenOut) -> dict[str, Tensor]:
    assert out.divergence_M is not None and out.gap_M is not None and out.agrees_M is not None
    return {"divergence": out.divergence_M.detach().sum(), "teacher_gap": out.gap_M.sum(), "teacher_agreement": out.agrees_M.sum()}
