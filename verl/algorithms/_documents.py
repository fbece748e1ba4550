"""Sums over the trained tokens of each document of a batch, also of one whose tokens lie on several processes.

Dimensions: M trained positions; S documents of the batch, filler included.
"""

import torch
from torch import Tensor

from verl.data.batch import Batch
from verl.dist import sum_over_parts


def document_of_token(batch: Batch) -> Tensor:
    """The number of the document that each trained position lies in, document_M."""
    return torch.searchsorted(batch.cu_seqlens[1:].long(), batch.trained_M + batch.first_token, right=True)


def sum_by_document(values_M: Tensor, batch: Batch) -> Tensor:
    """values_S, with a gradient; the same on each process that shares the batch. Added up in one order, so that it repeats."""
    sums_S = torch.segment_reduce(values_M, "sum", offsets=_offsets(batch), unsafe=True, initial=0)
    return sum_over_parts(sums_S, batch.parts)


def trained_tokens(batch: Batch) -> Tensor:
    """How many each document has, tokens_S in float32."""
    return sum_over_parts(_offsets(batch).diff().float(), batch.parts)


def _offsets(batch: Batch) -> Tensor:
    """S + 1 places in trained_M where documents begin."""
    return torch.searchsorted(batch.trained_M + batch.first_token, batch.cu_seqlens.long())
