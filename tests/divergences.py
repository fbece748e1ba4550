"""Divergences of a student from a teacher, written out as the papers have them.

Dimensions: M positions, V vocabulary.
"""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

Formula: TypeAlias = Callable[[Tensor, Tensor, float], Tensor]  # of the logits of student and teacher, and beta


def written_out(student_MV: Tensor, teacher_MV: Tensor, beta: float) -> Tensor:
    p, q = student_MV.double().softmax(-1), teacher_MV.double().softmax(-1)
    if beta == 0.0:
        return (q * (q.log() - p.log())).sum(-1)
    if beta == 1.0:
        return (p * (p.log() - q.log())).sum(-1)
    m = beta * q + (1 - beta) * p
    return beta * (q * (q / m).log()).sum(-1) + (1 - beta) * (p * (p / m).log()).sum(-1)


def top_written_out(top_k: int) -> Formula:
    """The teacher's likeliest tokens, and the probability of all others as that of one."""

    def of(student_MV: Tensor, teacher_MV: Tensor, beta: float) -> Tensor:
        top = teacher_MV.topk(top_k).indices
        chosen = torch.zeros_like(teacher_MV, dtype=torch.bool).scatter(1, top, True)

        def bins(logits_MV: Tensor) -> Tensor:
            p = logits_MV.double().softmax(-1)
            return torch.cat([p.gather(1, top), p.masked_fill(chosen, 0.0).sum(-1, keepdim=True)], 1).log()

        return written_out(bins(student_MV), bins(teacher_MV), beta)

    return of
