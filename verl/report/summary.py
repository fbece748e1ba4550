"""What a report says about a run in one look."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from verl.report.evaluations import Evaluation, is_base
from verl.report.metrics import counted
from verl.report.runs import RunFiles
from verl.report.settings import trainer_of

_METHODS = {"verl sft": "Fine-tuning", "verl ppo": "Reinforcement learning", "verl reward": "Preference training"}


@dataclass(frozen=True)
class Fact:
    """A line of the summary. `detail` explains the value; both are texts."""

    label: str
    value: str
    detail: str = ""


def facts_of(run: RunFiles, evaluations: Sequence[Evaluation]) -> list[Fact]:
    """Return the facts of a run; those that its files do not tell are left out.

    Args:
        evaluations: of the run's models, and of the one that it began with.
    """
    return [
        *_exact_match(run, evaluations),
        *_change(run, "rl/reward", "Reward", "mean of a step's answers"),
        *([] if trainer_of(run) == "verl ppo" else _change(run, "train/loss", "Training loss", "from the first step to the last")),
        *_validation(run),
        *_length(run),
        *_cost(run),
    ]


def method_of(run: RunFiles) -> str:
    """Return what kind of run it is, and of which model."""
    trainer = trainer_of(run)
    if trainer is None:
        return "A run whose settings are not known"
    method = _METHODS[trainer]
    if trainer != "verl sft" and (name := run.setting("algorithm.name")):
        method = f"{method} ({name})"
    kind = "" if not run.setting("model.lora_rank") else ", LoRA"
    return f"{method}{kind} of {run.setting('model.partial_pretrain')}"


def state_of(run: RunFiles) -> str:
    """Say how far a run is."""
    total = run.total_steps
    if total is None:
        return f"step {run.steps:,}"
    if run.stopped_early:
        return f"stopped early by trainer.patience, after {run.steps:,} of {counted(total, 'step')}"
    if run.is_finished:
        return f"all {counted(total, 'step')} done"
    return f"{run.steps:,} of {counted(total, 'step')} done: it is running, or was stopped"


def _exact_match(run: RunFiles, evaluations: Sequence[Evaluation]) -> list[Fact]:
    groups: dict[tuple[str, ...], list[Evaluation]] = {}
    for evaluation in sorted(evaluations, key=lambda one: (not is_base(one, run), math.inf if one.step is None else one.step)):
        if evaluation.mean is not None and not evaluation.is_validation:
            groups.setdefault(evaluation.subject, []).append(evaluation)
    if not groups:
        return []
    shown = max(groups.values(), key=len)
    before, after = shown[0], shown[-1]
    n = counted(len(after.scores), "question")
    if before is after:
        which = "the base model" if is_base(after, run) else "the run" if after.step is None else f"step {after.step:,}"
        return [Fact(after.measure, score_text(after.mean, after), f"of {which}, {n}")]
    return [Fact(after.measure, f"{score_text(before.mean, before)} → {score_text(after.mean, after)}", f"{n}, before and after")]


def score_text(score: float | None, evaluation: Evaluation) -> str:
    """Return a mean score: as a share where each is 0 or 1, else as a number."""
    if score is None:
        return "–"
    return f"{score:.1%}" if evaluation.is_share else number_text(score)


def number_text(value: float | None, digits: int = 4) -> str:
    """Return a number with so many digits that count."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def _change(run: RunFiles, metric: str, label: str, detail: str) -> list[Fact]:
    first, last = run.metrics.first(metric), run.metrics.last(metric)
    if first is None:
        return []
    return [Fact(label, f"{number_text(first, 3)} → {number_text(last, 3)}", detail)]


def _validation(run: RunFiles) -> list[Fact]:
    found = run.metrics.curve("val/loss")
    if not found:
        return _change(run, "val/reward", "Reward on validation prompts", "greedy answers")
    step, best = min(found, key=lambda point: point[1])
    return [Fact("Validation loss", number_text(found[-1][1]), f"best {number_text(best)} at step {step:,.0f}")]


def _length(run: RunFiles) -> list[Fact]:
    total, tokens = run.total_steps, run.metrics.last("train/tokens")
    value = f"{run.steps:,}" if total is None or total == run.steps else f"{run.steps:,} of {total:,}"
    return [Fact("Steps", value, "" if tokens is None else f"{tokens:,.0f} tokens")]


def _cost(run: RunFiles) -> list[Fact]:
    rates = [value for _, value in run.metrics.curve("perf/tokens_per_second")]
    memory = [value for _, value in run.metrics.curve("perf/peak_memory_gib")]
    facts = []
    if (seconds := run.metrics.total("perf/step_seconds")) > 0:
        facts.append(Fact("Time in steps", time_text(seconds), "without validation and saving"))
    if rates:
        facts.append(Fact("Speed", f"{number_text(median(rates))} tokens/s", "median of the steps"))
    if memory:
        facts.append(Fact("Peak memory", f"{max(memory):.1f} GiB", "of a device"))
    return facts


def time_text(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"
