"""Saves the checkpoints of a run, at once or beside training, and keeps those that the config asks for."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import torch

from verl.config.shared import TrainerConfig
from verl.cores import THREADS
from verl.engine import checkpoint
from verl.engine.background import Background, SavedModel
from verl.engine.position import Position
from verl.run import Run
from verl.trainer.best import Best, rows_of
from verl.trainer.patience import Patience, describe_early
from verl.trainer.resume import Rows


class Saver:
    """Saves checkpoints, as a context manager, at whose end the last one is waited for. Every rank calls its methods, after the same steps.

    Args:
        actor: the trained model.
        critic: saved too, if the method has one.
        validation: the rows of the validation, if there are any.
    Raises:
        UserError: this machine does not have the memory for trainer.async_save.
    """

    def __init__(
        self, config: TrainerConfig, run: Run, actor: SavedModel, critic: SavedModel | None = None, *, validation: Rows | None = None
    ):
        self._config, self._run, self._actor, self._critic = config, run, actor, critic
        self._rows = "" if validation is None else rows_of(validation.fingerprint)
        self._good = set() if run.checkpoint is None else {run.checkpoint}
        self._best = None if config.best_metric is None else Best(config, run, self._rows)
        self._patience = None if config.patience is None else Patience(config, run, self._rows)
        is_async = config.async_save and config.save_freq != "never"
        self._background = Background(run.directory, actor, critic, run.say) if is_async else None
        self._metrics: Mapping[str, float] = {}  # of the step whose checkpoint is being written

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        try:
            if error is None:
                self.finish()
                self._say_early()
        finally:
            if self._background is not None:
                self._background.close()

    def check_metric(self, validated: Callable[[], Mapping[str, float]]) -> None:
        """Raise UserError if trainer.best_metric is none of the metrics of the validation; it is called only if one is named."""
        if self._best is not None:
            self._best.check_names(validated())

    def weigh(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Take note of a step's metrics. Every rank calls it, once a step at most.

        Returns:
            whether the step is to be saved even where no save is due: it has the best validation so far, or the run ends early with it.
        """
        self.poll()
        if self._patience is not None:
            self._patience.weigh(step, metrics)
        being_written = self._metrics if self._background is not None and self._background.is_busy else {}
        return self.ends_early or (self._best is not None and self._best.improves(metrics, being_written))

    @property
    def ends_early(self) -> bool:
        """Return whether trainer.patience is used up."""
        return self._patience is not None and self._patience.is_over

    def save(self, position: Position, metrics: dict[str, float]) -> None:
        """Save a checkpoint of the current weights. With trainer.async_save, only the copy is waited for, and a save before.

        Raises:
            DiskError: on all ranks: the disk is full or fails.
        """
        self._run.enter("saving", position.step)
        self.finish()
        validated = {name: value for name, value in metrics.items() if name.startswith("val/") and math.isfinite(value)}
        waited = None if self._patience is None else self._patience.waited
        position = replace(position, validation=validated, validation_rows=self._rows if validated else "", waited=waited)
        if self._background is None:
            export, critic, say = self._actor.export, self._critic, self._run.say
            saved = checkpoint.save(self._run.owned(), self._actor.engine, position, export, critic, say)
            self._keep(saved, metrics)
        else:
            self._metrics = metrics
            self._run.owned()
            self._background.start(position)

    def poll(self) -> None:
        """Take note of a save that has been done meanwhile. Raises DiskError on all ranks if it failed."""
        self._advance(until_done=False)

    def finish(self) -> None:
        """Wait for the save that is being written. Raises DiskError on all ranks if it failed."""
        self._advance(until_done=True)

    def _say_early(self) -> None:
        if self._patience is not None and self._patience.is_over and self._run.step < self._run.total_steps:
            self._run.say(describe_early(self._run.step, self._run.total_steps, self._patience.waited))

    def _advance(self, *, until_done: bool) -> None:
        if self._background is not None and self._background.is_busy:
            saved = self._background.advance(until_done=until_done)
            if saved is not None:
                self._keep(saved, self._metrics)

    def _keep(self, saved: Path, metrics: Mapping[str, float]) -> None:
        """Record a new checkpoint as the run's newest, and remove old ones beyond `trainer.max_ckpt_to_keep`."""
        run, step = self._run, int(saved.name.rpartition("_")[2])
        run.checkpoint = saved
        self._good.add(saved)
        if self._best is not None:
            self._best.keep(saved, metrics)
        needed = {saved} if self._best is None or self._best.path is None else {saved, self._best.path}
        checkpoint.prune(run.directory, self._config.max_ckpt_to_keep, good=self._good, needed=needed, say=run.say)
        state = {"step": step, "total_steps": run.total_steps, "checkpoint": saved.name, "metrics": metrics}
        run.keep_state({**state, THREADS: torch.get_num_threads()})
        run.line(f"saved {saved}", "saved", is_last=step == run.total_steps)
