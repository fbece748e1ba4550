"""A metric of your own: the word overlap of an answer with the reference, for questions without a single right answer.

    verl eval … metric=examples/metrics/word_overlap.py

A metric is a module with `score(prompt, response, row)`. `row["reference"]` is the right answer, whatever the name of its column.
"""

import re
from collections import Counter
from typing import Any


def score(prompt: str, response: str, row: dict[str, Any]) -> float:
    """Return the F1 score of the words, from 0 to 1. Order and case do not matter; counts do."""
    found, expected = words(response), words(row["reference"])
    shared = (found & expected).total()
    return 2 * shared / max(1, found.total() + expected.total())


def words(text: str) -> Counter[str]:
    return Counter(re.findall(r"\w+", text.lower()))
