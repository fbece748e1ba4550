"""Rows that are equal to others, or nearly, in a set of rows and between training and validation.

Dimensions: R rows, C rows that were compared for near copies.
"""

from collections.abc import Callable, Iterable

import numpy as np

from verl.inspection import near
from verl.inspection.result import PLACES, Finding
from verl.inspection.scan import Scan

EXACT, ASKED = "equal to an earlier row", "the question of an earlier row, with another answer"
NEARLY = f"nearly equal to an earlier row ({near.SIMILARITY:.0%} of three-word sequences or more are shared)"
SHARED, SHARED_QUESTION = "equal to a training row", "the question of a training row, with another answer"
NEARLY_SHARED = f"nearly equal to a training row ({near.SIMILARITY:.0%} of three-word sequences or more are shared)"
REMOVE = "remove them from the validation rows, or it does not measure what is new to the model"


def copies_in(scan: Scan) -> list[Finding]:
    """Find rows that repeat an earlier row of the same files."""
    digests_R, asked_R = scan.joined("digests"), scan.joined("asked")
    is_copy_R, first_R = _repeats(digests_R)
    asks_R, first_asked_R = _repeats(asked_R)
    asks_R &= ~is_copy_R
    numbers_C = scan.joined("compared").astype(np.int64)
    pairs = [(numbers_C[one], numbers_C[other], share) for one, other, share in near.alike(scan.joined("sketches"))]
    pairs = [(one, other, share) for one, other, share in pairs if digests_R[one] != digests_R[other]]
    return [
        *_finding(EXACT, np.flatnonzero(is_copy_R), lambda row: scan.places[first_R[row]], scan),
        *_finding(ASKED, np.flatnonzero(asks_R), lambda row: scan.places[first_asked_R[row]], scan),
        *_near(NEARLY, pairs, scan, scan),
    ]


def overlap_of(validation: Scan, train: Scan) -> list[Finding]:
    """Find validation rows that repeat a training row."""
    digests_R, asked_R = validation.joined("digests"), validation.joined("asked")
    of_train, asked_of_train = train.joined("digests"), train.joined("asked")
    shared_R, first_R = _among(digests_R, of_train)
    asks_R, first_asked_R = _among(asked_R, asked_of_train)
    asks_R &= ~shared_R
    of_validation, numbers = validation.joined("compared").astype(np.int64), train.joined("compared").astype(np.int64)
    found = near.alike_between(validation.joined("sketches"), train.joined("sketches"))
    pairs = [(of_validation[one], numbers[other], share) for one, other, share in found]
    pairs = [(one, other, share) for one, other, share in pairs if not shared_R[one]]
    return [
        *_finding(SHARED, np.flatnonzero(shared_R), lambda row: train.places[first_R[row]], validation, REMOVE),
        *_finding(SHARED_QUESTION, np.flatnonzero(asks_R), lambda row: train.places[first_asked_R[row]], validation, REMOVE),
        *_near(NEARLY_SHARED, pairs, validation, train, REMOVE),
    ]


def _repeats(values_R: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return of each row whether an earlier one has its value, which is not 0, and the first row that has it."""
    _, first, inverse = np.unique(values_R, return_index=True, return_inverse=True)
    first_R: np.ndarray = first[inverse]
    return (first_R != np.arange(len(values_R))) & (values_R != 0), first_R


def _among(values_R: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return of each row whether its value, which is not 0, is among the others, and where it is first."""
    if not len(others):
        return np.zeros(len(values_R), dtype=bool), np.zeros(len(values_R), dtype=np.int64)
    known, first = np.unique(others, return_index=True)
    place_R = np.minimum(np.searchsorted(known, values_R), len(known) - 1)
    return (known[place_R] == values_R) & (values_R != 0), first[place_R]


def _finding(what: str, rows: np.ndarray, other: Callable[[int], str], scan: Scan, fix: str = "") -> Iterable[Finding]:
    if len(rows):
        first = [int(row) for row in rows[:PLACES]]
        yield Finding(what, len(rows), [scan.places[row] for row in first], f"{scan.places[first[0]]} as {other(first[0])}", fix)


def _near(what: str, pairs: list[tuple[int, int, float]], scan: Scan, others: Scan, fix: str = "") -> Iterable[Finding]:
    if pairs:
        row, other, share = pairs[0]
        example = f"{scan.places[row]} as {others.places[other]}, about {share:.0%}"
        yield Finding(what, len(pairs), [scan.places[row] for row, _, _ in pairs[:PLACES]], example, fix)
