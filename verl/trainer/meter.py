"""From what a step returns to the numbers that are logged."""

import math
import time

import torch

from verl import dist
from verl.data.loader import Step
from verl.engine.checkpoint import Position
from verl.engine.engine import Engine
from verl.engine.flops import peak_flops, training_flops
from verl.errors import UserError


class Meter:
    """Counts tokens and time of a run.

    Args:
        start: where the run that this one goes on from has left off.
    """

    def __init__(self, engine: Engine, start: Position):
        self.tokens, self.supervised_tokens = start.tokens, start.supervised_tokens
        self._engine = engine
        self._flops = training_flops(engine.scorer.model)
        self._peak = peak_flops(engine.device)
        self._epoch_tokens, self._epoch_seconds = 0, 0.0
        self.start()

    def start(self) -> None:
        """A step begins here: what came before, such as saving, is not its time."""
        self._since = time.perf_counter()

    def measure(self, step: Step, out: dict[str, torch.Tensor]) -> dict[str, float]:
        """Metrics of the step that ends here, under the names of metrics.jsonl.

        Raises:
            UserError: the loss or the gradient is not finite.
        """
        loss, norm = float(out["loss"]), float(out["grad_norm"])  # waits for the device
        seconds = time.perf_counter() - self._since
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
            "train/loss": loss,
            "train/grad_norm": norm,
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
