"""Where a run continues after a checkpoint. It must train the same rows in the same order as the run that wrote the checkpoint."""

from dataclasses import replace
from pathlib import Path

from verl.data.fingerprint import Fingerprint
from verl.engine import restore
from verl.engine.position import Position
from verl.errors import UserError
from verl.run import Run


def continued(fresh: Position, path: Path, run: Run) -> Position:
    """Return the position of the checkpoint in the rows of this run.

    Args:
        fresh: position of the same run without a checkpoint.
    Raises:
        UserError: the rows or their order have changed since.
    """
    saved = restore.read_position(path)
    changed = _changed_rows(fresh, saved, path, run) or next(
        (
            f"{what} changed from {before} to {now}"
            for what, before, now in (
                ("the number of rows per step (data.train_batch_size, data.prompts_per_step)", saved.rows_per_step, fresh.rows_per_step),
                ("trainer.seed", saved.seed, fresh.seed),
            )
            if before != now
        ),
        None,
    )
    if changed is not None:
        fix = "undo the change, or start a new run with trainer.resume_mode=disable or another trainer.default_local_dir"
        raise UserError(f"{changed} since this checkpoint", where=str(path), fix=fix)
    return replace(saved, data_fingerprint=fresh.data_fingerprint)


def _changed_rows(fresh: Position, saved: Position, path: Path, run: Run) -> str | None:
    """Say how the training rows have changed since the checkpoint; None if the same is trained in the same order.

    Of a checkpoint that does not record what it has trained, because an older version wrote it, only the number of rows is compared.
    """
    assert isinstance(fresh.data_fingerprint, Fingerprint)
    if isinstance(saved.data_fingerprint, Fingerprint):
        difference = saved.data_fingerprint.difference(fresh.data_fingerprint)
        return f"the training rows changed ({difference})" if difference else None
    if saved.rows != fresh.rows:
        return f"the training rows changed ({saved.rows:,} then, {fresh.rows:,} now)"
    run.say(
        f"warning: {path} does not record the tokens of its rows, because an older version wrote it. Its number of rows, rows per step and "
        "seed are compared, but not what the rows contain"
    )
    return None
