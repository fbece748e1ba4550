"""ROUGE (Lin 2004): the F-measure of the word sequences that an answer shares with the reference, computed by Google's `rouge-score`.

Its own tokenizer knows only a to z and digits, and gives every Chinese answer 0. So words are those of verl.rewards._words: in scripts
without spaces, each character is a word, as is usual for Chinese. For English text with the letters a to z, the scores are those of
rouge-score's own tokenizer.
"""

import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from verl.errors import UserError
from verl.rewards import _statement
from verl.rewards._words import words_of

KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
MEASURE = "ROUGE F-measure"  # name of the mean score


@dataclass
class Settings:
    # What is compared: "rouge1" words, "rouge2" pairs of words, "rougeL" the longest common subsequence, "rougeLsum" that of each line.
    rouge: str = "rougeL"
    # Compare English words by their stems.
    stemmer: bool = False

    def check(self) -> None:
        """Raises UserError: there is no such kind of ROUGE."""
        if self.rouge not in KINDS:
            raise UserError(f"found {self.rouge!r}", where="rouge", fix=f"choose one of {', '.join(KINDS)}")


def score(prompt: str, response: str, row: dict[str, Any], settings: Settings) -> float:
    """Return the F-measure, from 0 to 1.

    Raises:
        UserError: rouge-score is not installed.
    """
    check_installed()
    scorer = _scorer(settings.rouge, settings.stemmer)
    return float(scorer.score(row["reference"], _statement.visible(response))[settings.rouge].fmeasure)


class Words:
    """A tokenizer for rouge-score.

    Args:
        stemmer: whether words longer than three letters become their stems, as in rouge-score's own tokenizer.
    """

    def __init__(self, stemmer: bool):
        from nltk.stem.porter import PorterStemmer  # comes with rouge-score

        self._stem = PorterStemmer().stem if stemmer else None

    def tokenize(self, text: str) -> list[str]:
        words = words_of(text, without_punctuation=" ")
        return [self._stem(word) if len(word) > 3 else word for word in words] if self._stem is not None else words


@lru_cache(maxsize=8)
def _scorer(kind: str, stemmer: bool) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([kind], tokenizer=Words(stemmer))


@lru_cache(maxsize=1)
def check_installed() -> None:
    """Raises UserError: rouge-score is not installed."""
    if importlib.util.find_spec("rouge_score") is None:
        raise UserError("rouge-score is not installed", where="reward rouge", fix='pip install -c constraints.txt -e ".[rouge]"')
