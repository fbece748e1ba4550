"""Output of an evaluation: progress, files, statistics and the table of results."""

import json
import platform
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
import transformers
from rich import box
from rich.console import Console
from rich.table import Table

from verl import __version__
from verl.config.commands import EvalConfig
from verl.disk import FULL_BYTES, disk_errors_named, free_bytes, size_text
from verl.durable import replace_text
from verl.errors import UserError
from verl.eval.answers_panel import AnswersPanel
from verl.eval.files import PREDICTIONS, RESULTS, about, check_results
from verl.eval.grader import Grader, Prediction
from verl.eval.intervals import are_right_or_wrong, interval_of, majority_vote, numbers_of_answers, pass_at_k, wilson_interval
from verl.manifest import refuse_inside
from verl.redaction import redact
from verl.regular_file import check_directory

T = TypeVar("T")


class AnswerProgress:
    """Progress of the evaluation: a panel in a terminal; in a log a line every 10%, and at most one in ten seconds.

    There is no score in it: short answers finish first and are right more often, so a mean of the first ones would mislead.

    Args:
        total: number of answers to generate.
    """

    def __init__(self, total: int, console: Console):
        self._total, self._console, self._since = total, console, time.perf_counter()
        self._answers, self._tokens, self._tenths = 0, 0, 0
        self._bar = AnswersPanel(console)

    def __enter__(self) -> "AnswerProgress":
        self._bar.start(self._total)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._bar.stop()

    def add(self, predictions: Sequence[Prediction]) -> None:
        """Count finished answers, and show how many there are."""
        self._answers += len(predictions)
        self._tokens += sum(p.tokens for p in predictions)
        state = f"{self._tokens / (time.perf_counter() - self._since):,.0f} tokens/s"
        self._bar.update(self._answers, description=state)
        tenths = 10 * self._answers // self._total
        if tenths > self._tenths and self._bar.line_is_due():
            self._console.print(f"{self._answers:,}/{self._total:,} answers, {state}")
        self._tenths = tenths


def open_directory(config: EvalConfig) -> Path:
    """Create the output directory if it is missing.

    Raises:
        UserError: it cannot be created or written to, is inside a checkpoint, or has the results of another evaluation.
    """
    directory, where = Path(config.output_dir).expanduser(), f"output_dir={config.output_dir}"
    refuse_inside(directory, where, "choose a directory outside it")
    check_directory(directory, where, "choose a directory; it is made if it is missing")
    check_results(directory, where, overwrite=config.overwrite)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror}", where=where, fix="choose another directory") from error
    return directory


def clear_earlier(directory: Path, console: Console) -> None:
    """Clear the files of an earlier evaluation, so that results and predictions always belong together, and say so."""
    results, predictions = directory / RESULTS, directory / PREDICTIONS
    if results.exists():
        console.print(f"{directory}: replaces the results of an evaluation{about(results)} (overwrite=true)")
    elif predictions.exists() and predictions.stat().st_size:
        console.print(f"{directory}: replaces the answers of an evaluation that was interrupted")
    results.unlink(missing_ok=True)
    write_predictions(directory, [])


def write_predictions(directory: Path, predictions: Sequence[Prediction]) -> None:
    """Write predictions.jsonl. Raises DiskError if the disk is full or fails."""
    _replace(directory / PREDICTIONS, "".join(json.dumps(asdict(p), ensure_ascii=False) + "\n" for p in predictions))


def write_files(directory: Path, predictions: Sequence[Prediction], results: dict[str, Any], console: Console) -> None:
    """Write predictions.jsonl, then results.json, and name both. Raises DiskError if the disk is full or fails."""
    write_predictions(directory, predictions)
    _replace(directory / RESULTS, json.dumps(redact(results), indent=2, ensure_ascii=False) + "\n", private=True)
    for name in (RESULTS, PREDICTIONS):
        console.print(f"wrote {directory / name}")


def _replace(path: Path, text: str, *, private: bool = False) -> None:
    size = len(text.encode(errors="surrogatepass"))
    with disk_errors_named(path, needed=size, fix="make room, or set output_dir to a folder on another disk"):
        replace_text(path, text, private=private)


def check_room(directory: Path, answers: int, characters: int, max_new_tokens: int, console: Console) -> None:
    """Warn if the answers may not fit on the disk.

    Args:
        characters: of all prompts and references together, each counted once for each answer.
    """
    needed, free = 4 * characters + 4 * max_new_tokens * answers, free_bytes(directory)
    if free is not None and free < needed + FULL_BYTES:
        console.print(
            f"warning: {directory}: the answers may take {size_text(needed)}, and {size_text(free)} are free; make room, or set output_dir "
            "to a folder on another disk"
        )


def summarize(
    config: EvalConfig, predictions: Sequence[Prediction], grader: Grader, why: str | None, *, seconds: float, device: str
) -> dict[str, Any]:
    """Return the content of results.json.

    Args:
        predictions: `config.n` consecutive predictions per question; the mean of their scores is `exact_match`.
        grader: the metric, with its names.
        why: why it was chosen, if the user has named none.
        seconds: time to generate and grade them.
        device: description of the generating device.
    """
    flexible = [p.correct_flexible for p in predictions if p.correct_flexible is not None]
    scores, tokens = [p.score for p in predictions], sum(p.tokens for p in predictions)
    interval, method = interval_of(_by_question(scores, config.n))
    return {
        "metric": grader.metric,
        "metric_chosen_because": why,
        "measure": grader.measure,
        "exact_match": _mean(scores),
        "exact_match_flexible": _mean(flexible) if flexible else None,
        "flexible_measure": grader.flexible_measure if flexible else None,
        "confidence_interval_95": list(interval),
        "confidence_interval_method": method,
        **_of_several(predictions, config.n),
        "n": len(predictions) // config.n,
        "answers": len(predictions),
        "errors": sum(p.error is not None for p in predictions),
        "truncated": _mean([p.finish_reason == "length" for p in predictions]),
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "device": device,
        "config": asdict(config),
        "versions": {
            "verl": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def _of_several(predictions: Sequence[Prediction], n: int) -> dict[str, Any]:
    """Return pass@k and the score of the majority vote of n answers per question; None where they do not apply.

    Scores that are not right or wrong have no pass@k, and a metric that extracts no answers has no vote.
    """
    groups = _by_question(predictions, n)
    if n == 1 or not are_right_or_wrong([p.score for p in predictions]):
        return {"pass_at_k": None, "majority_vote": None}
    rights = [sum(p.correct for p in group) for group in groups]
    passes = {str(k): [pass_at_k(n, right, k) for right in rights] for k in numbers_of_answers(n)}
    votes = [majority_vote([p.extracted for p in group], [p.score for p in group]) for group in groups]
    has_votes = any(p.extracted is not None for p in predictions)
    return {
        "pass_at_k": {k: _with_interval(shares) for k, shares in passes.items()},
        "majority_vote": _with_interval(votes) if has_votes else None,
    }


def _by_question(items: Sequence[T], n: int) -> list[Sequence[T]]:
    """Cut what there is of `n` consecutive answers to each question by question."""
    return [items[start : start + n] for start in range(0, len(items), n)]


def _with_interval(shares: Sequence[float]) -> dict[str, Any]:
    """Return the mean of one share per question, with Wilson's interval, which is a little too wide for shares between 0 and 1."""
    mean = min(1.0, _mean(shares))
    interval = wilson_interval(mean, len(shares))
    assert interval is not None
    return {"score": mean, "confidence_interval_95": list(interval)}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def print_table(console: Console, results: dict[str, Any]) -> None:
    """Print the results, framed in a terminal and as plain lines in a log."""
    table = Table(show_header=False, box=box.ROUNDED if console.is_terminal else None)
    low, high = results["confidence_interval_95"]
    is_share = low >= 0.0 and high <= 1.0
    table.add_row(results["measure"], _shown(results["exact_match"], is_share))
    table.add_row("95% interval", f"{_shown(low, is_share)} to {_shown(high, is_share)}")
    if (flexible := results["exact_match_flexible"]) is not None:
        table.add_row(results["flexible_measure"], f"{flexible:.2%}")
    for k, found in (results["pass_at_k"] or {}).items():
        table.add_row(f"pass@{k}", _shown_with_interval(found))
    if results["pass_at_k"] is not None:
        vote = results["majority_vote"]
        shown = "none: no answer could be extracted" if vote is None else _shown_with_interval(vote)
        table.add_row(f"majority vote of {results['answers'] // results['n']}", shown)
    answers = "" if results["answers"] == results["n"] else f", {results['answers']:,} answers"
    table.add_row("questions", f"{results['n']:,}{answers}")
    table.add_row("cut at max_new_tokens", f"{results['truncated']:.2%}")
    table.add_row("generated", f"{results['tokens']:,} tokens in {results['seconds']:,.1f} s: {results['tokens_per_second']:,.0f} tokens/s")
    console.print(table)


def _shown(score: float, is_share: bool) -> str:
    return f"{score:.2%}" if is_share else f"{score:.4f}"


def _shown_with_interval(found: dict[str, Any]) -> str:
    low, high = found["confidence_interval_95"]
    return f"{found['score']:.2%} (95% interval {low:.2%} to {high:.2%})"
