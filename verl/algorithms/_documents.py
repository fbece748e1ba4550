"""Sums over the trained tokens of each document in a batch, also if the document is split over several processes.

Dimensions: M trained positions; S documents of the batch, filler included.
"""

import torch
from torch import Tensor

from verl.data.batch import Batch
from verl.parts import sum_over_parts


def document_of_token(batch: Batch) -> Tensor:
    """Return the index of each trained position's document, document_M."""
    return torch.searchsorted(batch.cu_seqlens[1:].long(), batch.trained_M + batch.first_token, right=True)


def sum_by_document(values_M: Tensor, batch: Batch) -> Tensor:
    """Return the sum over each document, values_S, differentiable. All processes that share the batch get the same sums.

    The order of summation is fixed, so that results are reproducible.
    """
    sums_S = torch.segment_reduce(values_M, "sum", offsets=_offsets(batch), unsafe=True, initial=0)
    return sum_over_parts(sums_S, batch.parts)


def trained_tokens(batch: Batch) -> Tensor:
    """Return the number of trained tokens of each document, tokens_S in float32."""
    return sum_over_parts(_offsets(batch).diff().float(), batch.parts)


def _offsets(batch: Batch) -> Tensor:
    """Return the S + 1 offsets into trained_M at which documents begin and end."""
    return torch.searchsorted(batch.trained_M + batch.first_token, batch.cu_seqlens.long())
