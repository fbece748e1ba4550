"""From what a step returns to the numbers that are logged."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from verl import dist
from verl.data.loader import Step
from verl.engine.checkpoint import Position
from verl.engine.engine import Engine
from verl.engine.flops import peak_flops, training_flops
from verl.errors import UserError

Moment: TypeAlias = float | torch.cuda.Event  # seconds of the host's clock, or a place in the GPU's work


@dataclass(frozen=True)
class _Running:
    """A step that the device may still be working on, and where its numbers will be."""

    step: Step
    names: list[str]
    values: Tensor  # of the names, in host memory from `done` on
    done: Moment


class Meter:
    """Counts tokens and time of a run. A step is added as soon as its work is queued, and read when it is done.

    Args:
        start: where the run that this one goes on from has left off.
    """

    def __init__(self, engine: Engine, start: Position):
        self.tokens, self.supervised_tokens = start.tokens, start.supervised_tokens
        self._engine = engine
        self._flops = training_flops(engine.scorer.model)
        self._peak = peak_flops(engine.device)
        self._epoch_tokens, self._epoch_seconds = 0, 0.0
        self._running: list[_Running] = []
        self._in_hand = 1 if engine.trained[0].is_cuda else 0  # the host waits for what it updates itself: a CPU, or offloading
        self.start()

    def start(self) -> None:
        """A step begins here: what came before, such as saving, is not its time."""
        self._since = self._now()

    def _now(self) -> Moment:
        """On a GPU the host may be ahead or behind: what the GPU has reached is the time that counts."""
        if self._engine.device.type != "cuda":
            return time.perf_counter()
        reached = torch.cuda.Event(enable_timing=True)
        reached.record()
        return reached

    def add(self, step: Step, out: dict[str, Tensor]) -> None:
        """A step's work is queued; `out` is what `Engine.train_step` returned."""
        names = [name for name in out if name != "skipped"]  # a loss that is not finite ends the run
        values = torch.stack([out[name].float() for name in names])
        if values.is_cuda:
            values = torch.empty(len(names), pin_memory=True).copy_(values, non_blocking=True)
        self._running.append(_Running(step, names, values, self._now()))

    def finished(self, *, wait: bool) -> Iterator[tuple[int, dict[str, float]]]:
        """Numbers (counted from 1) and metrics, under the names of metrics.jsonl, of the steps that are done.

        Args:
            wait: for the newest one too; else a GPU keeps it as work in hand while the host goes on to the next.
        Raises:
            UserError: the loss or the gradient of a step is not finite.
        """
        keep = 0 if wait else self._in_hand
        while len(self._running) > keep:
            done = self._running.pop(0)
            if isinstance(done.done, torch.cuda.Event):
                done.done.synchronize()
            seconds, self._since = _seconds(self._since, done.done), done.done
            yield done.step.number + 1, self._measure(done.step, seconds, dict(zip(done.names, done.values.tolist(), strict=True)))

    def _measure(self, step: Step, seconds: float, found: dict[str, float]) -> dict[str, float]:
        loss, norm = found["loss"], found["grad_norm"]
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise UserError(
                f"loss {loss}, gradient norm {norm}",
                where=f"step {step.number + 1}",
                fix="lower optim.lr, or look at the rows of this step; the last checkpoint is whole",
            )
        self.tokens += step.tokens
        self.supervised_tokens += step.trained_tokens
        self._epoch_tokens += step.tokens
        self._epoch_seconds += seconds
        metrics = {
            "epoch": step.epoch,
            **{f"train/{name}": value for name, value in found.items()},
            "train/lr": self._engine.learning_rate(step.number),
            "train/tokens": self.tokens,
            "train/supervised_tokens": self.supervised_tokens,
            "perf/step_seconds": seconds,
            "perf/tokens_per_second": step.tokens / seconds,
            "perf/tokens_per_second_per_gpu": step.tokens / seconds / dist.world_size(),
        }
        if self._peak is not None:
            metrics["perf/mfu"] = self._flops(step.tokens, step.trained_tokens) / seconds / (self._peak * dist.world_size())
        if self._engine.device.type == "cuda":
            metrics["perf/peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return metrics

    def end_epoch(self, epoch: int) -> str:
        """The line that closes an epoch, counted from 0."""
        rate = self._epoch_tokens / self._epoch_seconds
        line = f"epoch {epoch + 1}: {self._epoch_tokens:,} tokens, {rate:,.0f} tokens/s"
        self._epoch_tokens, self._epoch_seconds = 0, 0.0
        return line


def _seconds(start: Moment, end: Moment) -> float:
    if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        return float(start.elapsed_time(end)) / 1000
    assert isinstance(start, float) and isinstance(end, float)
    return end - start
