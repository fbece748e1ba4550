"""What identifies the training rows of a run: their tokens, what is trained of them, and their order, but not where they come from.

A run resumes with rows that have the same fingerprint, whatever the name, folder or format of their files and the versions of the software.

Dimensions: N documents or prompts, R rows.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

SHUFFLED = "all rows, shuffled by seed and epoch"
_ODD = np.uint64(0x9E3779B97F4A7C15)  # an odd factor loses no bits modulo 2^64


@dataclass(frozen=True)
class Fingerprint:
    """Identity of training rows.

    Attributes:
        unit: what the rows are called in messages, "rows" or "prompts".
        rows, tokens: their numbers.
        ids: hash of all token ids in their order.
        targets: hash of what is learned of each row: its loss mask, or the reference answer of a prompt.
        any_order: hash of ids and targets that is the same for the same rows in another order.
        order: what decides the rows of each epoch and their order, besides the seed.
        template: hash of the chat template; it explains a difference, and is not one itself.
    """

    unit: str
    rows: int
    tokens: int
    ids: str
    targets: str
    any_order: str
    order: str = SHUFFLED
    template: str = field(default="", compare=False)

    def difference(self, now: "Fingerprint") -> str | None:
        """Say in words how rows differ from these; None if the same is trained in the same order."""
        name = self.unit
        if self == now:
            return None
        if self.rows != now.rows:
            return f"{self.rows:,} {name} then, {now.rows:,} now"
        if (self.ids, self.targets) == (now.ids, now.targets):
            return f"the same {name}, drawn otherwise: {self.order} then, {now.order} now"
        if self.any_order == now.any_order:
            return f"the same {self.rows:,} {name} in another order"
        if self.ids == now.ids:
            changed = "which of their tokens are trained" if name == "rows" else "their reference answers"
            return f"the same {self.rows:,} {name}, except {changed}"
        tokens = f"{self.tokens:,} tokens then, {now.tokens:,} now" if self.tokens != now.tokens else "as many tokens, but others"
        if self.template != now.template:
            return f"as many {name} ({self.rows:,}), but another chat template ({tokens})"
        return f"as many {name} ({self.rows:,}), but other text in some of them, another tokenizer, or another length limit ({tokens})"


def digest(data: bytes) -> int:
    """Return a 64-bit hash of one row's data."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def fingerprint(
    unit: str, ids_N: np.ndarray, targets_N: np.ndarray, tokens: int, template: object, *, documents_per_row: int = 1
) -> Fingerprint:
    """Return the fingerprint of rows from the hashes of their documents.

    Args:
        unit: "rows" or "prompts".
        ids_N, targets_N: `digest` of each document's token ids and targets, uint64.
        tokens: number of all tokens.
        template: chat template of the tokenizer.
        documents_per_row: consecutive documents that form a row.
    """
    return Fingerprint(
        unit=unit,
        rows=len(ids_N) // documents_per_row,
        tokens=tokens,
        ids=_hash(ids_N),
        targets=_hash(targets_N),
        any_order=f"{int(row_digests([ids_N, targets_N], documents_per_row).sum(dtype=np.uint64)):016x}",
        template=hashlib.sha256(repr(template).encode()).hexdigest(),
    )


def _hash(digests_N: np.ndarray) -> str:
    return hashlib.sha256(digests_N.astype("<u8").tobytes()).hexdigest()


def row_digests(digests: Sequence[np.ndarray], documents_per_row: int) -> np.ndarray:
    """Return a hash of each row from all digests of its documents, uint64 [R]; documents within a row keep their places."""
    mixed_R = np.zeros(len(digests[0]) // documents_per_row, dtype=np.uint64)
    for digests_N in digests:
        for place in range(documents_per_row):
            mixed_R = (mixed_R ^ digests_N[place::documents_per_row]) * _ODD
            mixed_R ^= mixed_R >> np.uint64(29)
    return mixed_R
