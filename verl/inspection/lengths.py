"""Lengths as a histogram, and the fill of micro-batches.

Dimensions: N documents, R rows.
"""

import numpy as np

from verl.data.loader import Packing, row_order
from verl.data.pack import pack, pad_groups
from verl.inspection.result import Bin, Lengths

BINS = 20
QUANTILES = (0, 50, 90, 99, 100)
STEPS_PACKED = 200  # steps whose micro-batches are made, to measure their fill


def lengths_of(lengths_N: np.ndarray) -> Lengths | None:
    """Return the lengths as a histogram; None if there are none. The last bin has all that are longer than nearly all others."""
    if not len(lengths_N):
        return None
    quantiles = np.quantile(lengths_N, [percent / 100 for percent in QUANTILES], method="inverted_cdf").tolist()
    low, high, longest = quantiles[0], int(np.quantile(lengths_N, 0.995)), quantiles[-1]
    width = _width(high - low + 1)
    start = low // width * width
    edges = np.arange(start, high + width + 1, width)
    edges[-1] = max(edges[-1], longest + 1)
    counts, _ = np.histogram(lengths_N, edges)
    bins = [Bin(int(first), int(end) - 1, int(count)) for first, end, count in zip(edges[:-1], edges[1:], counts, strict=True)]
    named = {str(percent): int(value) for percent, value in zip(QUANTILES, quantiles, strict=True)}
    return Lengths(len(lengths_N), float(lengths_N.mean()), named, bins)


def _width(span: int) -> int:
    """Return a round width of at most BINS bins over the span."""
    size = 1
    while True:
        for factor in (1, 2, 5):
            if span <= BINS * factor * size:
                return factor * size
        size *= 10


def fill_of(lengths_R: np.ndarray, packing: Packing, rows_per_step: int, seed: int) -> tuple[float, int]:
    """Make the micro-batches of one GPU for the first steps of an epoch.

    Args:
        lengths_R: tokens of each row.
    Returns:
        the fraction of their room that tokens of rows take, and their number.
    """
    order, room, tokens, many = row_order(len(lengths_R), seed, 0), 0, 0, 0
    for first in range(0, min(len(order), STEPS_PACKED * rows_per_step), rows_per_step):
        lengths = lengths_R[order[first : first + rows_per_step]].tolist()
        if packing.token_budget is None:
            groups = pad_groups(lengths, rows=packing.rows, multiple_of=1)
            room += sum(len(group) * max(lengths[row] for row in group) for group in groups)
        else:
            groups = pack(lengths, token_budget=packing.token_budget, multiple_of=1)
            room += len(groups) * packing.token_budget
        tokens, many = tokens + sum(lengths), many + len(groups)
    return tokens / max(1, room), many
