"""Early stopping: a run ends after trainer.patience validations without a better trainer.best_metric.

Each checkpoint has the count in state.json, so that a run that resumes goes on counting.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

from verl import dist
from verl.config.best import best_mode
from verl.config.shared import TrainerConfig
from verl.engine import restore
from verl.engine.position import Position, Waited
from verl.run import Run


class Patience:
    """Counts the validations since the best one. Every rank has the same numbers.

    Args:
        rows: identity of the validation rows.
    Attributes:
        waited: the count so far, for the checkpoint's position.
    """

    def __init__(self, config: TrainerConfig, run: Run, rows: str):
        assert config.best_metric is not None and config.patience is not None
        self._most, self._mode = config.patience, best_mode(config)
        new = Waited(config.best_metric, None, 0, 0, rows)
        before = None if run.checkpoint is None else dist.from_main(restore.read_position(run.checkpoint).waited)
        is_same = before is not None and (before.metric, before.rows) == (new.metric, new.rows)
        self.waited = before if before is not None and is_same else new
        if before is not None and not is_same:
            run.say("trainer.patience: the metric or the validation rows are others than before; the count of validations begins anew")

    def weigh(self, step: int, metrics: Mapping[str, float]) -> None:
        """Count a validation. A step without one is not counted."""
        if self.waited.metric not in metrics:
            return
        value, best = metrics[self.waited.metric], self.waited.best
        is_better = math.isfinite(value) and (best is None or (value < best if self._mode == "min" else value > best))
        if is_better:
            self.waited = replace(self.waited, best=value, step=step, validations=0)
        else:
            self.waited = replace(self.waited, validations=self.waited.validations + 1)

    @property
    def is_over(self) -> bool:
        return self.waited.validations >= self._most


def has_stopped_early(done: Position, config: TrainerConfig) -> bool:
    """Return whether a run ended at this position because of trainer.patience, and would end there again."""
    waited = done.waited
    if waited is None or config.patience is None or waited.metric != config.best_metric:
        return False
    return waited.validations >= config.patience


def describe_early(step: int, total_steps: int, waited: Waited) -> str:
    """Say that the run has stopped early, why, and how to go on."""
    times = f"{waited.validations} validation{'s' if waited.validations != 1 else ''}"
    best = "it was never a finite number" if waited.best is None else f"the best was {waited.best:.6g} at step {waited.step}"
    why = f"{waited.metric} has not become better in {times} ({best})"
    how = f"to go on, give the same command with trainer.patience={waited.validations * 2}, or without it"
    return f"stopped early after step {step} of {total_steps}: {why}; {how}"
