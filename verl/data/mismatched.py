"""Questions with the answers to other questions, from which a method estimates how far the policy is from its reference.

Dimensions: N documents.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from verl.data.documents import Documents
from verl.data.fingerprint import digest
from verl.data.loader import RowChoice
from verl.data.pack import Document
from verl.errors import UserError


@dataclass(frozen=True, eq=False)
class Mismatched:
    """One document per row: the row's question with the answer to another one, cut off behind `max_length` tokens.

    Attributes:
        answer_N: number of the document whose answer it has.
        first_N: number of tokens of each document's question.
        lengths_N, trained_N, values: as in Documents.
    """

    documents: Documents
    max_length: int
    answer_N: np.ndarray
    first_N: np.ndarray
    lengths_N: np.ndarray
    trained_N: np.ndarray
    values: Mapping[str, Sequence[np.ndarray]] = field(default_factory=dict)
    documents_per_row: int = 1

    @property
    def choice(self) -> RowChoice | None:
        return self.documents.choice

    def __len__(self) -> int:
        return len(self.lengths_N)

    def document(self, index: int) -> Document:
        """Return token ids and loss mask, as `Documents.document` does."""
        first, other = self.first_N[index], self.answer_N[index]
        ids, mask = self.documents.document(index)
        other_ids, other_mask = self.documents.document(other)
        rest = slice(self.first_N[other], self.first_N[other] + self.max_length - first)
        return np.concatenate([ids[:first], other_ids[rest]]), np.concatenate([mask[:first], other_mask[rest]])


def mismatched(documents: Documents, max_length: int, key: str) -> Mismatched:
    """Pair each question with the answer of another row, always the same one, whatever the seed, the epoch and the number of ranks.

    Each answer is used once. No question gets an answer to itself, unless more than half of the rows have the same question.

    Args:
        documents: one document per row.
        key: config key of the rows, for the error.
    Raises:
        UserError: all rows have the same question.
    """
    asked = [_question(documents, number) for number in range(len(documents))]
    first_N, question_N = np.array([first for first, _ in asked]), np.array([question for _, question in asked], dtype=np.uint64)
    answer_N = partners(question_N)
    if (answer_N == np.arange(len(answer_N))).all():
        what = "all rows have the same question, so that no answer to another one is there to estimate the divergence from"
        raise UserError(what, where=key, fix="give rows with several questions, or use a method for pairs, such as algorithm.name=dpo")
    made = Mismatched(documents, max_length, answer_N, first_N, first_N, first_N)
    sizes = [(len(ids), int(mask[1:].sum())) for ids, mask in map(made.document, range(len(documents)))]
    lengths_N, trained_N = (np.array(of_all, dtype=np.int32) for of_all in zip(*sizes, strict=True))
    return Mismatched(documents, max_length, answer_N, first_N, lengths_N, trained_N)


def partners(question_N: np.ndarray) -> np.ndarray:
    """Return for each row another one, with another question if at most half of the rows have the same; no row is there twice.

    Rows are sorted by their questions and moved on by as many places as the most frequent question has rows.
    """
    order = np.argsort(question_N, kind="stable")
    _, counts = np.unique(question_N, return_counts=True)
    found = np.empty(len(order), dtype=np.int64)
    found[order] = np.roll(order, -int(counts.max()))
    return found


def _question(documents: Documents, number: int) -> tuple[int, int]:
    """Return how many tokens a document's question has, and their hash."""
    ids, mask = documents.document(number)
    first = int(np.flatnonzero(mask[1:])[0]) + 1
    return first, digest(ids[:first].tobytes())
