"""What an algorithm and the engine know of each other: what a model says of a batch, and what a loss returns.

Dimensions: T tokens of the packed batch; M trained positions; S documents.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeAlias

from torch import Tensor

from verl.data.batch import Batch

# The derivative of what is minimized by each trained position's log-probability, slope_M in float32, where it is known before the
# model has run; or a function that gives that of some of them, from their log-probabilities and where they stand among all.
Slope: TypeAlias = Tensor | Callable[[Tensor, slice], Tensor]


@dataclass
class ValueOut:
    """What a critic says: `value_M`, float32, the reward that it expects before the token of that position is drawn."""

    value_M: Tensor


@dataclass
class ScoreOut:
    """What a reward model says: `score_S`, float32, one for each document, filler left out."""

    score_S: Tensor


@dataclass
class TokenOut:
    """What a model says of the trained tokens, in float32.

    Attributes:
        logprob_M: natural log.
        entropy_M: of the distribution that each token was one of, in nats; None: not asked for.
    """

    logprob_M: Tensor
    entropy_M: Tensor | None = None


@dataclass
class LossOut:
    """A loss over one micro-batch, not yet divided by anything.

    Attributes:
        sum: what is minimized, summed over what the algorithm counts; a scalar with a gradient.
        metric_sums: scalars without a gradient, summed over the trained tokens, to be reported as means.
        count_sums: likewise, summed over what the algorithm counts, such as answers or pairs.
        metric_maxima: scalars to be reported as the largest of all micro-batches and ranks.
    """

    sum: Tensor
    metric_sums: dict[str, Tensor]
    count_sums: dict[str, Tensor] = field(default_factory=dict)
    metric_maxima: dict[str, Tensor] = field(default_factory=dict)

    def detached(self) -> "LossOut":
        """The same without the graph."""
        return replace(self, sum=self.sum.detach())


class Algorithm(Protocol):
    """What a method minimizes: a module such as `verl.algorithms.sft`.

    It may have `count(batch: Batch) -> float` too: what a micro-batch in host memory adds to the number that the loss is divided
    by. Without it, that is the number of trained tokens.
    """

    def loss(self, out: Any, batch: Batch) -> LossOut:
        """The loss of one micro-batch, from what the engine's scorer says of it."""
        ...

    def slope(self, batch: Batch) -> Slope | None:
        """Derivative of the loss's sum by each trained log-probability: known before the model has run, or a function of that
        log-probability alone; None where it is neither.

        It saves the backward pass a matrix product over the whole vocabulary.
        """
        ...
