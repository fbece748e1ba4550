"""On-policy distillation: a teacher scores the student's own answers (GKD, arXiv:2306.13649, with λ = 1 and the reverse KL).

    verl ppo … algorithm.name=examples/algorithms/distillation.py algorithm.teacher=Qwen/Qwen2.5-7B-Instruct

`algorithm.teacher` names the teacher. It replaces the initial model as the reference, and needs the student's vocabulary.
Rewards are logged but not trained on. The gradient of KL(student || teacher) at a token is the expectation, over tokens sampled from the
student, of the gradient of -(log teacher - log student) × log student, with the first factor detached.

Dimensions: M trained positions.
"""

from dataclasses import dataclass

import numpy as np
from omegaconf import MISSING
from torch import Tensor

from verl.algorithms.answers import Advantages, Answers
from verl.config.shared import ModelConfig
from verl.data.batch import Batch
from verl.engine.contract import LossOut, Slope, TokenOut


@dataclass
class Settings:
    # The teacher: a model directory or Hub name, with the student's vocabulary.
    teacher: str = MISSING
    # The log-probability difference of a token is clipped to ± this.
    largest_gap: float = 10.0

    def check(self) -> None:
        if not self.largest_gap > 0:
            raise ValueError(f"largest_gap={self.largest_gap} is not positive")


def reference(settings: Settings, model: ModelConfig) -> str:
    """Return the path or name of the reference model."""
    return settings.teacher


def advantages(answers: Answers, settings: Settings) -> Advantages:
    """Return zeros: the loss does not use advantages."""
    return Advantages([np.zeros(length, dtype=np.float32) for length in answers.lengths_A], None, {})


class Loss:
    """The sum over tokens of -(log teacher - log student) × ratio of new to old probability, with the first factor detached.

    With one update per step, the ratio is 1 and its gradient is that of log student.
    """

    def __init__(self, settings: Settings, max_new_tokens: int):
        self._largest = settings.largest_gap

    def loss(self, out: TokenOut, batch: Batch) -> LossOut:
        """Return the loss and the sums of its metrics over tokens: `teacher_gap`, the KL divergence from the teacher, and `entropy`.

        The log shows the metrics as means over tokens.
        """
        assert batch.ref_logprob_M is not None
        gap_M = batch.ref_logprob_M - out.logprob_M.detach()
        old_M = out.logprob_M.detach() if batch.old_logprob_M is None else batch.old_logprob_M
        loss_M = -gap_M.clamp(-self._largest, self._largest) * (out.logprob_M - old_M).exp()
        metrics = {"teacher_gap": -gap_M.sum()}
        if out.entropy_M is not None:
            metrics["entropy"] = out.entropy_M.detach().sum()
        return LossOut(loss_M.sum(), metrics)

    def slope(self, batch: Batch) -> Slope | None:
        """Return the derivative of the loss with respect to each token's log-probability, as a function of that log-probability."""
        ref_M, old_M, largest = batch.ref_logprob_M, batch.old_logprob_M, self._largest
        assert ref_M is not None

        def slope(logprob_C: Tensor, rows: slice) -> Tensor:
            gap_C = (ref_M[rows] - logprob_C).clamp(-largest, largest)
            return -gap_C if old_M is None else -gap_C * (logprob_C - old_M[rows]).exp()

        return slope
