"""The files of an evaluation: their names, and which questions of two evaluations are the same."""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import TypeAlias

RESULTS, PREDICTIONS = "results.json", "predictions.jsonl"

Key: TypeAlias = tuple[str, str, int]  # a question, its right answer, and which of several equal rows it is


def is_evaluation(directory: Path) -> bool:
    """Return whether a directory has the files of an evaluation, which may have been interrupted."""
    return (directory / RESULTS).is_file() or (directory / PREDICTIONS).is_file()


def keys_of(questions: Iterable[tuple[str, str]]) -> list[Key]:
    """Return a key for each question and right answer. Rows with the same ones are told apart by their order."""
    seen: dict[tuple[str, str], int] = defaultdict(int)
    keys = []
    for question in questions:
        keys.append((*question, seen[question]))
        seen[question] += 1
    return keys
