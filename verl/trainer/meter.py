"""Turns the results of training steps into logged metrics."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from verl import dist
from verl.data.loader import Step
from verl.engine.engine import Engine
from verl.engine.hardware import peak_flops
from verl.engine.outline import training_flops
from verl.engine.position import Position

Moment: TypeAlias = float | torch.cuda.Event  # seconds of the host's clock, or an event in the GPU's stream


@dataclass(frozen=True)
class _Running:
    """A step that may still be running on the device.

    Attributes:
        names: names of the results.
        values: the results, in host memory; valid once `done` is reached.
        done: end of the step.
    """

    step: Step
    names: list[str]
    values: Tensor
    done: Moment


class Meter:
    """Measures tokens and time of a run. A step is added when its work is queued, and read when the work is done.

    Args:
        start: position of the checkpoint that the run resumes from.
    Attributes:
        skipped_in_a_row: newest steps whose update was skipped, because the loss or the gradient norm was not finite.
    """

    def __init__(self, engine: Engine, start: Position):
        self.tokens, self.supervised_tokens = start.tokens, start.supervised_tokens
        self._engine, self._skipped, self.skipped_in_a_row = engine, start.skipped, 0
        self._flops = training_flops(engine.scorer.model)
        self._peak, self._measured = peak_flops(engine.device), None
        if engine.device.type == "cuda":
            from verl.engine.matrix_rate import matrix_rate  # of a GPU

            self._measured = matrix_rate(engine.device)
        self._epoch_tokens, self._epoch_seconds = 0, 0.0
        self._running: list[_Running] = []
        self._queued = 1 if engine.trained[0].is_cuda else 0  # weights in host memory: the step has ended when it is added
        self.start()

    def start(self) -> None:
        """Start the time of the next step. Call it after pauses, such as saving."""
        self._since = self._now()

    def _now(self) -> Moment:
        """Return the current time of the device. On a GPU, it is an event in the stream, since the host runs ahead."""
        if self._engine.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, step: Step, out: dict[str, Tensor]) -> None:
        """Add a step whose work is queued, with the result of `Engine.train_step`."""
        names = [name for name in out if name != "skipped"]  # as the loss and the norm tell
        values = torch.stack([out[name].float() for name in names])
        if values.is_cuda:
            values = torch.empty(len(names), pin_memory=True).copy_(values, non_blocking=True)
        self._running.append(_Running(step, names, values, self._now()))

    def finished(self, *, wait: bool) -> Iterator[tuple[int, dict[str, float]]]:
        """Yield the number (from 1) and the metrics of each finished step, with the names of metrics.jsonl.

        Args:
            wait: wait for the newest step too; otherwise it may still run on the GPU.
        """
        keep = 0 if wait else self._queued
        while len(self._running) > keep:
            done = self._running.pop(0)
            if isinstance(done.done, torch.cuda.Event):
                done.done.synchronize()
            seconds, self._since = _seconds(self._since, done.done), done.done
            yield done.step.number + 1, self._measure(done.step, seconds, dict(zip(done.names, done.values.tolist(), strict=True)))

    def _measure(self, step: Step, seconds: float, found: dict[str, float]) -> dict[str, float]:
        lr = self._engine.learning_rate(step.number - self._skipped)
        is_skipped = not math.isfinite(found["loss"] + found["grad_norm"])
        self._skipped, self.skipped_in_a_row = self._skipped + is_skipped, self.skipped_in_a_row + 1 if is_skipped else 0
        self.tokens += step.tokens
        self.supervised_tokens += step.trained_tokens
        self._epoch_tokens += step.tokens
        self._epoch_seconds += seconds
        metrics = {
            "epoch": step.epoch,
            **{f"train/{name}": value for name, value in found.items()},
            "train/lr": lr,
            **({"train/skipped": 1.0} if is_skipped else {}),
            "train/tokens": self.tokens,
            "train/supervised_tokens": self.supervised_tokens,
            "perf/step_seconds": seconds,
            "perf/tokens_per_second": step.tokens / seconds,
            "perf/tokens_per_second_per_gpu": step.tokens / seconds / dist.world_size(),
        }
        for name, rate in (("perf/mfu", self._peak), ("perf/mfu_of_measured", self._measured)):
            if rate is not None:
                metrics[name] = self._flops(step.tokens, step.trained_tokens) / seconds / (rate * dist.world_size())
        if self._engine.device.type == "cuda":
            metrics["perf/peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return metrics

    def end_epoch(self, epoch: int) -> str:
        """Return the log line for the end of an epoch (from 0), and start counting the next one."""
        rate = self._epoch_tokens / self._epoch_seconds
        line = f"epoch {epoch + 1}: {self._epoch_tokens:,} tokens, {rate:,.0f} tokens/s"
        self._epoch_tokens, self._epoch_seconds = 0, 0.0
        return line


def _seconds(start: Moment, end: Moment) -> float:
    if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        return float(start.elapsed_time(end)) / 1000
    assert isinstance(start, float) and isinstance(end, float)
    return end - start
