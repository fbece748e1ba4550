"""Evaluation of a classifier: the label of each row beside the one that the model gives it. `verl eval` calls it for such a model.

Dimensions: N rows, L labels.
"""

import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table

from verl import __version__, cores, dist, signals
from verl.config.commands import EvalConfig
from verl.data.classified import ClassColumns, Classified, load_classified
from verl.data.confusion import Confusion
from verl.data.labels import Labels, labels_of
from verl.errors import UserError
from verl.eval import report
from verl.eval.grader import Prediction
from verl.eval.intervals import WILSON, wilson_interval
from verl.lock import held
from verl.models.load import read_config
from verl.rewards._packed import PackedModel

TOKEN_BUDGET = 16384  # of a micro-batch
METRIC = "label"
MOST_ACROSS = 12  # labels in the printed table of what was taken for what
# Keys of generation, which a classifier does not do.
OF_ANSWERS = ("metric", "few_shot", "n", "temperature", "system_prompt", "tools_key", "against")


@dataclass
class Whole:
    """Settings of rows that are read whole."""

    max_length: int = 2**31 - 1
    truncation: str = "error"
    num_workers: int | None = None
    cache_dir: str | None = None


def evaluate(config: EvalConfig, console: Console) -> dict[str, Any]:
    """Classify every row, and write results.json and predictions.jsonl, whose `exact_match` is the accuracy.

    Returns:
        the content of results.json.
    Raises:
        UserError: the config, a row or the model is invalid.
    """
    check_keys(config)
    directory = report.open_directory(config)
    with held(directory, "evaluation"):
        cores.take(console.print)
        signals.enter("reading the rows and loading the model")
        labels = labels_of(read_config(config.model_path, trust_remote_code=config.trust_remote_code))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code, "where": f"model_path={config.model_path}"}
        model = PackedModel(config.model_path, device=device, token_budget=TOKEN_BUDGET, labels=len(labels.names), **options)
        rows, texts = read(config, labels, model, console)
        signals.enter("classifying the rows")
        since = time.perf_counter()
        scores_NL = model.scores([rows.documents.document(number)[0] for number in range(len(rows.labels_N))])
        seconds = time.perf_counter() - since
        predicted_N = scores_NL > 0 if labels.problem == "several" else scores_NL.argmax(-1)
        confusion = Confusion.of(labels, rows.labels_N, predicted_N)
        results = results_of(config, confusion, rows, seconds, dist.describe_device(device))
        show(results, confusion, console)
        report.clear_earlier(directory, console)
        report.write_files(directory, predictions_of(rows, texts, predicted_N), results, console)
        return results


def check_keys(config: EvalConfig) -> None:
    """Raise UserError if a key is set that is about answers in text."""
    for key in OF_ANSWERS:
        value = getattr(config, key)
        if value != EvalConfig.__dataclass_fields__[key].default:
            fix = "remove it" if key != "against" else "evaluate both, then: verl eval DIR --against OTHER"
            raise UserError(f"{config.model_path} is a classifier, which writes no answers", where=f"{key}={value}", fix=fix)


def read(config: EvalConfig, labels: Labels, model: PackedModel, console: Console) -> tuple[Classified, list[str]]:
    """Return the rows with their labels, and their texts. Raises UserError: a row is invalid, or longer than the model's positions."""
    columns = ClassColumns(config.messages_key or config.prompt_key, config.response_key, "prompt_key", "response_key")
    rows = load_classified(Whole(), columns, labels, config.test_file, model.tokenizer, key="test_file", max_samples=config.max_samples)
    console.print(f"test_file: {rows}")
    documents = rows.documents
    longest = int(documents.lengths_N.argmax())
    if model.longest is not None and documents.lengths_N[longest] > model.longest:
        what = f"the text has {documents.lengths_N[longest]:,} tokens; the model has {model.longest:,} positions"
        raise UserError(what, where=documents.place(longest), fix="shorten it, or remove the row")
    ids = (documents.document(number)[0].tolist() for number in range(len(rows.labels_N)))
    return rows, [str(model.tokenizer.decode(one)) for one in ids]


def results_of(config: EvalConfig, confusion: Confusion, rows: Classified, seconds: float, device: str) -> dict[str, Any]:
    """Return the content of results.json."""
    interval = wilson_interval(confusion.accuracy, confusion.rows)
    assert interval is not None
    counts = confusion.counts_LL
    tokens = int(rows.documents.lengths_N.sum())
    return {
        "metric": METRIC,
        "measure": "accuracy",
        "exact_match": confusion.accuracy,
        "accuracy": confusion.accuracy,
        "confidence_interval_95": list(interval),
        "confidence_interval_method": WILSON,
        "macro_f1": confusion.macro_f1,
        "labels": confusion.table(),
        "confusion": None if counts is None else counts.tolist(),
        "n": confusion.rows,
        "answers": confusion.rows,
        "errors": 0,
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


def predictions_of(rows: Classified, texts: Sequence[str], predicted_N: np.ndarray) -> list[Prediction]:
    """Return the rows as graded answers: the predicted label, or labels, beside the row's."""
    lengths = rows.documents.lengths_N.tolist()
    found = []
    for text, actual, given, tokens in zip(texts, rows.labels_N, predicted_N, lengths, strict=True):
        reference, response = named(rows.labels, actual), named(rows.labels, given)
        right = reference == response
        found.append(Prediction(text, response, reference, response, reference, right, None, float(right), "stop", tokens))
    return found


def named(labels: Labels, given: Any) -> str:
    """Return the name of a label's number; of several, which a row has, their names."""
    if labels.problem == "one":
        return labels.names[int(given)]
    return ", ".join(name for name, has in zip(labels.names, given, strict=True) if has > 0)


def show(results: dict[str, Any], confusion: Confusion, console: Console) -> None:
    """Print accuracy, macro F1 and the counts of each label, and what was taken for what if there are few labels."""
    low, high = results["confidence_interval_95"]
    console.print(f"accuracy {results['accuracy']:.2%}, 95% interval {low:.2%} to {high:.2%}")
    console.print(confusion.describe())
    counts, names = confusion.counts_LL, confusion.labels.shown
    if counts is None or len(names) > MOST_ACROSS:
        return
    table = Table("label", *names, title="rows by their label and, across, the predicted one", box=None)
    for name, row in zip(names, counts.tolist(), strict=True):
        table.add_row(name, *map(str, row))
    console.print(table)
