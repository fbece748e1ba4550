"""Rows that are nearly equal: MinHash sketches of the words of each, and locality-sensitive hashing to find those that are alike.

Dimensions: N rows, W words of a row, P permutations of a sketch.
"""

import re
import zlib
from collections.abc import Iterator

import numpy as np
from datasketch import MinHash, MinHashLSH

PERMUTATIONS, SIMILARITY = 64, 0.8
IN_A_ROW = 3  # words of a shingle
LONGEST = 50_000  # characters that are compared of a text
# A word; in scripts without spaces between words, a character.
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+")
_EMPTY = MinHash(num_perm=PERMUTATIONS, hashfunc=int)


def sketch(text: str) -> np.ndarray:
    """Return the sketch of a text, uint32 [P]. Equal words in the same order give the same one, whatever is between them."""
    words_W = np.array([zlib.crc32(word.encode()) for word in WORD.findall(text[:LONGEST].lower())], dtype=np.uint64)
    found = _EMPTY.copy()
    found.update_batch(np.unique(_shingles(words_W)).tolist())
    values_P: np.ndarray = found.hashvalues
    return values_P


def _shingles(words_W: np.ndarray) -> np.ndarray:
    """Return a 32-bit hash of each IN_A_ROW consecutive words, or of all words if there are fewer."""
    count = max(1, len(words_W) - IN_A_ROW + 1)
    mixed = np.zeros(count, dtype=np.uint64)
    for place in range(min(IN_A_ROW, len(words_W))):
        mixed = (mixed * np.uint64(0x9E3779B97F4A7C15) + words_W[place : place + count]) & np.uint64(0xFFFFFFFFFFFFFFFF)
        mixed ^= mixed >> np.uint64(29)
    hashes: np.ndarray = mixed >> np.uint64(32)
    return hashes


def alike(sketches_NP: np.ndarray) -> Iterator[tuple[int, int, float]]:
    """Yield each row that is nearly equal to an earlier one, as (row, the first such row, estimated similarity)."""
    index = MinHashLSH(threshold=SIMILARITY, num_perm=PERMUTATIONS)
    for number, values_P in enumerate(sketches_NP):
        one = _of(values_P)
        if best := _best(index.query(one), sketches_NP, values_P):
            yield number, *best
        index.insert(number, one)


def alike_between(asked_NP: np.ndarray, sketches_NP: np.ndarray) -> Iterator[tuple[int, int, float]]:
    """Yield each asked row that is nearly equal to a row of the others, as `alike` does."""
    index = MinHashLSH(threshold=SIMILARITY, num_perm=PERMUTATIONS)
    for number, values_P in enumerate(sketches_NP):
        index.insert(number, _of(values_P))
    for number, values_P in enumerate(asked_NP):
        if best := _best(index.query(_of(values_P)), sketches_NP, values_P):
            yield number, *best


def _best(candidates: list[int], sketches_NP: np.ndarray, values_P: np.ndarray) -> tuple[int, float] | None:
    """Return the first of the candidates that is similar enough, and how similar it is."""
    numbers = np.array(sorted(candidates), dtype=np.int64)
    similar = (sketches_NP[numbers] == values_P).mean(1)
    enough = np.flatnonzero(similar >= SIMILARITY)
    return (int(numbers[enough[0]]), float(similar[enough[0]])) if len(enough) else None


def _of(values_P: np.ndarray) -> MinHash:
    return MinHash(hashvalues=values_P, permutations=_EMPTY.permutations, scheme=_EMPTY.scheme, hashfunc=int)
