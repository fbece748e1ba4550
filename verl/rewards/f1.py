"""Word overlap: the F1 score of the words that an answer shares with the reference, as in SQuAD (Rajpurkar et al. 2016).

Case, punctuation, order and the English articles do not matter; how often a word occurs does. Chinese and other scripts without spaces are
compared by character, see verl.rewards._words.
"""

from collections import Counter
from typing import Any

from verl.rewards import _statement
from verl.rewards._words import words_of

MEASURE = "word overlap (F1)"  # name of the mean score
ARTICLES = ("a", "an", "the")


def score(prompt: str, response: str, row: dict[str, Any]) -> float:
    """Return the F1 score of the words, from 0 to 1. Two texts without words are equal."""
    found, expected = counted(_statement.visible(response)), counted(row["reference"])
    if not found or not expected:
        return float(found == expected)
    return 2 * (found & expected).total() / (found.total() + expected.total())


def counted(text: str) -> Counter[str]:
    """Return how often each word occurs, without articles."""
    return Counter(word for word in words_of(text) if word not in ARTICLES)
