"""A mixture of files: how many rows of each make an epoch, and which.

Dimensions: E entries of the config's list of files, N rows to choose from, R rows of an epoch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np

from verl.data.loader import row_order
from verl.data.source import Entry
from verl.errors import UserError


@dataclass(frozen=True)
class Mixture:
    """The choice of an epoch's rows: a function of (seed, epoch), like the order of rows without a mixture.

    The rows of one entry are drawn without replacement, also from one epoch to the next, until each of them was drawn; then again.

    Attributes:
        names: the entries of the config.
        of_entry_E: number of the rows of each; the rows of an entry are consecutive.
        per_epoch_E: number of its rows in an epoch, at most `of_entry_E`.
    """

    names: tuple[str, ...]
    of_entry_E: tuple[int, ...]
    per_epoch_E: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Rows of an epoch."""
        return sum(self.per_epoch_E)

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """Return the numbers of an epoch's rows in their order, int64 [R]."""
        return _order(self, seed, epoch)

    def describe(self, tokens_N: np.ndarray) -> str:
        """Say the shares of the entries in rows, and in the tokens of an average epoch.

        Args:
            tokens_N: number of tokens of each row.
        """
        tokens = [float(tokens_N[first : first + rows].mean()) * taken for first, rows, taken in self.parts()]
        listed = [
            f"{taken:,} of {rows:,} from {name} ({taken / self.rows:.0%} of the rows, {share / sum(tokens):.0%} of the tokens)"
            for name, rows, taken, share in zip(self.names, self.of_entry_E, self.per_epoch_E, tokens, strict=True)
        ]
        return f"mixture: an epoch has {self.rows:,} rows: {', '.join(listed)}"

    def parts(self) -> Iterator[tuple[int, int, int]]:
        """Yield of each entry its first row, the number of its rows, and how many of them an epoch takes."""
        return zip(accumulate(self.of_entry_E[:-1], initial=0), self.of_entry_E, self.per_epoch_E, strict=True)


@lru_cache(maxsize=4)  # a step asks again, and may reach into the next epoch
def _order(mixture: Mixture, seed: int, epoch: int) -> np.ndarray:
    chosen = [first + drawn(rows, taken, seed, entry, epoch) for entry, (first, rows, taken) in enumerate(mixture.parts())]
    order: np.ndarray = np.concatenate(chosen)[row_order(mixture.rows, seed, epoch)]
    return order


def drawn(rows: int, taken: int, seed: int, entry: int, epoch: int) -> np.ndarray:
    """Return which rows of an entry an epoch takes, int64 [taken]: positions `epoch × taken` and following of `_pass` 0, 1, 2, …"""
    passes, start = divmod(epoch * taken, rows)
    order = np.concatenate([_pass(rows, taken, seed, entry, passes), _pass(rows, taken, seed, entry, passes + 1)])
    return order[start : start + taken]


@lru_cache(maxsize=64)
def _pass(rows: int, taken: int, seed: int, entry: int, number: int) -> np.ndarray:
    """Return the order in which the rows of an entry are drawn for the `number`th time, from 0.

    An epoch may take its first rows from the end of one pass and the others from the beginning of the next one. There, the rows that it
    has already are moved to the end, so that an epoch has no row twice.
    """
    first = next(one for one in range(number, -1, -1) if one * rows % taken == 0)  # an epoch begins with this pass
    order = _shuffled(rows, seed, entry, first)
    for one in range(first + 1, number + 1):
        had = order[rows - one * rows % taken :] if one * rows % taken else order[:0]
        order = _shuffled(rows, seed, entry, one)
        again = np.isin(order, had)
        order = np.concatenate([order[~again], order[again]])
    return order


def _shuffled(rows: int, seed: int, entry: int, number: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64([seed, entry, number])).permutation(rows)


def mixture_of(entries: Sequence[Entry], rows_by_source: Sequence[int], kept: np.ndarray, key: str) -> Mixture | None:
    """Return the mixture that a config asks for; None if no entry has a share.

    Args:
        rows_by_source: number of rows read from each source of the entries.
        kept: numbers of the rows that are used, of all that were read, in order.
        key: config key of the entries, for errors.
    Raises:
        UserError: an entry has fewer rows than it should give, or so small a weight that it gives none.
    """
    if not any(entry.has_share for entry in entries):
        return None
    counts = iter(rows_by_source)
    read = [sum(next(counts, 0) for _ in entry.sources) for entry in entries]
    ends = np.searchsorted(kept, list(accumulate(read)))
    used = np.diff(ends, prepend=0).tolist()
    for entry, rows, of_file in zip(entries, used, read, strict=True):
        if not rows or (entry.rows or 0) > rows:
            left = f" ({of_file:,} read, {of_file - rows:,} left out)" if of_file > rows else ""
            what = f"{entry.name} should give {entry.rows or 'some'} rows an epoch, but has {rows:,}{left}"
            fix = f"give rows: {rows}, or leave the number out to use all"
            if not rows:
                fix = "remove the entry; if data.train_max_samples is set, it cuts the rows of all files together"
            raise UserError(what, where=key, fix=fix)
    per_epoch = [entry.rows or rows for entry, rows in zip(entries, used, strict=True)]
    if any(entry.weight is not None for entry in entries):
        per_epoch = _by_weight([1.0 if entry.weight is None else entry.weight for entry in entries], used, entries, key)
    return Mixture(tuple(entry.name for entry in entries), tuple(used), tuple(per_epoch))


def _by_weight(weights: list[float], rows: list[int], entries: Sequence[Entry], key: str) -> list[int]:
    """Return as many rows of each entry as the weights allow without a row twice: of one entry, these are all its rows."""
    scale, scarce = min((count / weight, number) for number, (count, weight) in enumerate(zip(rows, weights, strict=True)))
    per_epoch = [min(count, int(scale * weight + 1e-6)) for count, weight in zip(rows, weights, strict=True)]
    per_epoch[scarce] = rows[scarce]
    for entry, weight, taken in zip(entries, weights, per_epoch, strict=True):
        if not taken:
            what = (
                f"{entry.name} would give no row: {entries[scarce].name} has {rows[scarce]:,} rows for its weight {weights[scarce]:g}, "
                f"which makes {scale * weight:.2g} for the weight {weight:g}"
            )
            raise UserError(what, where=key, fix="give it a larger weight, or remove it")
    return per_epoch
