"""Packing: assign documents to micro-batches, and build the Batch of each."""

import heapq
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from verl.data.batch import VALUES, Batch

Document = tuple[np.ndarray, np.ndarray]  # token ids, int32, and loss mask, bool, of equal length


def pack(lengths: Sequence[int], *, token_budget: int, multiple_of: int) -> list[list[int]]:
    """Distribute documents over as few bins as the token budget allows, and fill the bins evenly.

    Documents are taken from longest to shortest, and each goes into the emptiest bin, so that ranks with equal numbers of bins
    have about equal work. The result depends on the lengths alone.

    Args:
        lengths: tokens of each document, none above the budget.
        token_budget: maximum tokens per bin.
        multiple_of: the number of bins is a multiple of this, the number of ranks; bins may be empty.
    Returns:
        one list of indices into `lengths` per bin.
    """
    bins = -(-max(1, -(-sum(lengths) // token_budget)) // multiple_of) * multiple_of
    while (packed := _spread(lengths, bins, token_budget)) is None:
        bins += multiple_of
    return packed


def _spread(lengths: Sequence[int], bins: int, token_budget: int) -> list[list[int]] | None:
    filled: list[list[int]] = [[] for _ in range(bins)]
    emptiest = [(0, number) for number in range(bins)]
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        tokens, number = emptiest[0]
        if tokens + lengths[index] > token_budget:
            return None
        filled[number].append(index)
        heapq.heapreplace(emptiest, (tokens + lengths[index], number))
    return filled


def pad_groups(lengths: Sequence[int], *, rows: int, multiple_of: int) -> list[list[int]]:
    """Group documents of similar length for padding: at most `rows` per group, and a multiple of `multiple_of` groups."""
    groups = -(-max(1, -(-len(lengths) // rows)) // multiple_of) * multiple_of
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [group.tolist() for group in np.array_split(np.array(longest_first, dtype=np.int64), groups)]


def collate(
    documents: Sequence[Document],
    sample_ids: Sequence[int],
    *,
    pad: bool = False,
    multiple_of_tokens: int = 1,
    values: Mapping[str, Sequence[np.ndarray]] | None = None,
) -> Batch:
    """Concatenate whole documents into a Batch.

    Args:
        documents: may be empty; the batch is then filler alone, so that a rank without rows keeps in step with the others.
        sample_ids: row number of each document.
        pad: right-pad each document to the longest with untrained tokens, to which no real token attends.
        multiple_of_tokens: fill the batch up to a multiple of this length with a document of untrained tokens.
        values: per field of the Batch, such as "advantage_M", one array per document, with one value per trained token (the first
            token of a document is never trained). A rank without documents passes the same fields with empty lists.
    """
    sample_ids = list(sample_ids)
    longest = max((len(ids) for ids, _ in documents), default=0)
    room = [longest if pad else len(ids) for ids, _ in documents]
    filler = -sum(room) % multiple_of_tokens if room else multiple_of_tokens
    if filler > 0:
        room.append(filler)
        sample_ids.append(-1)
    cu_seqlens = np.concatenate([[0], np.cumsum(room)])
    input_ids, target = np.zeros(cu_seqlens[-1], dtype=np.int64), np.zeros(cu_seqlens[-1], dtype=np.int64)
    loss_mask, real = np.zeros((2, cu_seqlens[-1]), dtype=bool)
    for (ids, mask), start in zip(documents, cu_seqlens, strict=False):
        input_ids[start : start + len(ids)] = ids
        real[start : start + len(ids)] = True
        target[start : start + len(ids) - 1] = ids[1:]
        loss_mask[start : start + len(ids) - 1] = mask[1:]
    position_ids = np.concatenate([np.arange(length) for length in room])
    of_trained: dict[str, Any] = {name: _side_by_side(name, arrays, documents) for name, arrays in (values or {}).items()}
    return Batch(
        input_ids_T=torch.from_numpy(input_ids),
        position_ids_T=torch.from_numpy(position_ids),
        cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
        max_seqlen=max(room),
        target_T=torch.from_numpy(target),
        loss_mask_T=torch.from_numpy(loss_mask),
        sample_ids_S=torch.tensor(sample_ids, dtype=torch.int64),
        trained_M=torch.from_numpy(loss_mask.nonzero()[0]),
        has_filler=filler > 0,
        real_T=None if real.all() else torch.from_numpy(real),
        **of_trained,
    )


def _side_by_side(name: str, arrays: Sequence[np.ndarray], documents: Sequence[Document]) -> torch.Tensor:
    assert name in VALUES, name
    found, expected = [len(array) for array in arrays], [int(mask[1:].sum()) for _, mask in documents]
    assert found == expected, f"{name}: {found} values for documents of {expected} trained tokens"
    return torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.float32), *arrays]).astype(np.float32))


TILE = 128  # block size of GPU matmul kernels, in tokens
