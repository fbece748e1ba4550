"""Sums over the ranks that share a micro-batch (context parallelism)."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from verl.dist import context_group, context_name


def sum_over_parts(part: Tensor, parts: int) -> Tensor:
    """Sum over the ranks that share a batch, with a gradient; every rank gets the same sum.

    Args:
        part: this rank's summand, of the same shape on all ranks.
        parts: number of these ranks (`Batch.parts`).
    """
    total: Tensor = part if parts == 1 else _SumOverParts.apply(part)
    return total


class _SumOverParts(torch.autograd.Function):
    """All-reduce in both passes: every rank's loss depends on every summand, so the gradients are summed too."""

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        total = part.clone()
        dist.all_reduce(total, group=context_group(context_name()))
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _SumOverParts.forward(ctx, gradients[0])
