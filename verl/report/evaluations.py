"""Evaluations of a run's models: the directories of `verl eval`, and how they belong to runs."""

import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from verl import regular_file
from verl.errors import UserError
from verl.eval.files import PREDICTIONS, RESULTS, Key, is_evaluation, keys_of
from verl.eval.intervals import Interval, are_right_or_wrong, interval_of
from verl.eval.missing import no_evaluation
from verl.manifest import STEP, step_name
from verl.report.metrics import counted
from verl.report.runs import RunFiles
from verl.run_directory import is_run_directory

LARGEST = 2**30  # bytes of predictions.jsonl that are read
_VALIDATION = re.compile(r"validation_(\d+)\.jsonl")
_DEPTH = 3  # of folders in a run's directory that are searched


@dataclass(frozen=True)
class Answer:
    """A graded answer, as in predictions.jsonl.

    Attributes:
        extracted: the answer that the grader found in the response; None if it found none.
    """

    prompt: str
    reference: str
    response: str
    extracted: str | None
    score: float


@dataclass
class Evaluation:
    """The files of an evaluation.

    Attributes:
        settings: its config, as in results.json; empty if that cannot be read.
        results: all of results.json.
        answers: in the order of the rows.
        notes: what is odd about the files, one sentence each.
        run: number of the run whose model it is of; None: of none of them.
        step: steps of the checkpoint; 0 for the model that the run began with; None if unknown.
        is_validation: whether the run itself made it, with greedy answers to its validation prompts.
    """

    path: Path
    settings: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    answers: list[Answer] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    run: int | None = None
    step: int | None = None
    is_validation: bool = False

    @property
    def model(self) -> str:
        return str(self.settings.get("model_path", "unknown model"))

    @property
    def subject(self) -> tuple[str, ...]:
        """What is measured, and how: evaluations of the same subject can be compared."""
        keys = (
            "test_file",
            "run",
            "metric",
            "max_samples",
            "n",
            "temperature",
            "prompt_key",
            "response_key",
            "messages_key",
            "system_prompt",
            "chat_template_kwargs",
            "few_shot",
            "few_shot_file",
            "reward",
        )
        return tuple(json.dumps(self.settings.get(key), sort_keys=True, default=str) for key in keys)

    @cached_property
    def questions(self) -> dict[Key, list[Answer]]:
        """The answers to each question."""
        n = self.settings.get("n", 1)
        n = n if isinstance(n, int) and n > 0 else 1
        keys = keys_of((first.prompt, first.reference) for first in self.answers[::n])
        return {key: self.answers[number * n : (number + 1) * n] for number, key in enumerate(keys)}

    @cached_property
    def scores(self) -> list[float]:
        """The mean score of each question's answers."""
        return [mean_score(answers) for answers in self.questions.values()]

    @property
    def mean(self) -> float | None:
        """The mean score; None if there are no answers."""
        scores = self.scores
        return sum(scores) / len(scores) if scores else None

    @property
    def measure(self) -> str:
        """Name of the mean score."""
        if self.is_validation:
            return "Reward on validation prompts"
        written = self.results.get("measure")
        if isinstance(written, str) and written:
            return written[:1].upper() + written[1:]
        return "Exact match" if self.is_share else "Mean score"

    @property
    def is_share(self) -> bool:
        """Whether each answer is either right or wrong."""
        return are_right_or_wrong([answer.score for answer in self.answers])

    @cached_property
    def interval(self) -> tuple[Interval, str] | None:
        """The 95% interval of the mean score, and its method, as `verl eval` gives them; None if there are too few questions."""
        scores = [[answer.score for answer in answers] for answers in self.questions.values()]
        return interval_of(scores) if len(scores) > 1 or (scores and self.is_share) else None


def mean_score(answers: Sequence[Answer]) -> float:
    return sum(answer.score for answer in answers) / len(answers)


def read_evaluation(path: Path) -> Evaluation:
    """Read the directory of an evaluation. What is damaged is said in its notes.

    Raises:
        UserError: it has neither results.json nor predictions.jsonl.
    """
    if not is_evaluation(path):
        if not path.is_dir() or is_run_directory(str(path)) or (path / "config.json").is_file():
            raise no_evaluation(str(path), f"--eval {path}")
        fix = "name the output_dir of verl eval, which holds both"
        raise UserError(f"has no {RESULTS} and no {PREDICTIONS}, so it is no evaluation", where=str(path), fix=fix)
    evaluation = Evaluation(path)
    try:
        found = json.loads(regular_file.read(path / RESULTS, follow=True).decode("utf-8", errors="replace"))
        evaluation.results = found if isinstance(found, dict) else {}
        evaluation.settings = settings if isinstance(settings := evaluation.results.get("config"), dict) else {}
    except FileNotFoundError:
        evaluation.notes.append(f"{path}: {RESULTS} is missing: the evaluation is not finished. The answers so far are counted.")
    except (OSError, ValueError, RecursionError) as error:
        evaluation.notes.append(f"{path}: {RESULTS} cannot be read ({error}); the scores are counted from {PREDICTIONS}.")
    _read_answers(evaluation, path / PREDICTIONS)
    return evaluation


def _read_answers(evaluation: Evaluation, path: Path) -> None:
    """Read predictions.jsonl, or a file of validation answers, whose score is the reward."""
    try:
        lines = regular_file.read(path, LARGEST, follow=True).decode("utf-8", errors="replace").split("\n")
    except OSError as error:
        evaluation.notes.append(f"{path} cannot be read ({error.strerror or error}), so there are no answers to show.")
        return
    found = [_answer(line) for line in lines if line.strip()]
    evaluation.answers = [answer for answer in found if answer is not None]
    if damaged := len(found) - len(evaluation.answers):
        evaluation.notes.append(f"{path} has {counted(damaged, 'damaged line')}, left out here.")
    expected = evaluation.results.get("answers")
    if isinstance(expected, int) and expected != len(evaluation.answers):
        evaluation.notes.append(f"{path} has {counted(len(evaluation.answers), 'answer')}, and {RESULTS} tells of {expected:,}.")


def _answer(line: str) -> Answer | None:
    try:
        row: Any = json.loads(line)
        extracted = row.get("extracted")
        score = float(row["score"] if "score" in row else row["reward"])
        prompt, reference, response = (str(row[key]) for key in ("prompt", "reference", "response"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return Answer(prompt, reference, response, None if extracted is None else str(extracted), score) if score == score else None


def read_validations(run: RunFiles, number: int) -> list[Evaluation]:
    """Return the first and the last validation of a run of reinforcement learning, as evaluations by its reward.

    Args:
        number: of the run.
    """
    found = [(int(match[1]), path) for path in _files(run.directory / "rollouts") if (match := _VALIDATION.fullmatch(path.name))]
    validations = []
    for step, path in dict.fromkeys([*sorted(found)[:1], *sorted(found)[-1:]]):
        settings = {"model_path": f"{run.directory}/{step_name(step)}", "test_file": run.setting("data.val_files"), "metric": "reward"}
        evaluation = Evaluation(path, settings | {"run": str(run.directory)}, run=number, step=step, is_validation=True)
        _read_answers(evaluation, path)
        validations.append(evaluation)
    return validations


def find_evaluations(runs: Sequence[RunFiles], named: Sequence[Path]) -> list[Evaluation]:
    """Return the evaluations that are named, those inside the runs' directories, and those beside them that are of their models.

    Raises:
        UserError: one that is named is none.
    """
    found = {path.resolve(): read_evaluation(path) for path in named}
    for run in runs:
        for path in _inside(run.directory, _DEPTH):
            found.setdefault(path.resolve(), read_evaluation(path))
    for evaluation in found.values():
        evaluation.run, evaluation.step = _owner(evaluation, runs)
    for run in runs:
        for path in _files(run.directory.absolute().parent):
            if path.resolve() not in found and path.is_dir() and is_evaluation(path):
                evaluation = read_evaluation(path)
                evaluation.run, evaluation.step = _owner(evaluation, runs)
                if evaluation.run is not None:
                    found[path.resolve()] = evaluation
    validations = [validation for number, run in enumerate(runs) for validation in read_validations(run, number)]
    return sorted([*found.values(), *validations], key=_order)


def _order(evaluation: Evaluation) -> tuple[Any, ...]:
    """Evaluations of the same questions are together; of a run, the earlier step first."""
    run = math.inf if evaluation.run is None else evaluation.run
    return (
        evaluation.is_validation,
        evaluation.subject,
        evaluation.step != 0,
        run,
        -1 if evaluation.step is None else evaluation.step,
        str(evaluation.path),
    )


def _files(folder: Path) -> list[Path]:
    """Return what is in a folder; nothing if it is missing or may not be read."""
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _inside(folder: Path, depth: int) -> Iterator[Path]:
    """Yield the evaluations in a folder, but for those in checkpoints, which have none."""
    for path in _files(folder):
        if path.is_dir() and not path.is_symlink() and not STEP.fullmatch(path.name):
            if is_evaluation(path):
                yield path
            elif depth > 1:
                yield from _inside(path, depth - 1)


def _owner(evaluation: Evaluation, runs: Sequence[RunFiles]) -> tuple[int | None, int | None]:
    """Return the run and the step of the model that was evaluated. Paths are compared as they were written, and as they are here."""
    if "model_path" not in evaluation.settings:
        inside = [number for number, run in enumerate(runs) if run.directory.resolve() in evaluation.path.resolve().parents]
        return (inside[0] if inside else None), None
    models = _spellings(evaluation.model)
    for number, run in enumerate(runs):
        for model in models:
            places = _spellings(str(run.directory)) | _spellings(str(run.setting("trainer.default_local_dir") or run.directory))
            step = STEP.fullmatch(os.path.basename(model))
            if step and os.path.dirname(model) in places:
                return number, int(step[1])
            if model in places or (os.path.basename(model) == "best" and os.path.dirname(model) in places):
                return number, None
    return next(((number, 0) for number, run in enumerate(runs) if is_base(evaluation, run)), (None, None))


def is_base(evaluation: Evaluation, run: RunFiles) -> bool:
    """Return whether an evaluation is of the model that a run began with."""
    return bool(_spellings(evaluation.model) & _spellings(str(run.setting("model.partial_pretrain") or "")))


def _spellings(path: str) -> set[str]:
    if not path:
        return set()
    return {os.path.normpath(path), os.path.realpath(os.path.expanduser(path))}
