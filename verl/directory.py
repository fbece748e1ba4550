"""A run's directory: which one it is, the lock on it, and what an earlier run has left there.

A directory that the user names (trainer.default_local_dir) is that directory. In the default place, which is named after project and
experiment, a run with other settings than the one that is there gets a directory of its own: run-2, run-3, …
"""

import hashlib
import itertools
import json
import os
import platform
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any
from uuid import uuid4

import yaml

from verl import __version__, dist, regular_file
from verl.config.shared import RunConfig, TrainerConfig
from verl.config.trajectory import CONTENT, MODEL, Change, changes, kind_of, values_of
from verl.config.yaml_text import Loader
from verl.durable import UNFINISHED, append_text, flush, replace_text
from verl.errors import UserError
from verl.lock import FILE as LOCK
from verl.lock import Lock, LockedError, take
from verl.manifest import refuse_inside, steps_in
from verl.typed_json import DamageError, read_json

CONFIG, METRICS, LOG, ENVIRONMENT = "config.yaml", "metrics.jsonl", "train.log", "environment.json"
FILES = (
    LOCK,
    LOG,
    METRICS,
    CONFIG,
    ENVIRONMENT,
    "trainer_state.json",
    "latest_checkpointed_iteration.txt",
)  # that a run writes into its directory
LARGEST_CONFIG = 2**20  # bytes
LONGEST_LINE = 2**20  # bytes, of metrics.jsonl
ANOTHER = "remove it, or set trainer.default_local_dir to another directory"
COMMANDS = {"SFTConfig": "verl sft", "PPOConfig": "verl ppo", "RewardTrainerConfig": "verl reward"}
_MARK = re.compile(r"\.[0-9a-f]{32}(\.tmp)?")  # files that a run makes to see whether another node sees them


@dataclass
class Claimed:
    """A directory that is locked for a run.

    Attributes:
        lock: held by rank 0; None on other ranks.
        mark: an empty file in it, by which other nodes recognise it.
        notes: what to say after the run's first line.
        why: why it is not the directory with the plain name; empty if it is.
        made: the directories that were made for it, the innermost first.
        before: names of what was in it before.
    """

    directory: Path
    lock: Lock | None
    mark: Path
    notes: list[str] = field(default_factory=list)
    why: str = ""
    made: list[Path] = field(default_factory=list)
    before: frozenset[str] = frozenset()

    def check(self) -> None:
        """Check that the lock is still held, and write the metrics to disk.

        Raises:
            UserError: another run has taken over, or the directory is gone.
        """
        if self.lock is None:
            return
        try:
            self.lock.check()
            if (metrics := self.directory / METRICS).exists():
                flush(metrics)
        except OSError as error:
            fix = "restore it; the same command resumes from the newest checkpoint in it"
            raise UserError(f"cannot be written: {error.strerror}", where=str(self.directory), fix=fix) from error

    def release(self, *, is_vain: bool = False) -> None:
        """Give the directory up.

        Args:
            is_vain: whether the run could not begin: nothing is left then of what it has made, if nothing else has been put beside it.
        """
        if self.lock is None:
            return
        with suppress(OSError):
            if is_vain and self.lock.is_held() and not is_used(self.directory):
                new = {path.name for path in self.directory.iterdir()} - self.before
                for name in new - {LOCK} if new <= set(FILES) else ():
                    (self.directory / name).unlink()
        self.lock.release()
        with suppress(OSError):  # such as one that is not empty
            for folder in self.made if is_vain else ():
                folder.rmdir()


def claimed(config: RunConfig) -> Claimed:
    """Find the directory of a run, make it and lock it, and check that all nodes share it: all write their part of a checkpoint.

    Raises:
        UserError: on all ranks: it cannot be written, another process has it, or a node has another directory of this name.
    """
    mine: list[Claimed] = []
    dist.together(lambda: mine.append(claim(config)) if dist.is_main() else None)
    directory, mark, why = dist.from_main((mine[0].directory, mine[0].mark, mine[0].why) if mine else (Path(), Path(), ""))
    found = mine[0] if mine else Claimed(directory, None, mark, why=why)
    try:
        if config.trainer.save_freq != "never":
            dist.together(lambda: _find(found))
    except BaseException:
        if dist.is_main():
            mark.unlink()
        found.release(is_vain=True)
        raise
    if dist.is_main():
        mark.unlink()
    return found


def _find(found: Claimed) -> None:
    if not found.mark.exists():
        raise UserError(
            f"{socket.gethostname()} does not see the first node's folder of this name, so no checkpoint would be complete",
            where=str(found.directory.absolute()),
            fix="set trainer.default_local_dir to a folder on a file system that all nodes share",
        )


def settings_of(config: RunConfig) -> dict[str, str]:
    """Return the command, the keys that change what is learned, and what identifies the content of models and of users' files."""
    from verl.models.identity import content_of

    values = {"command": json.dumps(COMMANDS.get(type(config).__name__, "")), **values_of(config)}
    names = {key: json.loads(value) for key, value in values.items() if kind_of(key) == MODEL or value.endswith('.py"')}
    lists = {
        CONTENT + key: [content_of(one) for one in (name if isinstance(name, list) else [name])] for key, name in names.items() if name
    }
    contents = {key: found[0] if len(found) == 1 else found for key, found in lists.items() if None not in found}
    return {**values, **{key: json.dumps(found) for key, found in contents.items()}}


def recorded_settings(directory: Path) -> dict[str, str]:
    """Return the settings of the run that a directory belongs to: those of its newest checkpoint, or else of its config.yaml."""
    for step in reversed(steps_in(directory)):
        if settings := settings_of_checkpoint(step):
            return settings
    return _settings_in_yaml(directory / CONFIG)


def settings_of_checkpoint(directory: Path) -> dict[str, str]:
    """Return the settings that a checkpoint records; nothing if it records none, because an older version wrote it."""
    try:
        found = read_json(directory / "trainer" / "state.json")["settings"]
        return {str(key): str(value) for key, value in found.items()}
    except (DamageError, KeyError, TypeError, AttributeError):
        return {}


def _settings_in_yaml(path: Path) -> dict[str, str]:
    found = _read_yaml(path)
    return values_of(found) if isinstance(found, dict) else {}


def _read_yaml(path: Path) -> Any:
    """Return what config.yaml of an earlier run holds; None if it cannot be read, or is no config of a run."""
    try:
        return Loader.read(regular_file.read(path, LARGEST_CONFIG).decode("utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None


def settings_beside(checkpoint: Path) -> dict[str, str]:
    """Return the settings of a checkpoint, or else those of the run in whose directory it is."""
    return settings_of_checkpoint(checkpoint) or _settings_in_yaml(checkpoint.resolve().parent / CONFIG)


def is_used(directory: Path) -> bool:
    """Return whether a run has done steps in a directory."""
    metrics = directory / METRICS
    return bool(steps_in(directory)) or (metrics.is_file() and metrics.stat().st_size > 0)


# Which directory


def claim(config: RunConfig) -> Claimed:
    """Find the directory of a run, make it, and lock it. Only rank 0 calls it.

    Raises:
        UserError: it cannot be written, is inside a checkpoint, or another process has it.
    """
    named, mine = Path(config.trainer.default_local_dir).expanduser(), settings_of(config)
    if not _is_default(config.trainer):
        return _claimed(named, _purpose(mine))
    skipped: list[str] = []
    for directory, why in _places(named, config.trainer, mine):
        try:
            found = _claimed(directory, _purpose(mine))
        except LockedError as error:
            if error.owner is None or error.owner.purpose == _purpose(mine):
                raise
            skipped.append(f"{directory} is in use by a run with other settings")
            continue
        if why or not is_used(directory) or _goes_on_in(directory, config.trainer, mine):
            found.why = why or "; ".join([*_reasons(named, directory, config.trainer, mine), *skipped])
            return found
        found.mark.unlink()
        found.release()  # another run has begun here meanwhile
    raise AssertionError("there is always another number")


def _purpose(settings: dict[str, str]) -> str:
    """Return what tells runs with other settings apart, for the lock."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _is_default(trainer: TrainerConfig) -> bool:
    return trainer.default_local_dir == f"checkpoints/{trainer.project_name}/{trainer.experiment_name}"


def _places(named: Path, trainer: TrainerConfig, mine: dict[str, str]) -> Iterator[tuple[Path, str]]:
    """Yield the directories that a run in the default place may have, the likeliest first, and why if it is not for its settings."""
    there = [named, *(path for _, path in sorted(_numbered(named)))]
    yield from ((directory, "") for directory in there if is_used(directory) and _goes_on_in(directory, trainer, mine))
    used = [directory for directory in there if steps_in(directory)]
    if trainer.resume_override and trainer.resume_mode == "auto" and used:
        # The last one of those that differ least.
        nearest = min(reversed(used), key=lambda directory: len(changes(recorded_settings(directory), mine)))
        yield nearest, f"goes on in {nearest} with other settings (trainer.resume_override=true)"
    for number in itertools.count(1):
        directory = named if number == 1 else named.with_name(f"{named.name}-{number}")
        if not is_used(directory):
            yield directory, ""


def _numbered(named: Path) -> Iterator[tuple[int, Path]]:
    for path in named.parent.glob("*"):
        number = path.name.removeprefix(f"{named.name}-")
        if number != path.name and re.fullmatch(r"[1-9]\d*", number) and int(number) > 1 and path.is_dir():
            yield int(number), path


def _goes_on_in(directory: Path, trainer: TrainerConfig, mine: dict[str, str]) -> bool:
    """Return whether the run of a used directory is this one."""
    same = not decisive(changes(recorded_settings(directory), mine))
    if trainer.resume_mode == "disable":
        return same and not steps_in(directory)
    return same and (trainer.resume_mode == "auto" or is_continued(directory, trainer))


def is_continued(directory: Path, trainer: TrainerConfig) -> bool:
    """Return whether the run of a directory has itself started from trainer.resume_from_path, or is the one that wrote it."""
    named = Path(str(trainer.resume_from_path)).expanduser().resolve()
    try:
        before = _read_yaml(directory / CONFIG)["trainer"]["resume_from_path"]
    except (KeyError, TypeError):
        before = None
    return named.parent == directory.resolve() or (before is not None and Path(str(before)).expanduser().resolve() == named)


def decisive(found: list[Change]) -> list[Change]:
    """Return the changes that make another run; that a user's own file was edited is only said."""
    return [change for change in found if change.kind]


def _reasons(named: Path, directory: Path, trainer: TrainerConfig, mine: dict[str, str]) -> list[str]:
    """Say why a run does not have the directory with the plain name."""
    if directory == named:
        return []
    found = decisive(changes(recorded_settings(named), mine))
    if not is_used(named):
        return []
    if not found:
        return [f"{named} has a run with these settings, which is left as it is (trainer.resume_mode={trainer.resume_mode})"]
    shown = ", ".join(map(str, found[:3])) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
    return [f"{named} has a run with other settings ({shown})"]


def _claimed(directory: Path, purpose: str) -> Claimed:
    refuse_inside(directory, str(directory), "set trainer.default_local_dir to a directory outside it")
    regular_file.check_directory(directory, str(directory), "set trainer.default_local_dir to a directory; it is made if it is missing")
    notes: list[str] = []
    try:
        made = [folder for folder in (directory, *directory.parents) if not folder.exists()]
        directory.mkdir(parents=True, exist_ok=True)
        before = frozenset(path.name for path in directory.iterdir())
        for name in FILES:
            regular_file.check_regular(directory / name, ANOTHER)
        lock = _taken(directory, purpose, notes)
        _sweep(directory)
        append_text(directory / LOG, "", private=True)
        (mark := directory / f".{uuid4().hex}").touch()
    except OSError as error:
        what = f"cannot be written: {error.strerror}"
        raise UserError(what, where=str(directory), fix="set trainer.default_local_dir") from error
    return Claimed(directory, lock, mark, notes, made=made, before=before)


def _taken(directory: Path, purpose: str, notes: list[str]) -> Lock:
    """Lock a directory, which is made again if a run that could not begin has removed it meanwhile."""
    try:
        return take(directory, purpose, notes.append)
    except FileNotFoundError:
        if directory.is_dir():
            raise
    directory.mkdir(parents=True, exist_ok=True)
    return take(directory, purpose, notes.append)


def _sweep(directory: Path) -> None:
    """Remove what a killed run has left besides checkpoints, also in its folders of rows. The directory is locked, so nobody uses it."""
    for path in directory.iterdir():
        if _MARK.fullmatch(path.name) or UNFINISHED.fullmatch(path.name) or (path.name == "best.tmp" and path.is_symlink()):
            path.unlink(missing_ok=True)
        elif path.is_dir() and not path.is_symlink() and not path.name.startswith("global_step_"):
            for unfinished in filter(lambda file: UNFINISHED.fullmatch(file.name), path.iterdir()):
                unfinished.unlink(missing_ok=True)


# What is written when a run begins


def begin_files(directory: Path, config_yaml: str, start_step: int, say: Callable[[str], None]) -> None:
    """Write config.yaml and environment.json, and keep the metrics of the steps that a run resumes from, one line for each.

    A new run sets the metrics of an earlier one aside. Each file is replaced: a kill leaves the old one or the new one.
    """
    config, metrics = directory / CONFIG, directory / METRICS
    if start_step == 0 and metrics.is_file() and metrics.stat().st_size > 0:
        before, now = _settings_in_yaml(config), values_of(Loader.read(config_yaml))
        other = "other settings and " if before and decisive(changes(before, now)) else ""
        aside = next(path for n in itertools.count(1) if not (path := directory / f"metrics-{n}.jsonl").exists())
        metrics.rename(aside)
        say(f"{METRICS} of the run before, which has {other}no checkpoint here, is now {aside.name}")
    replace_text(config, config_yaml, private=True)
    replace_text(directory / ENVIRONMENT, json.dumps(environment(), indent=2) + "\n")
    if metrics.exists():
        kept: dict[float, str] = {}
        for line in _lines(metrics):
            step = _step_of(line)
            if 0 < start_step >= step:
                kept[step] = line
        replace_text(metrics, "".join(line + "\n" for _, line in sorted(kept.items())))
    flush(directory)


def environment() -> dict[str, str]:
    """Return the versions that a run trains with, by package."""
    packages = ("torch", "transformers", "peft", "accelerate")
    return {"verl": __version__, "python": platform.python_version(), **{name: metadata.version(name) for name in packages}}


def _lines(path: Path) -> Iterator[str]:
    """Yield the lines of the metrics. Raises UserError: one is too long to be of metrics, as in a file with a hole."""
    with os.fdopen(regular_file.open_file(path), "rb") as file:
        while line := file.readline(LONGEST_LINE):
            if len(line) == LONGEST_LINE:
                raise UserError(f"has a line of more than {LONGEST_LINE:,} bytes", where=str(path), fix="move the file away")
            yield line.decode("utf-8", errors="replace").rstrip("\r\n")


def _step_of(line: str) -> float:
    try:
        found: Any = json.loads(line)
        return float(found["step"])
    except (ValueError, KeyError, TypeError):  # a run that was killed while writing it leaves an incomplete last line
        return float("inf")
