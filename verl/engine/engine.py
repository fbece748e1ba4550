"""The engine: forward pass, backward pass and optimizer step over packed micro-batches, on one or more ranks.

Dimensions: M trained positions.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from verl import dist as processes
from verl.config.shared import OptimConfig
from verl.data.batch import Batch
from verl.engine.contract import Algorithm, LossOut, Slope
from verl.engine.layers import uncompiled
from verl.engine.optim import build_optimizer, learning_rate, set_learning_rate, update
from verl.engine.scorers import Scorer
from verl.engine.weights import SHARDED, Spread, spread_weights
from verl.models.linear import use_whole_cpu

if TYPE_CHECKING:
    from verl.engine.cuda_graphs import CapturedBackward
    from verl.engine.router_loss import RouterLoss


class Engine:
    """A model with its optimizer, distributed over all ranks.

    Args:
        scorer: model on any device, in the dtype that the optimizer updates; it is sharded in place.
        config: optimizer and learning-rate schedule; None freezes the model, which can then only score.
        total_steps: optimizer steps of the whole run, the length of the schedule.
        device: device that computes.
        compute_dtype: dtype of the forward and backward pass.
        spread: distribution of the weights over ranks.
        fill: reads the weights of a model on the meta device into its shards; None if the model has its weights.
        graph_tokens: largest micro-batch to run as a CUDA graph, in tokens; 0: none. CUDA graphs need a single process that holds all
            weights.
    """

    def __init__(
        self,
        scorer: Scorer,
        config: OptimConfig | None,
        *,
        total_steps: int,
        device: torch.device,
        compute_dtype: torch.dtype,
        spread: Spread = SHARDED,
        fill: Callable[[nn.Module, torch.device], None] | None = None,
        graph_tokens: int = 0,
    ):
        self.device, self.compute_dtype = device, compute_dtype
        self.scorer = scorer
        if config is None:
            scorer.requires_grad_(False)
        self.weights = spread_weights(scorer, spread, device=device, compute_dtype=compute_dtype, fill=fill)
        self.captured = _captured(scorer, device, graph_tokens) if graph_tokens else None
        self.router_loss: RouterLoss | None = None  # of a mixture of experts; set before training
        self.trained = list(self.weights.trained.values())
        self._skipped = 0
        if config is not None:
            self.optimizer = build_optimizer(self.trained, config, self.weights.copies)
            self.learning_rate = learning_rate(config, total_steps)
            self.largest_gradient_norm = config.clip_grad
        use_whole_cpu(scorer)
        self.scorer.train(config is not None)

    def train_step(
        self, micro_batches: Sequence[Batch], algorithm: Algorithm, step: int, *, left_out: Sequence[Batch] = ()
    ) -> dict[str, Tensor]:
        """Take one optimizer step. If the loss or the gradient norm is not finite, all ranks skip it: weights, moments and learning rate do
        not change.

        Args:
            micro_batches: micro-batches of this rank, in host memory; at least one, and the same number on every rank.
            step: index of the step, counted from 0; without the skipped ones before it, it sets the learning rate.
            left_out: see `backward`.
        Returns:
            `loss`, the means of its metrics over all ranks, `grad_norm`, and `skipped` (1 if the step was skipped, else 0), as scalars on
            the device.
        """
        metrics = self.backward(micro_batches, algorithm, left_out)
        set_learning_rate(self.optimizer, self.learning_rate(step - self.skipped))
        norm, finite = update(self.optimizer, self.weights, self.largest_gradient_norm, metrics["loss"])
        if not hasattr(self.optimizer, "settle"):
            self._skipped += not finite  # the update has waited for it, too
        metrics |= {"grad_norm": norm, "skipped": 1.0 - finite.float()}
        return {name: value.to(self.device) for name, value in metrics.items()}  # offloaded weights have their norm in host memory

    @property
    def skipped(self) -> int:
        """Number of steps whose update was skipped. On a GPU, this waits for the last step, unless the next one is queued already."""
        settle = getattr(self.optimizer, "settle", None)
        return self._skipped + (settle() if settle else 0)

    def set_skipped(self, steps: int) -> None:
        """Set the number of skipped steps to that of the checkpoint which the run resumes from."""
        self._skipped = steps

    @property
    def trained_weights(self) -> int:
        """Number of trained weights, over all ranks."""
        return sum(p.numel() for p in self.trained)

    def backward(self, micro_batches: Sequence[Batch], algorithm: Algorithm, left_out: Sequence[Batch] = ()) -> dict[str, Tensor]:
        """Accumulate the gradients of the micro-batches, and return the loss and the means of its metrics.

        The loss is divided once, by its count over all ranks and micro-batches: the number of trained tokens, or of the units that the
        algorithm counts. So the gradient does not depend on how rows are divided into micro-batches.

        Args:
            left_out: more micro-batches of this rank, whose loss and gradient are known to be zero, so that the model does not run on
                them. Their count is part of the divisor of the loss, but their tokens are not part of the divisor of the metrics.
        """
        uncounted = [(0.0, _counts(batch, algorithm)[1]) for batch in left_out]
        totals = self._totals([_counts(batch, algorithm) for batch in micro_batches] + uncounted)
        scale = processes.world_size() / totals[1]  # gradients are averaged over ranks, but we need their sum
        results: list[LossOut] = []
        if self.router_loss is not None:
            self.router_loss.begin(self.scorer, micro_batches, self.device)
        for number, batch in enumerate(micro_batches):
            processes.moved()
            self.weights.begin(last=number == len(micro_batches) - 1)
            found = None
            if self.captured is not None and self.router_loss is None and len(micro_batches) == 1 and not hasattr(algorithm, "count"):
                found = self.captured.backward(batch, algorithm, scale)
            results.append(found if found is not None else self._backward(batch, algorithm, scale))
            self.weights.collect()
        return self._metrics(results, totals) | ({} if self.router_loss is None else self.router_loss.finish())

    def _backward(self, batch: Batch, algorithm: Algorithm, scale: Tensor) -> LossOut:
        batch = batch.to(self.device)
        slope = algorithm.slope(batch)
        result = algorithm.loss(self.scorer(batch, None if slope is None else _scaled(slope, scale)), batch)
        more = 0.0 if self.router_loss is None else self.router_loss.of(batch)
        (result.sum * scale + more).backward()
        return result.detached()

    @torch.no_grad()
    def evaluate(self, micro_batches: Iterable[Batch], algorithm: Algorithm) -> dict[str, Tensor]:
        """Compute the loss and the means of its metrics over all ranks, without training.

        Args:
            micro_batches: micro-batches of this rank, in host memory; at least one, and the same number on every rank.
        """
        training = self.scorer.training
        self.scorer.eval()
        counted, results = [], []
        with uncompiled():
            for batch in micro_batches:
                counted.append(_counts(batch, algorithm))
                batch = batch.to(self.device)
                results.append(algorithm.loss(self.scorer(batch), batch))
        self.scorer.train(training)
        return self._metrics(results, self._totals(counted))

    def score(self, micro_batches: Iterable[Batch]) -> list[Any]:
        """Return the model's output for each micro-batch, in order, on the device and without a gradient.

        This runs the same kernels as training, including compiled ones, so that probability ratios are exactly 1 before the first update.

        Args:
            micro_batches: micro-batches of this rank, in host memory; the same number on every rank.
        """
        from verl.models.randomness import is_random

        training = self.scorer.training
        # Stay in training mode, because evaluation mode would compile other kernels. Only dropout and the like must be off.
        self.scorer.train(training and not is_random(self.scorer, self.scorer.model.config))
        outs = [_without_gradient(self.scorer(batch.to(self.device))) for batch in micro_batches]
        self.scorer.train(training)
        if isinstance(self.scorer, FSDPModule):
            self.scorer.reshard()
        return outs

    def _totals(self, counted: Sequence[tuple[float, float]]) -> Tensor:
        """Return the trained tokens and the algorithm's count, summed over all micro-batches and ranks; each is at least 1."""
        return self._sum_over_ranks(torch.tensor(counted).sum(0)).clamp(min=1)

    def _metrics(self, results: Sequence[LossOut], totals: Tensor) -> dict[str, Tensor]:
        tokens, count = totals.unbind()
        sums = {name: [r.metric_sums[name] for r in results] for name in results[0].metric_sums}
        count_sums = {name: [r.count_sums[name] for r in results] for name in results[0].count_sums}
        count_sums["loss"] = [r.sum for r in results]
        summed = [torch.stack(values).float().sum() for values in (*sums.values(), *count_sums.values())]
        divisors = torch.stack([tokens] * len(sums) + [count] * len(count_sums))
        means = (self._sum_over_ranks(torch.stack(summed)) / divisors).unbind()
        return dict(zip((*sums, *count_sums), means, strict=True)) | self._maxima(results)

    def _maxima(self, results: Sequence[LossOut]) -> dict[str, Tensor]:
        names = list(results[0].metric_maxima)
        if not names:
            return {}
        largest = torch.stack([torch.stack([r.metric_maxima[name] for r in results]).float().amax() for name in names])
        if processes.world_size() > 1:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=processes.group())
        return dict(zip(names, largest.unbind(), strict=True))

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        values = values.to(self.device, non_blocking=True)
        if processes.world_size() > 1:
            dist.all_reduce(values, group=processes.group())
        return values


def _captured(scorer: Scorer, device: torch.device, graph_tokens: int) -> "CapturedBackward":
    from verl.engine.cuda_graphs import CapturedBackward  # only a GPU needs it

    return CapturedBackward(scorer, device, graph_tokens)


def _counts(batch: Batch, algorithm: Algorithm) -> tuple[float, float]:
    """Return the trained tokens of a micro-batch in host memory, and the algorithm's count."""
    tokens = float(len(batch.trained_M))
    count = getattr(algorithm, "count", None)
    return tokens, tokens if count is None else float(count(batch))


def _scaled(slope: Slope, scale: Tensor) -> Slope:
    return slope * scale if isinstance(slope, Tensor) else lambda logprob_C, rows: slope(logprob_C, rows) * scale


def _without_gradient(out: Any) -> Any:
    tensors = {f.name: value.detach() for f in fields(out) if isinstance(value := getattr(out, f.name), Tensor)}
    return replace(out, **tensors)
