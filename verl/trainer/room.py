"""Before a run trains: whether its checkpoints will fit on the disk."""

from pathlib import Path

from verl import dist
from verl.config.shared import TrainerConfig
from verl.disk import free_bytes, size_text
from verl.engine.build import Built
from verl.engine.build_heads import Critic
from verl.engine.checkpoint import committed
from verl.engine.checkpoint_size import checkpoint_bytes
from verl.errors import UserError
from verl.pace import counted
from verl.run import Run

BESIDES = 16 * 2**20  # bytes of the tokenizer, metrics and logs


def check_room(config: TrainerConfig, run: Run, built: Built, critic: Critic | None = None, *, steps: int, steps_per_epoch: int) -> None:
    """Compare what the run will write with the free space, and warn if only some of its checkpoints will fit. Every rank calls it.

    Args:
        built, critic: what a checkpoint holds.
        steps: optimizer steps that are left.
        steps_per_epoch: optimizer steps of an epoch.
    Raises:
        UserError: on all ranks: not even one checkpoint fits.
    """
    if config.save_freq == "never":
        return
    each = checkpoint_bytes(built, critic)
    saves = number_of_saves(config.save_freq, steps, steps_per_epoch)
    found: list[str] = []

    def compare() -> None:
        if dist.is_main() and (warning := compared(config, run.directory, each, saves)) is not None:
            found.append(warning)

    dist.together(compare)
    for warning in found:
        run.say(warning)


def compared(config: TrainerConfig, directory: Path, each: int, saves: int) -> str | None:
    """Return a warning if the disk has less room than the run's checkpoints will take together; None if they fit.

    Raises:
        UserError: not even one fits.
    """
    free = free_bytes(directory)
    if free is None or saves == 0:
        return None
    if each > free:  # what is beside the weights is small, and not known exactly
        what = f"no space on the disk for a checkpoint: {size_text(each)} needed, {size_text(free)} free"
        fix = (
            "make room; or set trainer.default_local_dir to a directory on another disk; or train adapters, whose checkpoints are small "
            "(model.lora_rank=32); or set trainer.save_freq=never to save nothing"
        )
        raise UserError(what, where=str(directory), fix=fix)
    many = number_of_new(config.max_ckpt_to_keep, saves, len(committed(directory)))
    if many * each + BESIDES <= free:
        return None
    fits = max(1, (free - BESIDES) // each)
    return (
        f"warning: {directory}: {counted(many, 'checkpoint')} of {size_text(each)} will not fit on the disk: "
        f"{size_text(many * each)} needed, {size_text(free)} free\n  fix: keep fewer of them with "
        f"trainer.max_ckpt_to_keep={max(1, fits - 1)}, save less often with "
        "trainer.save_freq, make room, or set trainer.default_local_dir to a directory on another disk"
    )


def number_of_saves(every: int | str, steps: int, steps_per_epoch: int) -> int:
    """Return how often a run saves, which it always does at its end."""
    if every == -1:
        return 1
    between = steps_per_epoch if every == "epoch" else int(every)
    return -(-steps // between)


def number_of_new(keep: int | None, saves: int, existing: int) -> int:
    """Return how many checkpoints the disk must hold besides those that are there now. An old one is removed only after the new one."""
    if keep is None or keep == -1:
        return saves
    return max(1, min(saves, keep + 1 - min(existing, keep)))
