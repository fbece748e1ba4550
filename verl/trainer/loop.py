"""The training loop of fine-tuning, reward models and DPO: step, log, validate, save."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from verl.config.shared import TrainerConfig
from verl.data.batch import Batch
from verl.data.documents import Documents
from verl.data.loader import Loader
from verl.engine import checkpoint
from verl.engine.build import Built
from verl.engine.checkpoint import Position
from verl.engine.contract import Algorithm
from verl.engine.engine import Engine
from verl.run import Run
from verl.trainer.meter import Meter

VALIDATION_ROWS = 1024  # validation rows that are packed at a time


def train_loop(
    config: TrainerConfig,
    algorithm: Algorithm,
    loader: Loader,
    validation: Documents | None,
    built: Built,
    start: Position,
    run: Run,
) -> None:
    """In each step, train and log; when due, validate and save."""
    from verl.trainer.oddities import LossWatch  # once in a run
    from verl.trainer.room import check_room

    check_room(config, run, built, steps=run.total_steps - start.step, steps_per_epoch=loader.steps_per_epoch)
    engine, meter, watch = built.engine, Meter(built.engine, start), LossWatch(run)
    steps = loader.steps(start.step, run.total_steps)
    if config.profile_step is not None:
        from verl.trainer.profile import profiled

        steps = profiled(steps, config.profile_step, engine.device, run)
    for step in steps:
        try:
            meter.add(step, engine.train_step(step.micro_batches, algorithm, step.number))
        except (RuntimeError, MemoryError) as error:
            from verl.trainer.memory_errors import step_error

            if (found := step_error(error, step, loader, built, run)) is None:
                raise
            raise found from error
        done = step.number + 1
        ends_epoch, last, stop = done % loader.steps_per_epoch == 0, done == run.total_steps, run.should_stop()
        validates = not stop and due(config.test_freq, done, ends_epoch, last)
        saves = due(config.save_freq, done, ends_epoch, last or stop)
        if note := built.compiler.note():
            run.say(f"step {done}: {note}")
        # Unless the loop pauses, a step's metrics are read while the next step runs, so that the GPU never waits for the host.
        pause = ends_epoch or last or stop or validates or saves
        for number, metrics in meter.finished(wait=pause):
            if validates and number == done and validation is not None:
                metrics |= validate(engine, algorithm, validation, loader)
            run.log(number, metrics)
            watch.see(number, metrics["train/loss"])
        if ends_epoch:
            run.say(meter.end_epoch(step.epoch))
        if saves:
            here = replace(start, step=done, tokens=meter.tokens, supervised_tokens=meter.supervised_tokens)
            keep(checkpoint.save(run.directory, engine, here, built.export), config, run, done, metrics)
        if stop:
            run.leave(done)
        if pause:
            meter.start()


def keep(saved: Path, config: TrainerConfig, run: Run, step: int, metrics: dict[str, float]) -> None:
    """Record a new checkpoint as the run's newest, and remove old ones beyond `trainer.max_ckpt_to_keep`."""
    run.checkpoint = saved
    checkpoint.prune(run.directory, config.max_ckpt_to_keep)
    run.keep_state({"step": step, "total_steps": run.total_steps, "checkpoint": saved.name, "metrics": metrics})
    run.say(f"saved {saved}")


def due(every: int | str, done: int, ends_epoch: bool, last: bool) -> bool:
    """Return whether a periodic action is due after step `done`.

    Args:
        every: number of steps, "epoch" for each epoch, -1 for the end of the run only, or "never".
    """
    if every == "never":
        return False
    return last or (ends_epoch if every == "epoch" else int(every) > 0 and done % int(every) == 0)


def validate(engine: Engine, algorithm: Algorithm, validation: Documents, loader: Loader) -> dict[str, float]:
    """Compute the mean loss and metrics over all validation rows, packed like training rows."""

    def batches() -> Iterator[Batch]:
        for first in range(0, len(validation), VALIDATION_ROWS):
            rows = np.arange(first, min(first + VALIDATION_ROWS, len(validation)))
            yield from loader.micro_batches(validation, rows)

    return {f"val/{name}": float(value) for name, value in engine.evaluate(batches(), algorithm).items()}
