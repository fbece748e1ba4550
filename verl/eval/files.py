"""The files of an evaluation: their names, and which questions of two evaluations are the same."""

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import TypeAlias

from verl.errors import UserError

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


def check_results(directory: Path, where: str, *, overwrite: bool) -> None:
    """Raise UserError if a directory has the results of an evaluation, which are not to be overwritten."""
    if not overwrite and (directory / RESULTS).exists():
        fix = "set another output_dir, or overwrite=true to replace them"
        raise UserError(f"has the results of an evaluation{about(directory / RESULTS)}", where=where, fix=fix)


def about(results: Path) -> str:
    """Return which evaluation has written results; empty if they cannot be read."""
    try:
        found = json.loads(results.read_text(encoding="utf-8"))
        return f" ({found['config']['model_path']} on {found['config']['test_file']}: {found['exact_match']:.4f})"
    except (OSError, ValueError, LookupError, TypeError):
        return ""
