"""Resuming: finds the checkpoint and the position that a run starts from."""

from pathlib import Path
from typing import Protocol

from verl import dist
from verl.config.shared import TrainerConfig
from verl.data.fingerprint import Fingerprint
from verl.engine import checkpoint
from verl.engine.checkpoint import Position
from verl.errors import UserError
from verl.run import Run


class Rows(Protocol):
    """Training rows: documents, or prompts."""

    @property
    def fingerprint(self) -> Fingerprint: ...

    def __len__(self) -> int: ...


def find_checkpoint(config: TrainerConfig, run: Run) -> Path | None:
    """Find the checkpoint to resume from, and log it as the run's first line.

    Raises:
        UserError: the named checkpoint is damaged, or all checkpoints in the run's directory are.
    """
    root = run.directory
    run.enter("verifying the checkpoints")
    checkpoint.remove_unfinished(root)
    if config.resume_mode == "disable":
        run.say("starting a new run (trainer.resume_mode=disable)")
        return None
    if config.resume_mode == "auto":
        found = checkpoint.newest(root, run.say)
        run.say(f"resuming from {found}" if found else f"starting a new run: no checkpoint in {root} (trainer.resume_mode=auto)")
        return found
    named = Path(str(config.resume_from_path)).expanduser()
    damage = dist.from_main(checkpoint.find_damage(named) if dist.is_main() else None)
    if damage is not None:
        raise UserError(damage, where=f"trainer.resume_from_path={named}", fix="give a complete global_step_N directory")
    run.say(f"resuming from {named} (trainer.resume_mode=resume_path)")
    return named


def begin(config: TrainerConfig, run: Run, rows: Rows, rows_per_step: int, total_steps: int) -> Position | None:
    """Return the position of the run's first step: that of `run.checkpoint`, or step 0. Opens the loggers.

    Args:
        rows_per_step: number of rows per step, over all ranks.
        total_steps: number of steps of the whole run.
    Returns:
        None if all steps are already done, which is logged.
    Raises:
        UserError: the rows or their order differ from the checkpoint's, or a logger cannot be opened.
    """
    start = Position(
        step=0,
        tokens=0,
        supervised_tokens=0,
        rows=len(rows),
        rows_per_step=rows_per_step,
        seed=config.seed,
        data_fingerprint=rows.fingerprint,
    )
    if run.checkpoint is not None:
        from verl.trainer.continuation import continued  # a new run has nothing to compare

        start = continued(start, run.checkpoint, run)
        if start.step >= total_steps:
            run.say(f"nothing left to do: {start.step} of {total_steps} steps are done; to train longer, raise trainer.total_epochs")
            return None
    run.start_logging(start.step, total_steps)
    return start
