"""Comparison of an evaluation with another one: the same questions, the same metric, a paired test.

    verl eval key=value … --against OTHER     evaluate, and compare
    verl eval DIR --against OTHER             compare two finished evaluations

In the first form, OTHER may also be a checkpoint. It is evaluated first, into output_dir/against.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from verl.errors import UserError
from verl.eval.files import PREDICTIONS, RESULTS, Key, keys_of
from verl.eval.grader import Question
from verl.eval.missing import FIX, no_evaluation
from verl.eval.paired import Comparison, compare
from verl.pace import counted

# Settings in which two evaluations may differ without their scores being of different things.
FREE = ("model_path", "output_dir", "overwrite", "against", "batch_size", "rollout", "trust_remote_code", "metric", "n")
EVEN = 0.05  # largest p-value that is called a difference


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation.

    Attributes:
        name: its directory, as the user gave it.
        results: content of results.json.
        scores: mean score of each question.
    """

    name: str
    results: dict[str, Any]
    scores: dict[Key, float]

    @property
    def metric(self) -> str:
        """Return the name of its metric; earlier versions wrote only the settings."""
        return str(self.results.get("metric") or self.results["config"]["metric"])


def is_evaluation(name: str) -> bool:
    """Return whether a directory has the files of a finished evaluation."""
    return (Path(name).expanduser() / RESULTS).is_file()


def read(name: str, where: str, other: str | None = None) -> Evaluation:
    """Read a finished evaluation.

    Args:
        other: the directory of the evaluation with which it is compared.
    Raises:
        UserError: its files are missing, cannot be read, or do not belong together.
    """
    directory = Path(name).expanduser()
    if not is_evaluation(name):
        raise no_evaluation(name, where, other)
    try:
        results = json.loads((directory / RESULTS).read_text(encoding="utf-8"))
        rows = [json.loads(line) for line in (directory / PREDICTIONS).read_text(encoding="utf-8").split("\n") if line]
        n = int(results["config"]["n"])
        if len(rows) != results["answers"] or len(rows) % n or not rows:
            raise UserError(f"{PREDICTIONS} has {len(rows):,} answers, and {RESULTS} speaks of {results['answers']}", where=where, fix=FIX)
        scores = scores_of([(row["prompt"], row["reference"]) for row in rows[::n]], [float(row["score"]) for row in rows], n)
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}", where=where, fix=FIX) from error
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"has no files of an evaluation: {type(error).__name__}: {error}", where=where, fix=FIX) from error
    return Evaluation(name, results, scores)


def scores_of(questions: Sequence[tuple[str, str]], scores: Sequence[float], n: int) -> dict[Key, float]:
    """Return the mean score of each question."""
    keys = keys_of(questions)
    return {key: sum(scores[number * n : (number + 1) * n]) / n for number, key in enumerate(keys)}


def check(other: Evaluation, questions: Sequence[Question], metric: str) -> None:
    """Raise UserError if the evaluation cannot be compared with answers to these questions: another metric, or other questions."""
    where = f"against={other.name}"
    if other.metric != metric:
        fix = f"set metric={other.metric}, or evaluate the other model with metric={metric}"
        raise UserError(f"was graded by metric {other.metric}, this evaluation by {metric}", where=where, fix=fix)
    keys = keys_of([(question.prompt, question.reference) for question in questions])
    if not any(key in other.scores for key in keys):
        raise UserError("answered none of these questions", where=where, fix="set test_file to the file that it answered")


def differing(results: dict[str, Any], others: dict[str, Any]) -> list[str]:
    """Return the settings that are not the same in two evaluations, as `key=this (other: that)`."""
    ours, theirs = results["config"], others["config"]
    return [
        f"{key}={shown(ours[key])} (other: {shown(theirs[key])})"
        for key in ours
        if key in theirs and key not in FREE and ours[key] != theirs[key]
    ]


def shown(value: object) -> object:
    """Return a setting as it is written on the command line."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def compared(this: Evaluation, other: Evaluation) -> Comparison:
    """Compare two evaluations on the questions that both have. Raises UserError as `check`."""
    if this.metric != other.metric:
        fix = "evaluate both with the same metric"
        raise UserError(f"was graded by metric {other.metric}, {this.name} by {this.metric}", where=f"against={other.name}", fix=fix)
    keys = [key for key in this.scores if key in other.scores]
    if not keys:
        fix = "compare evaluations of the same test_file"
        raise UserError(f"has no question that {this.name} has", where=f"against={other.name}", fix=fix)
    return compare([this.scores[key] for key in keys], [other.scores[key] for key in keys])


def compare_directories(name: str, other_name: str, console: Console) -> dict[str, Any]:
    """Compare two finished evaluations, print the result and return it, see `described`.

    Raises:
        UserError: one of them is none, or they cannot be compared.
    """
    this, other = read(name, f"verl eval {name}", other_name), read(other_name, f"against={other_name}", name)
    found = described(compared(this, other), this, other)
    show(found, this, other, console)
    return found


def described(comparison: Comparison, this: Evaluation, other: Evaluation) -> dict[str, Any]:
    """Return a comparison for results.json."""
    return {
        "directory": other.name,
        "model_path": other.results["config"]["model_path"],
        **asdict(comparison),
        "interval": list(comparison.interval),
        "other_settings": differing(this.results, other.results),
        "questions_left_out": len(this.scores.keys() ^ other.scores.keys()),
    }


def show(found: dict[str, Any], this: Evaluation, other: Evaluation, console: Console) -> None:
    """Print a comparison."""
    low, high = found["interval"]
    model, other_model = this.results["config"]["model_path"], found["model_path"]
    if model == other_model:
        model, other_model = this.name, other.name
    console.print(f"\n{model} against {other_model} on {counted(found['questions'], 'question')}, metric {this.metric}")
    if left_out := found["questions_left_out"]:
        console.print(f"warning: left out, because only one of them answered: {counted(left_out, 'question')}")
    for setting in found["other_settings"]:
        console.print(f"warning: other settings: {setting}")
    console.print(f"  score       {found['score']:.4f} against {found['other_score']:.4f}")
    console.print(f"  difference  {found['difference']:+.4f}, 95% interval {low:+.4f} to {high:+.4f} ({found['interval_method']})")
    equal = found["questions"] - found["better"] - found["worse"]
    console.print(f"  questions   {found['better']:,} better, {found['worse']:,} worse, {equal:,} equal")
    console.print(f"  p-value     {found['p_value']:.4g} ({found['test']})")
    console.print(f"  {verdict(found)}")


def verdict(found: dict[str, Any]) -> str:
    """Return what the p-value means, in words."""
    if found["p_value"] > EVEN:
        return f"so these questions show no difference: chance alone gives one as large in {found['p_value']:.0%} of cases"
    return f"so {'better' if found['difference'] > 0 else 'worse'}: chance alone gives one as large in {found['p_value']:.2%} of cases"
