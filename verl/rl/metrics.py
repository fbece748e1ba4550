"""Metrics of a step: rewards, updates, and time of each phase."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from verl import dist
from verl.engine.position import Position
from verl.rl.answering import Collected
from verl.rl.clock import PHASES, Clock
from verl.rl.experience import Experience


def step_metrics(
    collected: Collected,
    experience: Experience,
    critic: Sequence[Mapping[str, Tensor]],
    actor: Sequence[Mapping[str, Tensor]],
    version: int,
) -> dict[str, float]:
    """Return all metrics of a step except its time. Every rank calls it.

    Args:
        critic, actor: results of `Engine.train_step` for each update.
        version: version of the weights that the step began with.
    """
    learned = experience.learned
    metrics = {f"rl/{name}": value for name, value in learned.metrics.items()} if learned is not None else {}
    metrics |= _of_answers(collected) | _of_versions(collected, version) | _of_balance(experience)
    metrics |= {f"critic/{name}": value for name, value in _over_updates(critic).items()}
    named = {"loss": "train/loss", "grad_norm": "train/grad_norm", "skipped": "train/skipped"}
    return metrics | {named.get(name, f"rl/{name}"): value for name, value in _over_updates(actor).items()}


def _of_answers(collected: Collected) -> dict[str, float]:
    """Return metrics of all answers of all ranks. Excluded groups count too: without them, the numbers would not describe the actor."""
    samples = collected.answered
    rewards, lengths = np.array([s.reward for s in samples]), np.array([sum(t.trained_tokens for t in s.trajectories) for s in samples])
    counts = [len(samples), rewards.sum(), (rewards**2).sum(), lengths.sum(), sum(s.finish_reason == "length" for s in samples)]
    n, reward, squares, tokens, cut = dist.total([float(value) for value in counts])
    turns, version = dist.total([float(sum(t.turns for s in samples for t in s.trajectories)), float(sum(s.version for s in samples))])
    n = max(n, 1.0)
    metrics = {
        "rl/reward": reward / n,
        "rl/reward_std": max(0.0, squares / n - (reward / n) ** 2) ** 0.5,
        "rl/groups_without_spread": collected.without_spread / max(1, collected.groups),
        "rl/response_tokens": tokens / n,
        "rl/truncated": cut / n,
        "rl/weight_version": version / n,
        "rl/refills": float(collected.refills),
        "rl/turns": turns / n,
    }
    return metrics | collected.metrics | _of_graders(collected)


def _of_balance(experience: Experience) -> dict[str, float]:
    """Return the tokens that the fullest rank trains on, over the mean of all ranks."""
    (tokens,) = dist.total([float(experience.tokens)])
    return {"perf/fullest_rank": dist.most(experience.tokens) * dist.world_size() / max(tokens, 1.0)}


def _of_versions(collected: Collected, version: int) -> dict[str, float]:
    """Return by how many updates the weights that drew the tokens of all answers are older than `version`: the mean and the largest."""
    trajectories = [trajectory for sample in collected.answered for trajectory in sample.trajectories]
    lags = [version - np.array(trajectory.trained_versions, dtype=np.int64) for trajectory in trajectories]
    tokens, total = dist.total([float(sum(map(len, lags))), float(sum(int(lags_M.sum()) for lags_M in lags))])
    largest = max((int(lags_M.max()) for lags_M in lags if len(lags_M)), default=0)
    return {"rl/weight_lag": total / max(tokens, 1.0), "rl/largest_weight_lag": float(dist.most(max(0, largest)))}


def _of_graders(collected: Collected) -> dict[str, float]:
    """Return each grader's mean over all answers of all ranks, and the number of reward errors."""
    names = sorted(collected.scored[0].each)
    answers = float(sum(len(scored.reward_A) for scored in collected.scored))
    sums = [float(sum(scored.each[name].sum() for scored in collected.scored)) for name in names]
    errors = float(sum(len(scored.errors) for scored in collected.scored))
    n, failed, *totals = dist.total([answers, errors, *sums])
    means = {f"reward/{name}": value / max(n, 1.0) for name, value in zip(names, totals, strict=True)}
    return {**means, "reward/errors": failed}


def _over_updates(outs: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """Return the mean of each metric over a step's updates; for maxima, the maximum; for `skipped`, the sum."""
    names = {name for out in outs for name in out}
    found = {name: [float(out[name]) for out in outs if name in out] for name in sorted(names)}
    return {name: _joined(name, values) for name, values in found.items()}


def _joined(name: str, values: list[float]) -> float:
    if name.startswith("largest"):
        return max(values)
    return sum(values) if name == "skipped" else sum(values) / len(values)


def time_metrics(clock: Clock, collected: Collected, start: Position, device: torch.device) -> tuple[dict[str, float], Position]:
    """Return a step's tokens and throughput, and the position after it. Every rank calls it, before validation and saving."""
    trained_on, answered = ([t for s in samples for t in s.trajectories] for samples in (collected.samples, collected.answered))
    tokens = sum(len(t.prompt_ids) + len(t.answer_ids) for t in trained_on)
    trained, generated = (sum(t.trained_tokens for t in trajectories) for trajectories in (trained_on, answered))
    whole, learned, drawn = dist.total([float(tokens), float(trained), float(generated)])
    done = replace(start, tokens=start.tokens + int(whole), supervised_tokens=start.supervised_tokens + int(learned))
    seconds = clock.total()
    metrics = {
        "train/tokens": done.tokens,
        "train/supervised_tokens": done.supervised_tokens,
        "perf/step_seconds": seconds,
        "perf/tokens_per_second": whole / seconds,
        "perf/tokens_per_second_per_gpu": whole / seconds / dist.world_size(),
    }
    if clock.seconds.get("generate") and not collected.is_ahead:
        metrics["perf/generated_tokens_per_second"] = drawn / clock.seconds["generate"]
    if device.type == "cuda":
        metrics["perf/peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return metrics | waiting_metrics(clock, seconds), done


def waiting_metrics(clock: Clock, seconds: float) -> dict[str, float]:
    """Return the shares of a step in which ranks wait: their mean, in all and by phase, and the largest one of a rank. Every rank calls it.

    Ranks that only generate have a number of their own.

    Args:
        seconds: of the step on this rank.
    """
    of_ranks = dist.gathered({name: waited / seconds for name, waited in clock.waiting().items()})
    means = {f"perf/waiting_{name}": sum(rank[name] for rank in of_ranks) / len(of_ranks) for name in of_ranks[0]}
    largest, of_rollout = max(sum(rank.values()) for rank in of_ranks), clock.waiting_of_rollout()
    apart = {} if of_rollout is None else {"perf/waiting_rollout_ranks": of_rollout / seconds}
    return {"perf/waiting_share": sum(means.values()), "perf/largest_waiting_share": largest, **means, **apart}


def phase_seconds(clock: Clock) -> dict[str, float]:
    """Return the seconds of each phase of the step."""
    return {f"perf/seconds_{name}": clock.seconds[name] for name in PHASES if name in clock.seconds}
