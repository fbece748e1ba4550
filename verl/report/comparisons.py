"""Which evaluations of a report are compared, and which answers turned between two of them."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone

from verl.eval.paired import Comparison as PairedComparison
from verl.eval.paired import compare
from verl.report.evaluations import Answer, Evaluation, is_base, mean_score
from verl.report.runs import RunFiles

_SHARED = [False, None, True]  # whether training data is the same, from worst to best


@dataclass(frozen=True)
class Turned:
    """A question that two evaluations answered."""

    before: Answer
    after: Answer


@dataclass(frozen=True)
class Comparison:
    """Two evaluations of the same questions.

    Attributes:
        why: why these two, if that is not plain: how the run was chosen that another one is compared with.
        test: None if they have too few questions in common.
        right, wrong: questions whose score rose and fell.
        same_right, same_wrong: questions whose score stayed, at 1 and below.
        unpaired: questions that only one of the two has.
    """

    before: Evaluation
    after: Evaluation
    test: PairedComparison | None
    right: list[Turned]
    wrong: list[Turned]
    same_right: list[Turned]
    same_wrong: list[Turned]
    unpaired: int
    why: str = ""


def comparisons_of(evaluations: Sequence[Evaluation], runs: Sequence[RunFiles] = ()) -> list[Comparison]:
    """Compare, of each subject, every evaluation with that of the model that its run began with, or else with the run's first one.

    The last evaluation of each run is compared with that of an earlier run, too (see `earlier_run`), the oldest run first. What is
    compared with nothing by these rules is compared with the first evaluation.
    """
    groups: dict[tuple[str, ...], list[Evaluation]] = defaultdict(list)
    for evaluation in evaluations:
        if evaluation.answers and evaluation.settings:
            groups[evaluation.subject].append(evaluation)
    return [compared(*pair) for group in groups.values() for pair in _pairs(group, runs)]


def _pairs(group: Sequence[Evaluation], runs: Sequence[RunFiles]) -> list[tuple[Evaluation, Evaluation, str]]:
    """Return which evaluations of a subject are compared, the earlier one first, and why if that is not plain."""
    pairs = [(before, after, "") for after in group if (before := _beginning(after, group, runs)) is not after]
    seen = {frozenset((id(before), id(after))) for before, after, _ in pairs}
    between = [pair for pair in _between_runs(group, runs) if frozenset((id(pair[0]), id(pair[1]))) not in seen]
    paired = {id(one) for before, after, _ in [*pairs, *between] for one in (before, after)}
    left = [(group[0], one, "") for one in group[1:] if id(one) not in paired]
    return [*pairs, *between, *left]


def _beginning(after: Evaluation, group: Sequence[Evaluation], runs: Sequence[RunFiles]) -> Evaluation:
    """Return the evaluation of the model that a run began with, or else the run's first one; of a model of no run, the first of all."""
    if after.run is None or after.step == 0 or not runs:
        return group[0]
    bases = [one for one in group if one is not after and is_base(one, runs[after.run])]
    return (bases or [one for one in group if one.run == after.run])[0]


def _between_runs(group: Sequence[Evaluation], runs: Sequence[RunFiles]) -> list[tuple[Evaluation, Evaluation, str]]:
    last = {one.run: one for one in group if one.run is not None and one.step != 0} if runs else {}  # of each run
    # By the time of the last step. One that has none has hardly begun; then the order of the command line counts.
    ordered = sorted(last, key=lambda number: (math.inf if (time := runs[number].last_written) is None else time, number))
    pairs = []
    for place, number in enumerate(ordered[1:], 1):
        before, why = earlier_run(runs[number], [runs[one] for one in ordered[:place]])
        pairs.append((last[ordered[before]], last[number], why))
    return pairs


def earlier_run(run: RunFiles, earlier: Sequence[RunFiles]) -> tuple[int, str]:
    """Return which of the earlier runs, the oldest first, a run is compared with, and why.

    It is the latest one that finished, of those with the same training data if there is one; if none finished, it is the latest one.
    """
    finished, shared = [one.is_finished is True for one in earlier], [_has_data_of(run, one) for one in earlier]
    found = max(range(len(earlier)), key=lambda number: (finished[number], _SHARED.index(shared[number]), number))
    one = earlier[found]
    data = {True: ", on the same training data", False: ", on other training data", None: "; its training data may be other"}[shared[found]]
    which = "the latest run before it" + (" that finished" if finished[found] else ", of which none is known to have finished")
    when = "" if one.last_written is None else f" (last step {datetime.fromtimestamp(one.last_written, timezone.utc):%Y-%m-%d %H:%M UTC})"
    return found, f"{run.name} is compared with {one.name}: {which}{data}{when}"


def _has_data_of(run: RunFiles, other: RunFiles) -> bool | None:
    """Return whether two runs have the same training files; None if one does not tell."""
    mine, others = run.setting("data.train_files"), other.setting("data.train_files")
    return None if mine is None or others is None else bool(mine == others)


def compared(before: Evaluation, after: Evaluation, why: str = "") -> Comparison:
    """Pair the questions of two evaluations by their texts, and sort them by what became of their answers."""
    there, here = before.questions, after.questions
    pairs = [(there[question], here[question]) for question in there if question in here]
    scores = [(mean_score(a), mean_score(b)) for a, b in pairs]
    kinds: dict[str, list[Turned]] = {"right": [], "wrong": [], "same_right": [], "same_wrong": []}
    for (a, b), (x, y) in zip(pairs, scores, strict=True):
        kind = "right" if y > x else "wrong" if y < x else "same_right" if y >= 1 else "same_wrong"
        kinds[kind].append(_shown(a, b, kind))
    test = compare([y for _, y in scores], [x for x, _ in scores]) if len(scores) > 1 else None
    unpaired = len(there) + len(here) - 2 * len(pairs)
    return Comparison(before, after, test, kinds["right"], kinds["wrong"], kinds["same_right"], kinds["same_wrong"], unpaired, why)


def _shown(before: list[Answer], after: list[Answer], kind: str) -> Turned:
    """Return the answers to show of a question: of several, those that differ most in the way that it turned."""
    if kind in ("same_right", "same_wrong"):
        return Turned(before[0], after[0])
    low, high = (before, after) if kind == "right" else (after, before)
    worst, best = min(low, key=lambda answer: answer.score), max(high, key=lambda answer: answer.score)
    return Turned(worst, best) if kind == "right" else Turned(best, worst)
