"""Finds what is wrong with a checkpoint: what is not as it was written, and what a run needs to resume and is not there."""

import itertools
import json
import stat
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from verl.engine.position import STATE, Position
from verl.errors import UserError
from verl.manifest import STEP, Manifest, check_hashes, check_sizes, find_files, is_inside, read_manifest, steps_in
from verl.regular_file import open_file
from verl.typed_json import DamageError, describe, read, read_bytes, read_json

if TYPE_CHECKING:
    from torch import Tensor

# Smallest values of the numbers in state.json.
_LEAST = {"tokens": 0, "supervised_tokens": 0, "rows": 1, "rows_per_step": 1, "seed": 0, "drawn": 0, "kl_coef": 0}
_MOST_STEPS = 2**53  # no run has so many
_ZIP_START, _ZIP_END, _ZIP_END_BYTES = b"PK\x03\x04", b"PK\x05\x06", 22  # torch.save writes each tensor as a ZIP archive


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
    of_ranks = [f"trainer/rng_{rank}.safetensors" for rank in range(manifest.world_size)]
    _check_present(of_ranks, found)
    for name in of_ranks if hashes else ():
        read_random_states(directory / name)
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
    """Read the position that a checkpoint was saved at. Raises DamageError, also if it has a number that no run has."""
    position = read(directory / "trainer" / STATE, Position)
    for name, least in _LEAST.items():
        value = getattr(position, name)
        _check_range(name, value, least, 2**63 if name != "seed" else value)
    for number in position.abandoned:
        _check_range("abandoned", int(number) if number.isdecimal() else -1, 0, position.drawn - 1)
    if settings := position.settings:  # older versions wrote neither these nor the total
        planned = _setting(settings, "trainer.total_training_steps")
        _check_range("total_steps", position.total_steps, max(1, position.step, planned or 0), planned or _MOST_STEPS)
    updates = position.step * (_setting(settings, "algorithm.updates_per_step") or 1)
    _check_range("skipped", position.skipped, 0, updates)
    _check_range("critic_skipped", position.critic_skipped, 0, updates)
    return position


def _setting(settings: Mapping[str, str], key: str) -> int | None:
    """Return a number of the settings; None if there is none."""
    try:
        found: Any = json.loads(settings.get(key, "null"))
    except (ValueError, RecursionError) as error:
        raise DamageError(f"{STATE}: settings: {key} is {settings[key]!r:.40}") from error
    return found if type(found) is int else None


def _check_range(name: str, value: float | None, least: float, most: float | None) -> None:
    if value is not None and not (least <= value and (most is None or value <= most)):
        raise DamageError(f"{STATE}: {name} is {value:,}, which no run has at this step")


def read_random_states(path: Path) -> "dict[str, Tensor]":
    """Read the states of a rank's generators of random numbers: `cpu`, and `cuda` of a GPU. Raises DamageError."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        states = load(read_bytes(path, 2**20))
        torch.Generator().set_state(states["cpu"])
    except (SafetensorError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise DamageError(f"trainer/{path.name} has no state of a generator of random numbers") from error
    unknown = states.keys() - {"cpu", "cuda"}
    if unknown or ("cuda" in states and (states["cuda"].dtype != torch.uint8 or states["cuda"].shape != (16,))):
        raise DamageError(f"trainer/{path.name} has a state of no known generator of random numbers ({min(unknown, default='cuda')!r:.80})")
    return states


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
    """Check that the files of trained weights and optimizer are there that `.metadata` names, and hold a tensor where it names one."""
    from verl.engine.stored_metadata import files_of, read_metadata

    metadata = read_metadata(directory / part)
    for name, size in files_of(metadata).items():
        _check_present([part + name], found)
        if found[part + name] < size:
            raise DamageError(f"{part}{name} has {found[part + name]:,} bytes, and .metadata names {size:,}")
    stored = sorted((info.relative_path, info.offset, info.length) for info in metadata.storage_data.values())
    for name, parts in itertools.groupby(stored, key=lambda one: one[0]):
        with open(open_file(directory / part / name), "rb") as file:
            for _, start, length in parts:
                if not _is_tensor(file, start, start + length):
                    raise DamageError(f"{part}{name} has no tensor at byte {start:,}, where .metadata names one")


def _is_tensor(file: BinaryIO, start: int, end: int) -> bool:
    """Return whether a part of a file begins and ends as a stored tensor does."""
    if end - start < _ZIP_END_BYTES:
        return False
    file.seek(start)
    begins = file.read(len(_ZIP_START)) == _ZIP_START
    file.seek(end - _ZIP_END_BYTES)
    return begins and file.read(len(_ZIP_END)) == _ZIP_END


def find_newest(root: Path, say: Callable[[str], None]) -> Path | UserError | None:
    """Return the newest checkpoint that is as it was written; None if there is none at all; an error if all are damaged.

    The reason for each one that is passed over is said.
    """
    named = steps_in(root)
    for path in reversed(named):
        damage = oddity(path) or find_damage(path)
        if damage is None:
            return path
        say(f"skipping {path.name}: {damage}")
    if not named:
        return None
    fix = "move the directory away, and start again with trainer.resume_mode=disable"
    return UserError("every checkpoint is damaged", where=str(root), fix=fix)


def oddity(path: Path) -> str | None:
    """Say what is named like a checkpoint and is no directory; None for a directory."""
    try:
        mode = path.lstat().st_mode
    except OSError as error:
        return describe(error)
    return None if stat.S_ISDIR(mode) else f"it is a {'link' if stat.S_ISLNK(mode) else 'file'}, not a directory"
