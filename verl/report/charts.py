"""Which curves a report shows, under which headings."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from verl.report.metrics import Metrics, Point, smoothed, thinned

FEW_POINTS = 40  # a curve with no more of them has a mark at each

# Heading, then metric, title, and what its axis shows. Metrics that no run has are left out, and all others are in the last group.
GROUPS: dict[str, dict[str, tuple[str, str]]] = {
    "Learning": {
        "train/loss": ("Training loss", "train/loss"),
        "val/loss": ("Validation loss", "val/loss"),
        "val/exact_match": ("Exact match on validation rows", "val/exact_match"),
        "val/reward": ("Reward on validation prompts", "val/reward"),
        "val/accuracy": ("Accuracy on validation pairs", "val/accuracy"),
        "train/accuracy": ("Accuracy on training pairs", "train/accuracy"),
        "train/divergence": ("Divergence from the teacher", "nats a token"),
        "train/lr": ("Learning rate", "train/lr"),
        "train/grad_norm": ("Gradient norm", "train/grad_norm"),
    },
    "Reinforcement learning": {
        "rl/reward": ("Reward", "rl/reward"),
        "rl/reward_std": ("Standard deviation of the reward", "rl/reward_std"),
        "rl/kl_k3": ("KL divergence from the reference", "nats a token"),
        "rl/divergence": ("Divergence from the teacher", "nats a token"),
        "rl/kl_deduction": ("KL penalty in the reward", "rl/kl_deduction"),
        "rl/response_tokens": ("Length of answers", "tokens"),
        "rl/truncated": ("Answers cut at the length limit", "share"),
        "rl/entropy": ("Entropy", "nats a token"),
        "critic/loss": ("Loss of the critic", "critic/loss"),
        "rl/explained_variance": ("Variance of the returns that the critic explains", "share"),
    },
    "Speed and memory": {
        "perf/tokens_per_second": ("Tokens per second", "tokens/s"),
        "perf/generated_tokens_per_second": ("Generated tokens per second", "tokens/s"),
        "perf/step_seconds": ("Time of a step", "seconds"),
        "perf/waiting_share": ("Share of a step in which a GPU waits", "share"),
        "perf/mfu": ("Share of the device's peak rate (MFU)", "share"),
        "perf/peak_memory_gib": ("Peak memory", "GiB"),
    },
}
OTHERS = "Other metrics"
# Metrics that vary from step to step, because each step has other rows.
_SMOOTH = set(
    "train/loss train/grad_norm train/accuracy rl/reward rl/reward_std rl/response_tokens rl/truncated rl/entropy rl/kl_k3 critic/loss "
    "train/divergence rl/divergence "
    "rl/explained_variance perf/tokens_per_second perf/generated_tokens_per_second perf/step_seconds perf/waiting_share "
    "perf/mfu".split()
)
_NO_CURVES = {"epoch"}


@dataclass(frozen=True)
class Curve:
    """A metric of a run.

    Attributes:
        run: number of the run on the page.
        points: step and value.
        smooth: the smoothed points; None: the metric is shown as it is.
    """

    run: int
    points: list[Point]
    smooth: list[Point] | None = None


@dataclass(frozen=True)
class Chart:
    """A picture with a metric of all runs that have it."""

    metric: str
    title: str
    unit: str
    curves: list[Curve]


def charts_of(runs: Sequence[Metrics]) -> dict[str, list[Chart]]:
    """Return the charts of runs under their headings, without headings that have none."""
    named = {metric for group in GROUPS.values() for metric in group}
    others = sorted({name for run in runs for name in run.names} - named - _NO_CURVES)
    groups = {**GROUPS, OTHERS: {name: (name, name) for name in others}}
    found = {heading: list(_charts(group, runs)) for heading, group in groups.items()}
    return {heading: charts for heading, charts in found.items() if charts}


def _charts(group: dict[str, tuple[str, str]], runs: Sequence[Metrics]) -> Iterator[Chart]:
    for metric, (title, unit) in group.items():
        curves = [_curve(number, metric, points) for number, run in enumerate(runs) if (points := run.curve(metric))]
        if curves:
            yield Chart(metric, title, unit, curves)


def _curve(run: int, metric: str, points: list[Point]) -> Curve:
    smooth = thinned(smoothed(points)) if metric in _SMOOTH and len(points) > FEW_POINTS else None
    return Curve(run, thinned(points), smooth)
