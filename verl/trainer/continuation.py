"""Where a run continues after a checkpoint, and whether it may: with the same settings, on the same rows in the same order.

What is compared, and when:

1. Before data is read: the settings that change what is learned, and the models by content. `check_settings`
2. When the rows are tokenized: the rows themselves, their order, and the length of the run. `continued`

trainer.resume_override=true goes on in spite of a difference, which is then said.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from verl import dist
from verl.config.shared import OptimConfig, TrainerConfig
from verl.config.trajectory import CONTENT, LEARNS, LENGTH, MODEL, ROWS, Change, changes, listed
from verl.data.fingerprint import Fingerprint
from verl.directory import decisive, is_continued, settings_beside, settings_of
from verl.engine import checkpoint, restore
from verl.engine.optim import learning_rate
from verl.engine.position import Position
from verl.errors import UserError
from verl.manifest import steps_in
from verl.pace import counted
from verl.run import Run
from verl.trainer.best import Best
from verl.trainer.patience import describe_early

NEW_RUN = "start a new run: trainer.resume_mode=disable trainer.default_local_dir=<a new directory>"
WAYS = f"{NEW_RUN}; or go on from this checkpoint with what is new: trainer.resume_override=true"
# Keys by which a person recognises a run.
MAIN = ("model.partial_pretrain", "data.train_files", "algorithm.name", "model.lora_rank", "optim.lr", "trainer.seed")


# Which checkpoint


def check_empty(root: Path) -> None:
    """Raise UserError if a directory has checkpoints, with which those of a new run would be mixed up."""
    if steps := steps_in(root):
        there = steps[0].name if len(steps) == 1 else f"{steps[0].name} to {steps[-1].name}"
        fix = "set trainer.default_local_dir to a new directory, or move this one away; trainer.resume_mode=auto goes on in it"
        raise UserError(f"has checkpoints of another run ({there}), with which a new run would be mixed up", where=str(root), fix=fix)


def find_named(config: TrainerConfig, run: Run) -> tuple[Path, str]:
    """Return the checkpoint to resume from with trainer.resume_from_path, and the run's first line.

    A run that has started from it before, and was interrupted, goes on from its own newest checkpoint.

    Raises:
        UserError: on all ranks: the checkpoint is damaged, or the run's directory has checkpoints that do not come before it.
    """
    named, root = Path(str(config.resume_from_path)).expanduser(), run.directory
    dist.together(lambda: _check_named(named, root, config) if dist.is_main() else None)
    named = Path(os.path.realpath(named)) if named.is_symlink() else named  # `best` will point at another one
    if dist.from_main(named.parent.resolve() != root.resolve() and bool(steps_in(root))) and (own := checkpoint.newest(root, run.say)):
        return own, f"resuming from {own}, which this run has written since it started from {named} (trainer.resume_mode=resume_path)"
    return named, f"resuming from {named} (trainer.resume_mode=resume_path)"


def _check_named(named: Path, root: Path, config: TrainerConfig) -> None:
    damage = checkpoint.find_damage(named)
    if damage is not None:
        raise UserError(damage, where=f"trainer.resume_from_path={named}", fix="give a complete global_step_N directory")
    named, steps = named.resolve(), steps_in(root)  # a link, such as `best`, is the checkpoint that it points at
    if named.parent == root.resolve():
        names = [path.name for path in steps]
        if named.name in names and (later := names[names.index(named.name) + 1 :]):
            fix = "continue in a new directory: set trainer.default_local_dir; or move the later ones away"
            what = f"has later checkpoints than {named.name}, up to {later[-1]}; those of this run would be mixed up with them"
            raise UserError(what, where=str(root), fix=fix)
    elif steps and not is_continued(root, config):
        check_empty(root)


# The same settings


def check_settings(path: Path, run: Run) -> None:
    """Compare this run's settings with those of the checkpoint that it is to resume from, before data is read. Every rank calls it.

    Raises:
        UserError: on all ranks: a key that changes what is learned differs.
    """
    dist.together(lambda: _check_settings(path, run) if dist.is_main() else None)


def _check_settings(path: Path, run: Run) -> None:
    before, now = settings_beside(path), settings_of(run.settings)
    if not before:
        run.notes.append(f"warning: {path} does not record its settings, because an older version wrote it; they are not compared")
    found = changes(before, now)
    if others := [change for change in found if change.key == "command"]:  # also with trainer.resume_override
        raise UserError(f"another command wrote this checkpoint:\n{listed(others)}", where=str(path), fix=NEW_RUN)
    if edited := [change.key.removeprefix(CONTENT) for change in found if not change.kind]:
        files = ", ".join(f"{key}={json.loads(now[key])}" for key in edited)
        run.notes.append(f"warning: {files} has been edited since this checkpoint; the run goes on with it as it is now")
    if any(change.kind in (LEARNS, MODEL) for change in found):
        _refuse_or_say("this run has other settings than the run that wrote this checkpoint", decisive(found), path, run)


def _refuse_or_say(what: str, found: Sequence[Change], path: Path, run: Run) -> None:
    """Raise UserError that lists the changes, or with trainer.resume_override note them."""
    text = f"{what}:\n{listed(found)}" if found else what
    if not run.settings.trainer.resume_override:
        raise UserError(text, where=str(path), fix=WAYS)
    run.notes.append(f"warning: {text}\n  The run goes on with what is new (trainer.resume_override=true)")


# The same rows, order and length


def continued(fresh: Position, path: Path, run: Run) -> Position:
    """Return the position of the checkpoint in the rows of this run.

    Args:
        fresh: position of the same run without a checkpoint.
    Raises:
        UserError: the rows, their order or the length of the run have changed since.
    """
    saved = restore.read_position(path)
    found = changes(dist.from_main(settings_beside(path)), fresh.settings)
    run.notes.clear()
    read = [CONTENT + key for key in ("model.partial_pretrain", "teacher.partial_pretrain")]  # of the Hub, now that they are read
    models = [change for change in found if change.key in read]
    if models and not run.settings.trainer.resume_override:
        _refuse_or_say("the model has changed since this checkpoint", models, path, run)
    words = _changed_rows(fresh, saved, path, run) or _changed_order(fresh, saved)
    if words is not None:
        _refuse_or_say(f"{words} since this checkpoint", [change for change in found if change.kind == ROWS], path, run)
    else:
        _say_length(fresh, saved, [change for change in found if change.kind == LENGTH], run)
    for note in run.notes:
        run.say(note)
    return replace(
        saved,
        data_fingerprint=fresh.data_fingerprint,
        **{name: getattr(fresh, name) for name in ("rows", "rows_per_step", "seed", "settings", "total_steps")},
    )


def _changed_order(fresh: Position, saved: Position) -> str | None:
    for what, before, now in (
        ("the number of rows per step (data.train_batch_size, data.prompts_per_step)", saved.rows_per_step, fresh.rows_per_step),
        ("trainer.seed", saved.seed, fresh.seed),
    ):
        if before != now:
            return f"{what} changed from {before} to {now}"
    return None


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


def _say_length(fresh: Position, saved: Position, found: Sequence[Change], run: Run) -> None:
    """Say that the number of steps has changed, and whether the learning rate depends on it. To train longer is no other experiment."""
    before, now = saved.total_steps, fresh.total_steps
    if before == now or (before == 0 and not found):
        return
    optimizers = {"optim": run.settings.optim}
    if (critic := getattr(run.settings, "critic", None)) is not None:
        optimizers["critic.optim"] = critic.optim
    for key, optim in optimizers.items():
        if before == 0 or (step := _first_other_rate(optim, before, now)) is not None:
            rates = "" if before == 0 else _rates(optim, before, now, step or 0)
            what = f"this run has {counted(now, 'step')}, and the run of this checkpoint {before or 'another number of'}"
            run.say(f"warning: {what}: from here on, its learning rate ({key}.lr_scheduler={optim.lr_scheduler}) is another one{rates}")
            return
    run.say(f"the run now has {counted(now, 'step')} in place of {before:,}; the learning rates so far do not depend on it")


def _first_other_rate(optim: OptimConfig, before: int, now: int) -> int | None:
    """Return the first step, counted from 0, whose learning rate depends on the length of the run; None if there is none in both."""
    old, new = learning_rate(optim, before), learning_rate(optim, now)
    return next((step for step in range(min(before, now)) if old(step) != new(step)), None)


def _rates(optim: OptimConfig, before: int, now: int, first: int) -> str:
    last = max(first, min(before, now) - 1)
    return f" (of step {last + 1}: {learning_rate(optim, before)(last):.3g} -> {learning_rate(optim, now)(last):.3g})"


def complete(done: Position, config: TrainerConfig, run: Run) -> None:
    """Say that all steps are done or the run has stopped early, and do what is done after the last save: a kill may have come before it."""
    is_early = done.step < done.total_steps and done.waited is not None
    run.say(describe_early(done.step, done.total_steps, done.waited) if is_early and done.waited else nothing_left(done, run.directory))
    assert run.checkpoint is not None
    best = None if config.best_metric is None else Best(config, run, None)
    needed = {run.checkpoint} if best is None or best.path is None else {run.checkpoint, best.path}
    checkpoint.prune(run.directory, config.max_ckpt_to_keep, good={run.checkpoint}, needed=needed, say=run.say)


def nothing_left(done: Position, directory: Path) -> str:
    """Say that all steps are done, with which settings, and how to go on: in the default place, other settings start a new run."""
    known = {key: json.loads(value) for key, value in done.settings.items()}
    main = ", ".join(f"{key}={known[key]}" for key in MAIN if known.get(key) not in (None, 0))
    longer = "to go on from here, raise trainer.total_epochs or trainer.total_training_steps, and name the directory too: "
    longer += f"trainer.default_local_dir={directory}"
    return f"nothing left to do: {done.step} of {done.total_steps} steps are done ({main}); {longer}"
