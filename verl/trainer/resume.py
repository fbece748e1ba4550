"""Where a run starts: from scratch, or from a checkpoint."""

from pathlib import Path
from typing import Protocol

from verl import dist
from verl.config.shared import TrainerConfig
from verl.engine import checkpoint
from verl.engine.checkpoint import Position
from verl.errors import UserError
from verl.run import Run


class Rows(Protocol):
    """What a run is trained on: documents, or prompts."""

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...


def find_checkpoint(config: TrainerConfig, run: Run) -> Path | None:
    """The checkpoint to go on from; says so, as the run's first line.

    Raises:
        UserError: the named one is damaged, or all in the run's directory are.
    """
    root = run.directory
    checkpoint.remove_unfinished(root)
    if config.resume_mode == "disable":
        run.say("starting anew (trainer.resume_mode=disable)")
        return None
    if config.resume_mode == "auto":
        found = checkpoint.newest(root, run.say)
        run.say(f"going on from {found}" if found else f"starting anew: no checkpoint in {root} (trainer.resume_mode=auto)")
        return found
    named = Path(str(config.resume_from_path)).expanduser()
    damage = dist.from_main(checkpoint.find_damage(named) if dist.is_main() else None)
    if damage is not None:
        raise UserError(damage, where=f"trainer.resume_from_path={named}", fix="give a whole global_step_N directory")
    run.say(f"going on from {named} (trainer.resume_mode=resume_path)")
    return named


def begin(config: TrainerConfig, run: Run, rows: Rows, rows_per_step: int, total_steps: int) -> Position | None:
    """Where the run's first step stands: at the beginning of the rows, or where `run.checkpoint` left off. Opens the loggers.

    Args:
        rows_per_step: over all ranks.
        total_steps: of the whole run.
    Returns:
        None: all steps are done already, and it says so.
    Raises:
        UserError: the rows or their order are not those of the checkpoint, or a logger cannot be opened.
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
        start = _same_rows(start, checkpoint.read_position(run.checkpoint), run.checkpoint)
        if start.step >= total_steps:
            run.say(f"nothing left to do: {start.step} of {total_steps} steps are done (more with trainer.total_epochs)")
            return None
    run.start_logging(start.step, total_steps)
    return start


def _same_rows(fresh: Position, then: Position, path: Path) -> Position:
    """The checkpoint's position, if it takes its rows from the data at hand in the same order."""
    for what, before, now in (
        ("the training rows", then.data_fingerprint, fresh.data_fingerprint),
        ("rows per step (data.train_batch_size, data.prompts_per_step)", then.rows_per_step, fresh.rows_per_step),
        ("trainer.seed", then.seed, fresh.seed),
    ):
        if before != now:
            raise UserError(
                f"{what} changed from {before} to {now} since this checkpoint",
                where=str(path),
                fix="set it back, or start anew with trainer.resume_mode=disable or another trainer.default_local_dir",
            )
    return then
