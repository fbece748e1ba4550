"""Checkpoints by their names, and manifest.json in them: size and SHA-256 of each file. Links are never followed."""

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from verl.errors import UserError
from verl.regular_file import open_file
from verl.typed_json import DamageError, describe, read

MANIFEST = "manifest.json"
STEP = re.compile(r"global_step_(0|[1-9][0-9]*)")


@dataclass(frozen=True)
class Entry:
    """A file as it was written: its size in bytes and the SHA-256 of its content, in hexadecimal digits."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Contents of manifest.json.

    Attributes:
        verl: version that wrote the checkpoint.
        step: finished optimizer steps.
        world_size: number of processes that wrote it; each has a file of random states.
        files: each file but the manifest itself, by its path inside the checkpoint, with slashes.
    """

    verl: str
    step: int
    world_size: int
    files: dict[str, Entry]

    def write(self, directory: Path) -> None:
        (directory / MANIFEST).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def step_name(step: int) -> str:
    """Return the name of the checkpoint after a step, which `STEP` matches."""
    return f"global_step_{step}"


def steps_in(directory: Path) -> list[Path]:
    """Return everything in a directory that has a checkpoint's name, by step: also a file or a link of that name."""
    found = [(int(match[1]), path) for path in directory.glob("global_step_*") if (match := STEP.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def is_checkpoint(folder: Path) -> bool:
    """Return whether verl wrote a directory as a checkpoint: another program's manifest.json is not ours to read."""
    return os.path.lexists(folder / MANIFEST) and ((folder / "trainer").is_dir() or (folder / "prompt_format.json").is_file())


def refuse_inside(path: Path, where: str, fix: str) -> None:
    """Raise UserError if a directory to write into is a checkpoint, or is inside one: an added file is damage."""
    real = Path(os.path.realpath(path))
    for folder in (real, *real.parents):
        if is_checkpoint(folder):
            what = f"{'is' if folder == real else 'is inside'} the checkpoint {folder}, which may not be changed"
            raise UserError(what, where=where, fix=fix)


def check_new_directory(target: Path) -> None:
    """Raise UserError if the target is a file, a directory that is not empty, or inside a checkpoint."""
    refuse_inside(target, str(target), "choose a new directory outside it")
    if target.is_dir() and any(target.iterdir()):
        raise UserError("the directory is not empty", where=str(target), fix="choose a new directory, or empty this one")
    if target.exists() and not target.is_dir():
        raise UserError("is a file, not a directory", where=str(target), fix="choose a new directory")


def read_manifest(directory: Path) -> Manifest:
    """Read the manifest of a checkpoint. Raises DamageError: it is missing, malformed, or has a name that is no path inside."""
    manifest = read(directory / MANIFEST, Manifest)
    if manifest.step < 0 or manifest.world_size < 1:
        raise DamageError(f"{MANIFEST} has step {manifest.step} of {manifest.world_size} processes")
    for name, entry in manifest.files.items():
        if not is_inside(name):
            raise DamageError(f"{MANIFEST} names {name!r:.80}, which is no path inside the checkpoint")
        if entry.size < 0 or len(entry.sha256) != 64 or set(entry.sha256) - set("0123456789abcdef"):
            raise DamageError(f"{MANIFEST} has no size and SHA-256 of {name!r:.80}")
    return manifest


def is_inside(name: str) -> bool:
    """Return whether a name is a plain relative path: no drive, no backslash, no step upwards."""
    return all(part not in ("", ".", "..") for part in name.split("/")) and not set(name) & set("\\:\0")


def find_files(directory: Path) -> dict[str, int]:
    """Return the size of each file under a directory but its manifest, by name.

    Raises:
        DamageError: something in it cannot be read, or is a link, a pipe or another special file.
    """
    return dict(_walk(directory, ""))


def _walk(directory: Path, prefix: str) -> Iterator[tuple[str, int]]:
    try:
        found = sorted(os.scandir(directory), key=lambda one: one.name)
        stats = [one.stat(follow_symlinks=False) for one in found]
    except OSError as error:
        raise DamageError(f"{prefix or directory.name} {describe(error)}") from error
    for one, status in zip(found, stats, strict=True):
        name = prefix + one.name
        if stat.S_ISDIR(status.st_mode):
            yield from _walk(directory / one.name, f"{name}/")
        elif not stat.S_ISREG(status.st_mode):
            raise DamageError(f"{name} is {'a link' if stat.S_ISLNK(status.st_mode) else 'a special file'}")
        elif name != MANIFEST:
            yield name, status.st_size


def check_sizes(files: Mapping[str, Entry], found: Mapping[str, int]) -> None:
    """Check that each listed file is there with its size. Raises DamageError."""
    for name, entry in files.items():
        if name not in found:
            raise DamageError(f"{name} is missing")
        if found[name] != entry.size:
            raise DamageError(f"{name} has {found[name]:,} bytes, not {entry.size:,}")


def check_hashes(directory: Path, files: Mapping[str, Entry]) -> None:
    """Check the content of each listed file. Raises DamageError."""
    for name, found in entries_of(directory, files).items():
        if found != files[name]:
            raise DamageError(f"{name} does not match its checksum in {MANIFEST}")


def entries_of(directory: Path, names: Iterable[str]) -> dict[str, Entry]:
    """Read files and return their sizes and hashes. Raises DamageError: one cannot be read."""
    names = list(names)
    with ThreadPoolExecutor() as pool:  # hashing releases the GIL, so files are read in parallel
        return dict(zip(names, pool.map(lambda name: entry_of(directory / name), names), strict=True))


def entry_of(path: Path) -> Entry:
    """Read a file and return its size and hash. Raises DamageError: it cannot be read."""
    digest, size = hashlib.sha256(), 0
    try:
        with os.fdopen(open_file(path), "rb", buffering=0) as file:
            while block := file.read(1 << 22):
                digest.update(block)
                size += len(block)
    except OSError as error:
        raise DamageError(f"{path.name} {describe(error)}") from error
    return Entry(size, digest.hexdigest())
