"""The interface between algorithms and the engine: model outputs and loss results.

Dimensions: M trained positions; S documents.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeAlias

from torch import Tensor

from verl.data.batch import Batch

# The derivative of the loss with respect to the log-probability of each trained position. It is a float32 tensor slope_M if it is known
# before the forward pass. Else it is a function that gets some log-probabilities and their slice of M, and returns their derivatives.
Slope: TypeAlias = Tensor | Callable[[Tensor, slice], Tensor]


@dataclass
class ValueOut:
    """Output of a critic: `value_M`, float32, the expected return before the token is sampled."""

    value_M: Tensor


@dataclass
class ScoreOut:
    """Output of a reward model: `score_S`, float32, one score per document, without filler; of a classifier [S, L], one per label."""

    score_S: Tensor


@dataclass
class TokenOut:
    """Output of a language model at the trained tokens, in float32.

    Attributes:
        logprob_M: log-probability of the token, natural log.
        entropy_M: entropy of the predictive distribution, in nats; None if not requested.
        divergence_M, gap_M, agrees_M: divergence from a teacher in nats; log-probability of the token minus the teacher's; 1 where both
            have the same likeliest token, else 0 (`verl.engine.divergence`). None without a teacher.
    """

    logprob_M: Tensor
    entropy_M: Tensor | None = None
    divergence_M: Tensor | None = None
    gap_M: Tensor | None = None
    agrees_M: Tensor | None = None


@dataclass
class LossOut:
    """Unnormalized loss of one micro-batch.

    Attributes:
        sum: loss summed over the units that the algorithm counts, such as tokens or pairs; a scalar with a gradient.
        metric_sums: scalars without a gradient, summed over the trained tokens; reported as means.
        count_sums: scalars without a gradient, summed over the counted units; reported as means.
        metric_maxima: scalars without a gradient; reported as the maximum over all micro-batches and ranks.
    """

    sum: Tensor
    metric_sums: dict[str, Tensor]
    count_sums: dict[str, Tensor] = field(default_factory=dict)
    metric_maxima: dict[str, Tensor] = field(default_factory=dict)

    def detached(self) -> "LossOut":
        """Return a copy without the autograd graph."""
        return replace(self, sum=self.sum.detach())


class Algorithm(Protocol):
    """The loss of a method: a module such as `verl.algorithms.sft`.

    It may also have `count(batch: Batch) -> float`, the number of units in a micro-batch in host memory. The engine divides the loss by
    the sum of these counts. Without `count`, it divides by the number of trained tokens.
    """

    def loss(self, out: Any, batch: Batch) -> LossOut:
        """Compute the loss of one micro-batch from the scorer's output."""
        ...

    def slope(self, batch: Batch) -> Slope | None:
        """Return the derivative of `LossOut.sum` with respect to each trained log-probability.

        It must be known before the forward pass, or be a function of that log-probability alone; otherwise return None. A slope saves
        the backward pass a matmul over the whole vocabulary.
        """
        ...
