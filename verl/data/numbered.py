"""Rows that give a number beside their text: whether an answer is good, or by how much the better answer of a pair is better.

Dimensions: N documents, R rows; S documents of a batch, filler included.
"""

import hashlib
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from verl.data.batch import Batch
from verl.data.documents import Documents
from verl.data.fingerprint import row_digests
from verl.data.loader import RowChoice, TokenizedRows, row_order


@dataclass
class NumberedBatch(Batch):
    """A micro-batch with the numbers of its rows.

    Attributes:
        number_S: number of each document's row, float32; 0 for filler.
        mean_number: mean number of all rows of the step, or of the validation; a scalar.
        estimate: mean over the step's rows of what the method estimates before the step, see `verl.trainer.preference`; None: nothing.
    """

    number_S: Tensor = field(default_factory=lambda: torch.zeros(0))
    mean_number: Tensor = field(default_factory=lambda: torch.zeros(()))
    estimate: Tensor | None = None


@dataclass(frozen=True, eq=False)
class NumberedRows(Documents):
    """Documents whose rows have numbers.

    Attributes:
        number_R: number of each row, float32.
        mismatched: per row, its question with the answer to another one, if the method asks for it.
    """

    number_R: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))
    mismatched: TokenizedRows | None = None

    def numbered(self, batch: Batch, rows: np.ndarray) -> NumberedBatch:
        """Return a micro-batch of these documents with its numbers.

        Args:
            rows: rows over which the mean number is taken.
        """
        row_S = torch.div(batch.sample_ids_S, self.documents_per_row, rounding_mode="floor")
        number_S = torch.where(row_S >= 0, torch.from_numpy(self.number_R)[row_S.clamp(min=0)], 0.0)
        mean = torch.tensor(self.number_R[rows].mean() if len(rows) else 0.0, dtype=torch.float32)
        return NumberedBatch(**_values_of(batch), number_S=number_S, mean_number=mean)


def numbered(documents: Documents, number_R: np.ndarray) -> NumberedRows:
    """Return the documents with the numbers of their rows, which are a part of their identity."""
    assert len(number_R) == len(documents), f"{len(number_R)} numbers for {len(documents)} rows"
    number_R = number_R.astype(np.float32)
    before = documents.fingerprint
    mixed_R = row_digests([documents.row_digests_R, number_R.view(np.uint32).astype(np.uint64)], 1)
    targets = hashlib.sha256(before.targets.encode() + number_R.astype("<f4").tobytes()).hexdigest()
    print_of = replace(before, targets=targets, any_order=f"{int(mixed_R.sum(dtype=np.uint64)):016x}")
    return NumberedRows(**{**_values_of(documents), "fingerprint": print_of}, number_R=number_R)


def unpaired(documents: Documents) -> Documents:
    """Return pairs as rows of one answer each: row 2k is the chosen answer of pair k, and row 2k + 1 the rejected one."""
    digests_R = np.stack([documents.row_digests_R, documents.row_digests_R ^ np.uint64(0x5BD1E995)], 1).ravel()
    identity = replace(documents.fingerprint, rows=2 * documents.fingerprint.rows)
    choice = None if documents.choice is None else UnpairedChoice(documents.choice)
    return replace(documents, documents_per_row=1, row_digests_R=digests_R, fingerprint=identity, choice=choice)


@dataclass(frozen=True)
class UnpairedChoice:
    """The choice of an epoch's rows where each row of `pairs` has become two."""

    pairs: RowChoice

    @property
    def rows(self) -> int:
        return 2 * self.pairs.rows

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """Return the answers of an epoch's pairs, shuffled, int64 [rows]."""
        both: np.ndarray = (2 * self.pairs.order(seed, epoch)[:, None] + np.arange(2)).ravel()
        shuffled: np.ndarray = both[row_order(len(both), seed, epoch)]
        return shuffled


def _values_of(value: Any) -> dict[str, Any]:
    return {one.name: getattr(value, one.name) for one in fields(value)}
