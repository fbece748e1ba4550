"""Packing: which documents share a micro-batch, and the Batch made of them."""

import heapq
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from verl.data.batch import VALUES, Batch

Document = tuple[np.ndarray, np.ndarray]  # token ids int32 and whether each is trained, of equal length


def pack(lengths: Sequence[int], *, token_budget: int, multiple_of: int) -> list[list[int]]:
    """Spread documents over as few, and as evenly filled, bins as the token budget allows.

    The longest document goes first, each into the emptiest bin, so that ranks that take equal numbers of bins take
    about equal work. The result depends on the lengths alone.

    Args:
        lengths: tokens of each document, none above the budget.
        token_budget: most tokens of a bin.
        multiple_of: the number of bins is a multiple of this, the number of processes; a bin may stay empty.
    Returns:
        indices into `lengths`, a list a bin.
    """
    bins = -(-max(1, -(-sum(lengths) // token_budget)) // multiple_of) * multiple_of
    while (packed := _spread(lengths, bins, token_budget)) is None:
        bins += multiple_of
    return packed


def pack_units(lengths: Sequence[int], size: int, *, token_budget: int, multiple_of: int) -> list[list[int]]:
    """As `pack`, with units of `size` neighbours (2: pairs) whole and in order: documents 0 to size - 1, then the next ones.

    Args:
        lengths: tokens of each document; a multiple of `size` of them, and no unit above the budget.
    """
    assert len(lengths) % size == 0, f"{len(lengths)} documents in units of {size}"
    units = [sum(lengths[first : first + size]) for first in range(0, len(lengths), size)]
    assert max(units, default=0) <= token_budget, f"a unit of {max(units)} tokens in {token_budget}"
    bins = pack(units, token_budget=token_budget, multiple_of=multiple_of)
    return [[unit * size + place for unit in members for place in range(size)] for members in bins]


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
    """Without packing: at most `rows` documents of similar length a group, the number of groups a multiple."""
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
    """A Batch of whole documents side by side.

    Args:
        documents: at least none; without any, the batch is filler alone, so that a rank without rows keeps step.
        sample_ids: row number of each document.
        pad: fill each document up to the longest with untrained tokens behind it, where no real token sees them.
        multiple_of_tokens: fill the batch up to such a length with a document of untrained tokens.
        values: by field of the Batch, such as "advantage_M", an array for each document, as long as it has trained tokens (its
            first token is never one). A rank without documents gives the same fields with empty lists.
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
    loss_mask = np.zeros(cu_seqlens[-1], dtype=bool)
    for (ids, mask), start in zip(documents, cu_seqlens, strict=False):
        input_ids[start : start + len(ids)] = ids
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
        **of_trained,
    )


def _side_by_side(name: str, arrays: Sequence[np.ndarray], documents: Sequence[Document]) -> torch.Tensor:
    assert name in VALUES, name
    found, expected = [len(array) for array in arrays], [int(mask[1:].sum()) for _, mask in documents]
    assert found == expected, f"{name}: {found} values for documents of {expected} trained tokens"
    return torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.float32), *arrays]).astype(np.float32))


TILE = 128  # a GPU's kernels work on blocks of so many tokens
