"""Which metric fits the rows, if the user names none."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from verl.rewards import choice, gsm8k
from verl.rewards._statement import HASHES
from verl.rewards._words import CHARACTER, words_of

MARKED, MOST = 0.5, 0.9  # share of the rows that have to look alike: with a mark that stands nowhere else, and without
LONGEST_EXACT, MOST_WORDS = 40, 5  # of a right answer that can be expected word for word; two Chinese characters are taken for a word
LETTERS = choice.Settings()
OPTION = re.compile(r"(?:^|[\s(（])([AB])\s?[.):：、）]", re.MULTILINE)
BOX = re.compile(r"\\boxed\b")


class Question(Protocol):
    """A row with its right answer."""

    @property
    def prompt(self) -> str: ...

    @property
    def reference(self) -> str: ...

    @property
    def messages(self) -> Sequence[Mapping[str, Any]]: ...


@dataclass(frozen=True)
class Asked:
    """A `Question`."""

    prompt: str
    reference: str
    messages: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Chosen:
    """A metric.

    Attributes:
        name: as in the config.
        why: what the rows look like.
        advice: what would be better, or None.
    """

    name: str
    why: str
    advice: str | None = None

    def describe(self) -> str:
        """Return the line that says which metric was chosen."""
        advice = f"\n{self.advice}" if self.advice else ""
        return f"metric: {self.name}, because {self.why} (metric=… sets another: docs/evaluation.md){advice}"


def choose(questions: Sequence[Question]) -> Chosen:
    """Return the metric for the right answers of these rows."""
    for name, fits, share, what in KINDS:
        count = sum(fits(question) for question in questions)
        if count >= share * len(questions) > 0:
            many = f"all {len(questions):,}" if count == len(questions) > 1 else f"{count:,} of {len(questions):,}"
            return Chosen(name, f"{many} right answers {what}")
    advice = (
        "word overlap says how alike the words are, not whether an answer is right or good: metric=judge has a language model compare "
        "answers, and predictions.jsonl has them to read"
    )
    return Chosen("f1", "the right answers are texts, which a good answer may say in other words", advice)


def is_hashed(question: Question) -> bool:
    """Return whether the right answer stands behind `####`, or is a number that the question asks for behind `####`."""
    if HASHES.search(question.reference):
        return True
    return _asks_for(question, HASHES) and gsm8k.reference_answer(question.reference) is not None


def is_boxed(question: Question) -> bool:
    r"""Return whether the right answer stands in `\boxed{…}`, or is one line that the question asks for in a box."""
    return bool(BOX.search(question.reference)) or (_asks_for(question, BOX) and "\n" not in question.reference.strip())


def is_choice(question: Question) -> bool:
    """Return whether the right answer is a letter, or names one of the options that the question has."""
    reference = question.reference
    if len(reference.strip().strip("().*（）")) == 1:
        return choice.reference_answer(reference, LETTERS) is not None
    return set(OPTION.findall(question.prompt)) == {"A", "B"} and choice.reference_answer(reference, LETTERS) is not None


def is_short(question: Question) -> bool:
    """Return whether the right answer is one short line."""
    text = question.reference.strip()
    words = sum(0.5 if CHARACTER.fullmatch(word) else 1.0 for word in words_of(text))
    return "\n" not in text and 0 < len(text) <= LONGEST_EXACT and words <= MOST_WORDS


def _asks_for(question: Question, mark: re.Pattern[str]) -> bool:
    """Return whether a message before the answer has the mark: an instruction to use it."""
    return any(isinstance(content := message.get("content"), str) and mark.search(content) for message in question.messages)


KINDS: tuple[tuple[str, Callable[[Question], bool], float, str], ...] = (
    ("gsm8k", is_hashed, MARKED, "have a number after ####"),
    ("math", is_boxed, MARKED, r"are values in \boxed{…}"),
    ("choice", is_choice, MOST, "are the letter of an option"),
    ("exact", is_short, MOST, "are short texts"),
)
