"""Checkpoints: Hugging Face directories from which a run can resume, committed by rename.

    global_step_N/
      config.json  generation_config.json  model*.safetensors  tokenizer*  chat_template.jinja   (LoRA: adapter_*)
      manifest.json       size and sha256 of each file
      trainer/            trained weights and optimizer (torch.distributed.checkpoint, readable at any world size),
                          state.json (step and data position), rng_R.safetensors (random states of rank R)
      critic/             Hugging Face files of the critic, if the method has one; its optimizer is in trainer/critic/

A directory is written under a temporary name, flushed to disk and renamed, so a directory with the final name is complete.
"""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Protocol

from verl import dist
from verl.engine import damage
from verl.engine.draft import LATEST as LATEST
from verl.engine.draft import Draft, Written, random_states, remove
from verl.engine.engine import Engine
from verl.engine.optim import optimizer_state
from verl.engine.position import Position as Position
from verl.engine.stored_state import StoredState, local_tensors
from verl.errors import DiskError, UserError
from verl.manifest import STEP, steps_in


class SavedCritic(Protocol):
    """A second engine of a run, with a function that writes its Hugging Face files."""

    @property
    def engine(self) -> Engine: ...

    def export(self, directory: Path) -> None: ...


def save(
    root: Path,
    engine: Engine,
    position: Position,
    export: Callable[[Path], None],
    critic: SavedCritic | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Write and commit `global_step_N`. Every rank calls it.

    Args:
        root: the run's directory.
        export: writes the Hugging Face files into a directory; called on every rank.
        critic: saved too, in a separate directory.
        say: prints a message, on rank 0.
    Returns:
        the committed directory.
    Raises:
        DiskError: on all ranks: the disk is full or fails. Earlier checkpoints remain.
    """
    states = states_of(engine, critic)
    draft = Draft(root, position, {folder: StoredState.planned(state) for folder, state in states.items()}, say)
    draft.begin()
    draft.together(lambda: export(draft.temporary))
    if critic is not None:
        draft.together(lambda: critic.export(draft.temporary / "critic"))
    written: list[Written] = []
    tensors = {folder: local_tensors(state) for folder, state in states.items()}
    draft.together(lambda: written.append(draft.write(tensors, random_states(engine.device))))
    of_ranks = dist.gathered(written[0])
    draft.together(lambda: draft.commit(of_ranks) if dist.is_main() else None)
    return draft.final


def states_of(engine: Engine, critic: SavedCritic | None) -> dict[str, dict[str, Any]]:
    """Return the trained weights and the optimizer state of each model, by its folder in a checkpoint."""
    return {"trainer": state_of(engine), **({} if critic is None else {"trainer/critic": state_of(critic.engine)})}


def state_of(engine: Engine) -> dict[str, Any]:
    """Return the trained weights and the optimizer state by parameter name. Frozen weights are not saved; they come from the base model.

    The engine owns these tensors, so loading into them restores it.
    """
    trained = engine.weights.trained
    optimizer = {name: optimizer_state(engine.optimizer, parameter) for name, parameter in trained.items()}
    return {"model": {name: p.detach() for name, p in trained.items()}, "optimizer": optimizer}


def newest(root: Path, say: Callable[[str], None]) -> Path | None:
    """Return the newest committed checkpoint under `root` that is as it was written. Rank 0 checks, and all ranks get the result.

    Damaged checkpoints are skipped, and the reason is said.

    Raises:
        UserError: there are checkpoints, but all are damaged.
    """
    found = dist.from_main(damage.find_newest(root, say) if dist.is_main() else None)
    if isinstance(found, UserError):
        raise found
    return found


def find_damage(directory: Path, *, hashes: bool = True) -> str | None:
    """Return what is wrong with a checkpoint, in one line, or None. Without `hashes`, only names and sizes are compared."""
    return damage.find_damage(directory, hashes=hashes)


def committed(root: Path) -> list[Path]:
    """Return the committed checkpoints of a run's directory, oldest first."""
    return [path for path in steps_in(root) if damage.oddity(path) is None]


def prune(
    root: Path, keep: int | None, *, good: Collection[Path] = (), needed: Collection[Path] = (), say: Callable[[str], None] = print
) -> None:
    """Delete all but the newest `keep` checkpoints that are as they were written; None or -1 keeps all.

    Damaged checkpoints neither count nor are deleted; they are named. Call it only after the newest one is committed.

    Args:
        good: checkpoints that are known to be good, because this run has written or verified them.
        needed: checkpoints that are kept in any case.
    """
    if keep is None or keep == -1 or not dist.is_main():
        return
    kept = 0
    for directory in reversed(committed(root)):
        enough = kept >= keep
        found = None if directory in good else damage.find_damage(directory, hashes=not enough)
        if found is not None:
            say(f"{directory.name} is damaged ({found}): it does not count for trainer.max_ckpt_to_keep, and is not deleted")
        elif enough and directory not in needed:
            try:
                _delete(directory)
            except OSError as error:  # no reason to end a run
                say(f"{directory.name} cannot be deleted: {error.strerror or error}")
        else:
            kept += 1


def _delete(directory: Path) -> None:
    """Delete a checkpoint. It first loses its name, so that one that is deleted by half is not taken for a damaged one."""
    unnamed = directory.with_name(f"{directory.name}.tmp")
    remove(unnamed)
    directory.rename(unnamed)
    remove(unnamed)


def remove_unfinished(root: Path) -> None:
    """Delete unfinished checkpoints that a killed run left behind. Raises DiskError: one cannot be deleted."""
    if not dist.is_main():
        return
    try:
        for path in root.glob("global_step_*.tmp"):
            if STEP.fullmatch(path.stem):  # another name is a user's own
                remove(path)
    except OSError as error:
        where, fix = error.filename or str(root), "delete it, or set trainer.default_local_dir to another directory"
        raise DiskError(f"cannot be deleted: {error.strerror or error}", where=where, fix=fix) from error
