"""A run's directory in place of a checkpoint: the newest complete one in it is taken, or with `--best` the best one, and this is said."""

import math
import os
import shlex
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from verl.errors import UserError
from verl.manifest import MANIFEST, check_sizes, find_files, read_manifest, steps_in
from verl.parent import LAUNCHER
from verl.typed_json import DamageError, read_json

RESULTS = "results.json"  # of an evaluation
BEST_FILE = "best_checkpoint.json"
# Keys that name a checkpoint.
KEYS = (
    "model.partial_pretrain",
    "model.lora_adapter_path",
    "critic.partial_pretrain",
    "reward_model.path",
    "trainer.resume_from_path",
    "model_path",
    "source",
    "against",
)
MOST_NAMED = 3  # runs of a folder
_MODELS = ("config.json", "adapter_config.json")
_said: set[str] = set()  # a command reads its config twice


def name_checkpoints(config: object, *, best: bool = False) -> None:
    """Replace each run's directory in a config by the checkpoint that it stands for.

    Raises:
        UserError: a run's directory has no complete checkpoint, or no best one; or `best` is asked for, and no key names a run's directory.
    """
    found = 0
    for key in KEYS:
        *path, name = key.split(".")
        group = config
        for part in path:
            group = getattr(group, part, None)
        value = getattr(group, name, None)
        if key == "against" and (Path(str(value)).expanduser() / RESULTS).is_file():
            continue  # an evaluation, which may be in a run's directory
        given = value if isinstance(value, list) else [value]
        of_runs = [isinstance(one, str) and is_run_directory(one) for one in given]
        if any(of_runs):
            taken = [checkpoint_in(one, key, best=best) if is_run else one for one, is_run in zip(given, of_runs, strict=True)]
            setattr(group, name, taken if isinstance(value, list) else taken[0])
            found += 1
    if best and not found:
        key = next(key for key in ("model_path", "source", KEYS[0]) if "." in key or hasattr(config, key))
        fix = f"give the directory that has the checkpoints, such as {key}=checkpoints/verl-sft/run"
        raise UserError("no key names a run's directory", where="--best", fix=fix)


def is_run_directory(name: str) -> bool:
    """Return whether a name is that of a local directory with checkpoints or a run's log, and without a model of its own."""
    folder = Path(name).expanduser()
    if not folder.is_dir() or any((folder / model).is_file() for model in _MODELS):
        return False
    return bool(steps_in(folder)) or ((folder / "config.yaml").is_file() and (folder / "train.log").is_file())


def runs_in(name: str) -> list[Path]:
    """Return the directories of runs in a folder and in its folders, such as checkpoints/verl-sft/run in checkpoints; the newest first."""
    found = list[Path]()
    with suppress(OSError):
        for child in Path(name).expanduser().iterdir():
            inside = [child] if is_run_directory(str(child)) else list(child.iterdir()) if child.is_dir() and not child.is_symlink() else []
            found += [path for path in inside if is_run_directory(str(path))]
    return sorted(found, key=_last_written, reverse=True)


def folder_of_runs(name: str, command: Callable[[str], str]) -> UserError | None:
    """Return the error of a folder that holds runs, in place of the directory of one; None if it holds none.

    Args:
        command: returns what to write, of one of the runs.
    """
    if not (found := runs_in(name)):
        return None
    runs, saved = [str(run) for run in found], next((run for run in found if steps_in(run)), found[0])
    more = f" and {len(runs) - MOST_NAMED} more" if len(runs) > MOST_NAMED else ""
    what = f"is a folder of runs: {', '.join(runs[:MOST_NAMED])}{more}{', the newest first' if len(runs) > 1 else ''}"
    return UserError(what, where=name, fix=f"name one of them: {command(shlex.quote(str(saved)))}")


def _last_written(run: Path) -> float:
    """Return when the newest file of a run was written, by its log, its metrics and its checkpoints."""
    with suppress(OSError):
        return max(path.stat().st_mtime for path in [run / "train.log", run / "metrics.jsonl", *steps_in(run)] if path.exists())
    return 0.0


def checkpoint_in(name: str, key: str, *, best: bool = False) -> str:
    """Return the path of the checkpoint that a run's directory stands for, and say on standard error which it is.

    Raises:
        UserError: there is none.
    """
    folder, place = Path(name).expanduser(), f"{key}={name}"
    left_out, complete = dict[str, str](), list[Path]()
    for step in reversed(steps_in(folder)):
        damage = _damage(step)
        if damage is None:
            complete.append(step)
            if not best:
                break
        else:
            left_out[step.name] = damage
    if not complete:
        found = "; ".join(f"{step}: {damage}" for step, damage in left_out.items()) or "the run has saved none"
        fix = "run its command again: it goes on, and saves one; or give another directory"
        raise UserError(f"is a run's directory without a complete checkpoint ({found})", where=place, fix=fix)
    chosen, what = _best(folder, complete, place) if best else (complete[0], "its newest complete checkpoint")
    skipped = "".join(f"; {step} is damaged ({damage})" for step, damage in left_out.items())
    _say(f"{place} is a run's directory: taking {what}, {chosen.name}{skipped}")
    return str(Path(name) / chosen.name)


def _damage(step: Path) -> str | None:
    """Return what is wrong with a checkpoint, by the names and sizes of its files; None if it is complete."""
    if not step.is_dir():
        return "no directory"
    if not os.path.lexists(step / MANIFEST) and any((step / model).is_file() for model in _MODELS):
        return None  # a model that somebody has changed knowingly
    try:
        check_sizes(read_manifest(step).files, find_files(step))
    except (DamageError, OSError) as error:
        return str(error)
    return None


def _best(folder: Path, complete: list[Path], place: str) -> tuple[Path, str]:
    """Return the best checkpoint by trainer.best_metric, or else by the validation loss, and what it is."""
    try:
        found = read_json(folder / BEST_FILE)
        named = next((step for step in complete if step.name == found["checkpoint"]), None)
        if named is not None:
            return named, f"its best checkpoint ({found['metric']} {found['value']:.4g})"
    except (DamageError, KeyError, TypeError, ValueError):
        pass  # the run had no trainer.best_metric
    losses = {step: loss for step in complete if math.isfinite(loss := _loss(step))}
    if not losses:
        fix = "leave --best out for the newest one; a run with data.val_files and trainer.best_metric=val/loss knows its best one"
        raise UserError("none of its checkpoints has a validation loss, so the best is not known", where=f"--best with {place}", fix=fix)
    chosen = min(losses, key=lambda step: losses[step])
    return chosen, f"the one of its checkpoints with the least val/loss ({losses[chosen]:.4g})"


def _loss(step: Path) -> float:
    try:
        return float(read_json(step / "trainer" / "state.json")["validation"]["val/loss"])
    except (DamageError, KeyError, TypeError, ValueError):
        return math.nan


def _say(line: str) -> None:
    if line not in _said and os.environ.get("RANK", "0") == "0" and LAUNCHER not in os.environ:  # a launcher has said it itself
        _said.add(line)
        print(line, file=sys.stderr, flush=True)
