"""The training loop of fine-tuning, reward models and DPO: step, log, validate, save."""

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from verl.config.shared import TrainerConfig
from verl.data.loader import Loader, Step
from verl.engine.build import Built
from verl.engine.contract import Algorithm
from verl.engine.engine import Engine
from verl.engine.position import Position
from verl.run import Run
from verl.trainer.meter import Meter

if TYPE_CHECKING:
    from verl.trainer.saving import Saver
    from verl.trainer.validation import Validation


def train_loop(
    config: TrainerConfig,
    algorithm: Algorithm,
    loader: Loader,
    validation: "Validation | None",
    built: Built,
    start: Position,
    run: Run,
    saver: "Saver",
) -> None:
    """In each step, train and log; when due, validate and save."""
    from verl.trainer.memory_errors import memory_errors_named  # once in a run
    from verl.trainer.oddities import LossWatch
    from verl.trainer.room import check_room

    check_room(config, run, built, steps=run.total_steps - start.step, steps_per_epoch=loader.steps_per_epoch)
    if validation is not None:
        saver.check_metric(lambda: validation.names(start.step))
    engine, meter, watch = built.engine, Meter(built.engine, start), LossWatch(run)
    engine.set_skipped(start.skipped)
    steps = _profiled(loader.steps(start.step, run.total_steps), config, engine, run)
    run.enter("training", start.step + 1, limited=True)
    for step in steps:
        run.enter("training", step.number + 1, limited=True)
        with memory_errors_named(step, loader, built, run):
            meter.add(step, engine.train_step(step.micro_batches, algorithm, step.number))
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
                metrics |= validation.measure(done)
                stop = run.should_stop()
                saves = saver.weigh(done, metrics) or saves or due(config.save_freq, done, ends_epoch, stop)
            run.enter("logging", done)
            run.log(number, metrics)
            if meter.skipped_in_a_row:
                from verl.trainer.skipped import report  # few runs need it

                report(number, metrics, meter.skipped_in_a_row, config.max_nonfinite_steps, loader, built.tokenizer, run)
            watch.see(number, metrics["train/loss"])
        if ends_epoch:
            run.line(meter.end_epoch(step.epoch), "epoch", is_last=last)
        saver.poll()
        if saves:
            here = replace(start, step=done, tokens=meter.tokens, supervised_tokens=meter.supervised_tokens, skipped=engine.skipped)
            saver.save(here, metrics)
        if stop:
            saver.finish()
            run.leave(done)
        if saver.ends_early:
            break
        if pause:
            meter.start()


def _profiled(steps: Iterator[Step], config: TrainerConfig, engine: Engine, run: Run) -> Iterator[Step]:
    if config.profile_step is None:
        return steps
    from verl.trainer.profile import profiled  # few runs need it

    return profiled(steps, config.profile_step, engine.device, run)


def due(every: int | str, done: int, ends_epoch: bool, last: bool) -> bool:
    """Return whether a periodic action is due after step `done`.

    Args:
        every: number of steps, "epoch" for each epoch, -1 for the end of the run only, or "never".
    """
    if every == "never":
        return False
    return last or (ends_epoch if every == "epoch" else int(every) > 0 and done % int(every) == 0)
