"""Output of an evaluation: progress, files, statistics and the table of results."""

import json
import math
import platform
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

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
from verl.eval.grader import Prediction
from verl.manifest import refuse_inside
from verl.redaction import redact

RESULTS, PREDICTIONS = "results.json", "predictions.jsonl"
Z_95 = 1.959964  # 97.5th percentile of the normal distribution


class AnswerProgress:
    """Progress of the evaluation: a panel in a terminal; in a log a line every 10%, and at most one in ten seconds.

    Args:
        total: number of answers to generate.
        measure: display name of the mean score.
    """

    def __init__(self, total: int, measure: str, console: Console):
        self._total, self._measure, self._console, self._since = total, measure, console, time.perf_counter()
        self._answers, self._tokens, self._score, self._tenths = 0, 0, 0.0, 0
        self._bar = AnswersPanel(console)

    def __enter__(self) -> "AnswerProgress":
        self._bar.start(self._total)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._bar.stop()

    def add(self, predictions: Sequence[Prediction]) -> None:
        """Count finished answers, and show the mean score so far."""
        self._answers += len(predictions)
        self._tokens += sum(p.tokens for p in predictions)
        self._score += sum(p.score for p in predictions)
        rate = self._tokens / (time.perf_counter() - self._since)
        state = f"{rate:,.0f} tokens/s, {self._measure} {self._score / self._answers:.1%}"
        self._bar.update(self._answers, description=state)
        tenths = 10 * self._answers // self._total
        if tenths > self._tenths and self._bar.line_is_due():
            self._console.print(f"{self._answers:,}/{self._total:,} answers, {state}")
        self._tenths = tenths


def open_directory(name: str) -> Path:
    """Create the output directory if it is missing.

    Raises:
        UserError: it cannot be created or written to, or is inside a checkpoint.
    """
    directory = Path(name).expanduser()
    refuse_inside(directory, f"output_dir={name}", "choose a directory outside it")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror}", where=f"output_dir={name}", fix="choose another directory") from error
    return directory


def clear_earlier(directory: Path, config: EvalConfig, console: Console) -> None:
    """Clear the files of an earlier evaluation, so that results and predictions always belong together. Say so if it had other settings."""
    if others := _other_settings(directory / RESULTS, config):
        replaced = f"replaces the results of another evaluation ({', '.join(others[:3])}{', …' if others[3:] else ''})"
        console.print(f"warning: {directory}: this evaluation {replaced}; to keep such results, set another output_dir")
    (directory / RESULTS).unlink(missing_ok=True)
    write_predictions(directory, [])


def _other_settings(results: Path, config: EvalConfig) -> list[str]:
    """Return the settings of earlier results that differ from the config's, as `key=value`; none if there are no results to read."""
    try:
        before = json.loads(results.read_text(encoding="utf-8"))["config"]
        now = json.loads(json.dumps(redact(asdict(config))))
        return [f"{key}={before[key]}" for key in now if key in before and before[key] != now[key]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


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


def summarize(config: EvalConfig, predictions: Sequence[Prediction], *, seconds: float, device: str) -> dict[str, Any]:
    """Return the content of results.json.

    Args:
        predictions: `config.n` consecutive predictions per question; the mean of their scores is `exact_match`.
        seconds: time to generate and grade them.
        device: description of the generating device.
    """
    flexible = [p.correct_flexible for p in predictions if p.correct_flexible is not None]
    questions, tokens = len(predictions) // config.n, sum(p.tokens for p in predictions)
    exact_match = _mean([p.score for p in predictions])
    interval = wilson_interval(exact_match, questions)
    return {
        "exact_match": exact_match,
        "exact_match_flexible": _mean(flexible) if flexible else None,
        "confidence_interval_95": list(interval) if interval else None,
        "n": questions,
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


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def wilson_interval(share: float, n: int) -> tuple[float, float] | None:
    """Return Wilson's 95% confidence interval of a proportion in n independent trials (Wilson 1927); None if it is not in [0, 1].

    Several answers to one question are not independent, so n counts questions. With several answers, the interval is a little too wide.
    """
    if not 0.0 <= share <= 1.0:
        return None
    z2 = Z_95**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def print_table(console: Console, results: dict[str, Any], measure: str) -> None:
    """Print the results, framed in a terminal and as plain lines in a log."""
    table = Table(show_header=False, box=box.ROUNDED if console.is_terminal else None)
    interval, flexible = results["confidence_interval_95"], results["exact_match_flexible"]
    table.add_row(measure, f"{results['exact_match']:.2%}" if interval else f"{results['exact_match']:.4f}")
    if interval:
        table.add_row("95% interval", f"{interval[0]:.2%} to {interval[1]:.2%}")
    if flexible is not None:
        table.add_row("exact match of the last number", f"{flexible:.2%}")
    answers = "" if results["answers"] == results["n"] else f", {results['answers']:,} answers"
    table.add_row("questions", f"{results['n']:,}{answers}")
    table.add_row("cut at max_new_tokens", f"{results['truncated']:.2%}")
    table.add_row("generated", f"{results['tokens']:,} tokens in {results['seconds']:,.1f} s: {results['tokens_per_second']:,.0f} tokens/s")
    console.print(table)
