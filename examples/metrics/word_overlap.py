"""A metric of your own: how many words an answer shares with the reference, for answers that have no single right form.

    verl eval … metric=examples/metrics/word_overlap.py

A metric is a module with `score(prompt, response, row)`; the row's `reference` is the right answer, whatever its column is called.
"""

import re
from collections import Counter
from typing import Any


def score(prompt: str, response: str, row: dict[str, Any]) -> float:
    """F1 of the words, 0 to 1: 1 if both have the same words, each as often, in any order and case."""
    found, expected = words(response), words(row["reference"])
    shared = (found & expected).total()
    return 2 * shared / max(1, found.total() + expected.total())


def words(text: str) -> Counter[str]:
    return Counter(re.findall(r"\w+", text.lower()))
