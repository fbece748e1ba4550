"""Evaluations of a run's models: the directories of `verl eval`, how they belong to runs, and which answers turned between two of them."""

import json
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from verl import regular_file
from verl.errors import UserError
from verl.manifest import STEP
from verl.report.metrics import counted
from verl.report.runs import RunFiles
from verl.report.statistics import Interval, PairedTest, compare, interval_of, is_binary

RESULTS, PREDICTIONS = "results.json", "predictions.jsonl"
LARGEST = 2**30  # bytes of predictions.jsonl that are read
STEP_NAME = "global_step_"
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
    def questions(self) -> dict[tuple[str, str, int], list[Answer]]:
        """Answers by question: its text, its reference, and how many equal ones come before it."""
        n = self.settings.get("n", 1)
        n = n if isinstance(n, int) and n > 0 else 1
        found: dict[tuple[str, str, int], list[Answer]] = {}
        seen: dict[tuple[str, str], int] = defaultdict(int)
        for start in range(0, len(self.answers), n):
            first = self.answers[start]
            place = (first.prompt, first.reference)
            found[first.prompt, first.reference, seen[place]] = self.answers[start : start + n]
            seen[place] += 1
        return found

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
        return is_binary([answer.score for answer in self.answers])

    @cached_property
    def interval(self) -> Interval | None:
        return interval_of(self.scores)


@dataclass(frozen=True)
class Turned:
    """A question that two evaluations answered."""

    before: Answer
    after: Answer


@dataclass(frozen=True)
class Comparison:
    """Two evaluations of the same questions.

    Attributes:
        test: None if they have too few questions in common.
        right, wrong: questions whose score rose and fell.
        same_right, same_wrong: questions whose score stayed, at 1 and below.
        unpaired: questions that only one of the two has.
    """

    before: Evaluation
    after: Evaluation
    test: PairedTest | None
    right: list[Turned]
    wrong: list[Turned]
    same_right: list[Turned]
    same_wrong: list[Turned]
    unpaired: int


def mean_score(answers: Sequence[Answer]) -> float:
    return sum(answer.score for answer in answers) / len(answers)


def read_evaluation(path: Path) -> Evaluation:
    """Read the directory of an evaluation. What is damaged is said in its notes.

    Raises:
        UserError: it has neither results.json nor predictions.jsonl.
    """
    if not is_evaluation(path):
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


def is_evaluation(path: Path) -> bool:
    return (path / RESULTS).is_file() or (path / PREDICTIONS).is_file()


def read_validations(run: RunFiles, number: int) -> list[Evaluation]:
    """Return the first and the last validation of a run of reinforcement learning, as evaluations by its reward.

    Args:
        number: of the run.
    """
    found = [(int(match[1]), path) for path in _files(run.directory / "rollouts") if (match := _VALIDATION.fullmatch(path.name))]
    validations = []
    for step, path in dict.fromkeys([*sorted(found)[:1], *sorted(found)[-1:]]):
        settings = {"model_path": f"{run.directory}/{STEP_NAME}{step}", "test_file": run.setting("data.val_files"), "metric": "reward"}
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
    run = len(evaluation.settings) if evaluation.run is None else evaluation.run
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


def comparisons_of(evaluations: Sequence[Evaluation], runs: Sequence[RunFiles] = ()) -> list[Comparison]:
    """Compare, of each subject, every evaluation with that of the model that its run began with, or else with the first one.

    The last evaluations of several runs are compared with the first run's, too.
    """
    groups: dict[tuple[str, ...], list[Evaluation]] = defaultdict(list)
    for evaluation in evaluations:
        if evaluation.answers and evaluation.settings:
            groups[evaluation.subject].append(evaluation)
    return [compared(before, after) for group in groups.values() for before, after in _pairs(group, runs)]


def _pairs(group: Sequence[Evaluation], runs: Sequence[RunFiles]) -> list[tuple[Evaluation, Evaluation]]:
    """Return which evaluations of a subject are compared, the earlier one first."""
    pairs = []
    for after in group:
        bases = [one for one in group if one is not after and after.run is not None and runs and is_base(one, runs[after.run])]
        before = bases[0] if bases and after.step != 0 else group[0]
        if before is not after:
            pairs.append((before, after))
    last = {one.run: one for one in group if one.run is not None and one.step != 0}  # of each run
    lasts = [last[run] for run in sorted(last)]
    seen = {frozenset((id(before), id(after))) for before, after in pairs}
    return [*pairs, *((lasts[0], one) for one in lasts[1:] if frozenset((id(lasts[0]), id(one))) not in seen)]


def compared(before: Evaluation, after: Evaluation) -> Comparison:
    """Pair the questions of two evaluations by their texts, and sort them by what became of their answers."""
    there, here = before.questions, after.questions
    pairs = [(there[question], here[question]) for question in there if question in here]
    scores = [(mean_score(a), mean_score(b)) for a, b in pairs]
    kinds: dict[str, list[Turned]] = {"right": [], "wrong": [], "same_right": [], "same_wrong": []}
    for (a, b), (x, y) in zip(pairs, scores, strict=True):
        kind = "right" if y > x else "wrong" if y < x else "same_right" if y >= 1 else "same_wrong"
        kinds[kind].append(_shown(a, b, kind))
    test = compare([x for x, _ in scores], [y for _, y in scores])
    unpaired = len(there) + len(here) - 2 * len(pairs)
    return Comparison(before, after, test, kinds["right"], kinds["wrong"], kinds["same_right"], kinds["same_wrong"], unpaired)


def _shown(before: list[Answer], after: list[Answer], kind: str) -> Turned:
    """Return the answers to show of a question: of several, those that differ most in the way that it turned."""
    if kind in ("same_right", "same_wrong"):
        return Turned(before[0], after[0])
    low, high = (before, after) if kind == "right" else (after, before)
    worst, best = min(low, key=lambda answer: answer.score), max(high, key=lambda answer: answer.score)
    return Turned(worst, best) if kind == "right" else Turned(best, worst)
