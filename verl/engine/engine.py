"""The engine: forward, backward and optimizer step over packed micro-batches, on one process or many.

Dimensions: M trained positions.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from verl import dist as processes
from verl.config import OptimConfig
from verl.data.batch import Batch
from verl.engine.captured import CapturedBackward
from verl.engine.compile import uncompiled
from verl.engine.logprobs import TokenOut, TokenScorer
from verl.engine.optim import build_optimizer, learning_rate, set_learning_rate, update
from verl.engine.weights import SHARDED, MasterWeights, Spread, spread_weights


@dataclass
class LossOut:
    """A loss over one micro-batch, not yet divided by anything.

    Attributes:
        sum: what is minimized, summed over the trained tokens; a scalar with a gradient.
        metric_sums: scalars without a gradient, summed over the trained tokens, to be reported as means.
    """

    sum: Tensor
    metric_sums: dict[str, Tensor]


class Algorithm(Protocol):
    """What a method minimizes: a module such as `verl.algorithms.sft`."""

    def loss(self, out: TokenOut, batch: Batch) -> LossOut:
        """The loss of one micro-batch."""
        ...

    def slope(self, batch: Batch) -> Tensor | None:
        """Derivative of the loss's sum by each trained log-probability, where it is known before the model has run, else None.

        Known, it saves the backward pass a matrix product over the whole vocabulary.
        """
        ...


class Engine:
    """A model with its optimizer, sharded over all processes.

    Args:
        scorer: the model on any device, in the dtype that the optimizer updates; it is sharded in place.
        config: the optimizer and its schedule.
        total_steps: optimizer steps of the whole run, which the schedule spans.
        device: where the arithmetic runs.
        compute_dtype: of the forward and backward pass.
        spread: how the weights lie on the processes.
        fill: where the model has no values yet, reads them into its shards.
        captured: run small micro-batches as CUDA graphs, where one process has all of the weights.
    """

    def __init__(
        self,
        scorer: TokenScorer,
        config: OptimConfig,
        *,
        total_steps: int,
        device: torch.device,
        compute_dtype: torch.dtype,
        spread: Spread = SHARDED,
        fill: Callable[[nn.Module, torch.device], None] | None = None,
        captured: bool = False,
    ):
        self.device, self.compute_dtype = device, compute_dtype
        self.scorer = scorer
        self.weights = spread_weights(scorer, spread, device=device, compute_dtype=compute_dtype, fill=fill)
        self.captured = CapturedBackward(scorer, device) if captured and type(self.weights) is MasterWeights else None
        self.trained = list(self.weights.trained.values())
        self.optimizer = build_optimizer(self.trained, config, self.weights.copies)
        self.learning_rate = learning_rate(config, total_steps)
        self.largest_gradient_norm = config.clip_grad
        self.scorer.train()

    def train_step(self, micro_batches: Sequence[Batch], algorithm: Algorithm, step: int) -> dict[str, Tensor]:
        """One optimizer step.

        Args:
            micro_batches: this rank's, in host memory, at least one; as many on every rank.
            step: number of the step, counted from 0; it sets the learning rate.
        Returns:
            the means of the loss's metrics over all ranks, and `grad_norm`, as scalars on the device.
        """
        metrics = self.backward(micro_batches, algorithm)
        set_learning_rate(self.optimizer, self.learning_rate(step))
        metrics["grad_norm"] = update(self.optimizer, self.weights, self.largest_gradient_norm)
        return metrics

    def backward(self, micro_batches: Sequence[Batch], algorithm: Algorithm) -> dict[str, Tensor]:
        """Add up the gradients of the micro-batches, and return the means of the loss's metrics.

        The loss is divided once, by the number of trained tokens over all ranks and micro-batches, so that the gradient
        does not depend on how the rows were cut up.
        """
        tokens = self._sum_over_ranks(torch.tensor(float(sum(len(batch.trained_M) for batch in micro_batches)))).clamp(min=1)
        scale = processes.world_size() / tokens  # the mean of the ranks' gradients is taken; their sum is wanted
        sums: list[dict[str, Tensor]] = []
        for number, batch in enumerate(micro_batches):
            self.weights.begin(last=number == len(micro_batches) - 1)
            found = None
            if self.captured is not None and len(micro_batches) == 1:
                found = self.captured.backward(batch, algorithm, scale)
            sums.append(found if found is not None else self._backward(batch, algorithm, scale))
            self.weights.collect()
        return self._means(sums, tokens)

    def _backward(self, batch: Batch, algorithm: Algorithm, scale: Tensor) -> dict[str, Tensor]:
        batch = batch.to(self.device)
        slope_M = algorithm.slope(batch)
        result = algorithm.loss(self.scorer(batch, None if slope_M is None else slope_M * scale), batch)
        (result.sum * scale).backward()
        return result.metric_sums

    @torch.no_grad()
    def evaluate(self, micro_batches: Iterable[Batch], algorithm: Algorithm) -> dict[str, Tensor]:
        """The means of the loss's metrics over all trained tokens of all ranks, without training.

        Args:
            micro_batches: this rank's, in host memory, at least one; as many on every rank.
        """
        self.scorer.eval()
        tokens, sums = 0, []
        with uncompiled():
            for batch in micro_batches:
                tokens += len(batch.trained_M)
                batch = batch.to(self.device)
                sums.append(algorithm.loss(self.scorer(batch), batch).metric_sums)
        self.scorer.train()
        return self._means(sums, self._sum_over_ranks(torch.tensor(float(tokens))))

    def _means(self, sums: list[dict[str, Tensor]], tokens: Tensor) -> dict[str, Tensor]:
        names = list(sums[0])
        totals = self._sum_over_ranks(torch.stack([torch.stack([s[name].float() for s in sums]).sum() for name in names]))
        return dict(zip(names, (totals / tokens).unbind(), strict=True))

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        values = values.to(self.device, non_blocking=True)
        if processes.world_size() > 1:
            dist.all_reduce(values)
        return values
