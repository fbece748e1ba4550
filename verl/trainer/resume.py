"""Resuming: finds the checkpoint and the position that a run starts from."""

from pathlib import Path
from typing import Protocol

from verl import dist
from verl.config.shared import TrainerConfig
from verl.data.fingerprint import Fingerprint
from verl.engine.position import Position
from verl.run import Run


class Rows(Protocol):
    """Training rows: documents, or prompts."""

    @property
    def fingerprint(self) -> Fingerprint: ...

    def __len__(self) -> int: ...


def find_checkpoint(config: TrainerConfig, run: Run) -> Path | None:
    """Find the checkpoint to resume from, and log it as the run's first line.

    Raises:
        UserError: the named checkpoint is damaged, or all checkpoints in the run's directory are; they are another run's; or the
            settings differ from those of the checkpoint.
    """
    from verl.engine import checkpoint

    root, why = run.directory, f": {run.origin}" if run.origin else ""
    run.enter("verifying the checkpoints")
    checkpoint.remove_unfinished(root)  # this run has the lock, so nobody is writing them
    if config.resume_mode == "disable":
        from verl.trainer.continuation import check_empty

        dist.together(lambda: check_empty(root))
        found, line = None, f"starting a new run in {root} (trainer.resume_mode=disable){why}"
    elif config.resume_mode == "resume_path":
        from verl.trainer.continuation import find_named

        found, line = find_named(config, run)
    else:
        found = checkpoint.newest(root, run.say)
        new = f"starting a new run in {root}{why}" if why else f"starting a new run: no checkpoint in {root} (trainer.resume_mode=auto)"
        line = f"resuming from {found}{why}" if found else new
    if found is not None:
        from verl.trainer.continuation import check_settings  # a new run has nothing to compare

        check_settings(found, run)
    for text in (line, *run.notes):
        run.say(text)
    return found


def begin(config: TrainerConfig, run: Run, rows: Rows, rows_per_step: int, total_steps: int) -> Position | None:
    """Return the position of the run's first step: that of `run.checkpoint`, or step 0. Opens the loggers.

    Args:
        rows_per_step: number of rows per step, over all ranks.
        total_steps: number of steps of the whole run.
    Returns:
        None if all steps are already done, or the run has stopped early, which is logged.
    Raises:
        UserError: the rows, their order or the length of the run differ from the checkpoint's, or a logger cannot be opened.
    """
    from verl.cores import take  # once in a run
    from verl.directory import settings_of

    take(run.say, run.directory if run.checkpoint is not None else None)

    start = Position(
        step=0,
        tokens=0,
        supervised_tokens=0,
        rows=len(rows),
        rows_per_step=rows_per_step,
        seed=config.seed,
        data_fingerprint=rows.fingerprint,
        settings=dist.from_main(settings_of(run.settings) if dist.is_main() else {}),
        total_steps=total_steps,
    )
    if run.checkpoint is not None:
        from verl.trainer.continuation import complete, continued
        from verl.trainer.patience import has_stopped_early

        start = continued(start, run.checkpoint, run)
        if start.step >= total_steps or has_stopped_early(start, config):
            complete(start, config, run)
            return None
    run.start_logging(start.step, total_steps)
    return start
