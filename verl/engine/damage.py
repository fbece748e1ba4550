"""Finds what is wrong with a checkpoint: what is not as it was written, and what a run needs to resume and is not there."""

import stat
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from verl.durable import STEP
from verl.engine.position import STATE, Position
from verl.errors import UserError
from verl.manifest import Manifest, check_hashes, check_sizes, find_files, is_inside, read_manifest
from verl.typed_json import DamageError, describe, read, read_json


def find_damage(directory: Path, *, hashes: bool = True) -> str | None:
    """Return what is wrong with a checkpoint, in one line; None if it is as it was written and can be resumed from.

    Args:
        hashes: read all files; otherwise only names and sizes are compared, which takes no time.
    """
    try:
        if not directory.is_dir():
            return "is no directory" if directory.exists() else "does not exist"
        _check(directory, hashes=hashes)
    except DamageError as error:
        return str(error)
    except OSError as error:
        return describe(error)
    return None


def _check(directory: Path, *, hashes: bool) -> None:
    manifest, found = read_manifest(directory), find_files(directory)
    check_sizes(manifest.files, found)
    if unlisted := sorted(found.keys() - manifest.files.keys()):
        raise DamageError(f"{unlisted[0]} is not in manifest.json: it was added later")
    if hashes:
        check_hashes(directory, manifest.files)
    _check_step(directory, manifest, read_position(directory))
    _check_present((f"trainer/rng_{rank}.safetensors" for rank in range(manifest.world_size)), found)
    _check_model(directory, "", found)
    parts = ["trainer/"]
    if any(name.startswith(("critic/", "trainer/critic/")) for name in found):
        _check_model(directory, "critic/", found)
        parts.append("trainer/critic/")
    for part in parts:
        _check_present([f"{part}.metadata"], found)
        if hashes:
            _check_tensors(directory, part, found)


def read_position(directory: Path) -> Position:
    """Read the position that a checkpoint was saved at. Raises DamageError."""
    return read(directory / "trainer" / STATE, Position)


def _check_step(directory: Path, manifest: Manifest, position: Position) -> None:
    """Check that all say the same step: the manifest, state.json and the directory's name, if it has the name of a checkpoint."""
    named = STEP.fullmatch(directory.resolve().name)
    for what, step in ((STATE, position.step), ("the directory's name", int(named[1]) if named else manifest.step)):
        if step != manifest.step:
            raise DamageError(f"{what} says step {step}, and manifest.json step {manifest.step}")


def _check_present(names: Iterable[str], found: Mapping[str, int]) -> None:
    for name in names:
        if name not in found:
            raise DamageError(f"{name} is missing, and manifest.json does not list it")


def _check_model(directory: Path, prefix: str, found: Mapping[str, int]) -> None:
    """Check that the Hugging Face files are there: config and weights of a model, or those of an adapter."""
    index = f"{prefix}model.safetensors.index.json"
    if f"{prefix}adapter_config.json" in found:
        _check_present([f"{prefix}adapter_model.safetensors"], found)
        return
    _check_present([f"{prefix}config.json"], found)
    if index not in found:
        _check_present([f"{prefix}model.safetensors"], found)
        return
    shards = read_json(directory / index)
    shards = shards.get("weight_map") if isinstance(shards, dict) else None
    if not (isinstance(shards, dict) and all(isinstance(name, str) and is_inside(name) for name in shards.values())):
        raise DamageError(f"{index} has no weight_map")
    _check_present(sorted({prefix + name for name in shards.values()}), found)


def _check_tensors(directory: Path, part: str, found: Mapping[str, int]) -> None:
    """Check that the files of trained weights and optimizer are there that `.metadata` names, and hold what it names."""
    from verl.engine.stored_metadata import files_of, read_metadata

    for name, size in files_of(read_metadata(directory / part)).items():
        _check_present([part + name], found)
        if found[part + name] < size:
            raise DamageError(f"{part}{name} has {found[part + name]:,} bytes, and .metadata names {size:,}")


def find_newest(root: Path, say: Callable[[str], None]) -> Path | UserError | None:
    """Return the newest checkpoint that is as it was written; None if there is none at all; an error if all are damaged.

    The reason for each one that is passed over is said.
    """
    named = candidates(root)
    for path in reversed(named):
        damage = oddity(path) or find_damage(path)
        if damage is None:
            return path
        say(f"skipping {path.name}: {damage}")
    if not named:
        return None
    fix = "move the directory away, and start again with trainer.resume_mode=disable"
    return UserError("every checkpoint is damaged", where=str(root), fix=fix)


def candidates(root: Path) -> list[Path]:
    """Return all that is named like a committed checkpoint, by step: also a file or a link of that name."""
    found = [(int(match[1]), path) for path in root.glob("global_step_*") if (match := STEP.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def oddity(path: Path) -> str | None:
    """Say what is named like a checkpoint and is no directory; None for a directory."""
    try:
        mode = path.lstat().st_mode
    except OSError as error:
        return describe(error)
    return None if stat.S_ISDIR(mode) else f"it is a {'link' if stat.S_ISLNK(mode) else 'file'}, not a directory"
