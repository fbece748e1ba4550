"""Pairs of consecutive documents that are equal.

Dimensions: R documents; B tokens of one cached table.
"""

from collections.abc import Sequence

import numpy as np

from verl.data.tables import ROWS_PER_TABLE

Range = tuple[np.ndarray, np.ndarray]  # start and length of each document


def equal_pairs(tables: Sequence[np.ndarray], whole: Range, cut: Range) -> Range:
    """Return for each pair whether its documents are equal: whole, and as they are cut.

    Args:
        tables: token ids of each table, ids_B.
    """
    same = _equal(tables, *whole)
    return same, same if np.array_equal(whole[1], cut[1]) else _equal(tables, *cut)


def _equal(tables: Sequence[np.ndarray], starts_R: np.ndarray, lengths_R: np.ndarray) -> np.ndarray:
    same: np.ndarray = np.diff(lengths_R)[::2] == 0
    for pair in np.flatnonzero(same):
        ids_B, both = tables[2 * pair // ROWS_PER_TABLE], slice(2 * pair, 2 * pair + 2)
        first, second = (ids_B[start : start + length] for start, length in zip(starts_R[both], lengths_R[both], strict=True))
        same[pair] = np.array_equal(first, second)
    return same
