"""Where a run begins: anew, or at the checkpoint that it goes on from."""

from pathlib import Path

from verl import dist
from verl.config.shared import TrainerConfig
from verl.engine import checkpoint
from verl.engine.checkpoint import Position
from verl.errors import UserError
from verl.run import Run


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


def start_position(fresh: Position, resume_from: Path | None) -> Position:
    """Where to start: at `fresh`, step 0 of the rows at hand, or where the checkpoint stands.

    Raises:
        UserError: the rows or their order are not those of the checkpoint.
    """
    if resume_from is None:
        return fresh
    then = checkpoint.read_position(resume_from)
    for what, before, now in (
        ("the training rows", then.data_fingerprint, fresh.data_fingerprint),
        ("rows per step (data.train_batch_size, data.prompts_per_step)", then.rows_per_step, fresh.rows_per_step),
        ("trainer.seed", then.seed, fresh.seed),
    ):
        if before != now:
            raise UserError(
                f"{what} changed from {before} to {now} since this checkpoint",
                where=str(resume_from),
                fix="set it back, or start anew with trainer.resume_mode=disable or another trainer.default_local_dir",
            )
    return then
