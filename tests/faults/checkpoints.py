"""Checkpoints to damage: two of each kind of run, written once, and ways to damage a file."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import sft_runs
from tiny import write_problems_and_model

from verl.engine.damage import find_damage
from verl.manifest import MANIFEST, Manifest, entries_of, find_files, read_manifest

Damage = Callable[[Path], object]
KINDS = ("full", "adapter", "critic")


def write_run(folder: Path, kind: str) -> Path:
    """A run's directory with two checkpoints, global_step_1 and global_step_2."""
    if kind == "critic":
        import rl_runs

        rl_runs.write_folder(folder)
        rl_runs.train(folder, "run", algorithm__name="ppo", trainer__total_training_steps=2, trainer__save_freq=1)
    else:
        write_problems_and_model(folder)
        adapter = {"model__lora_rank": 4} if kind == "adapter" else {}
        sft_runs.train(folder, "run", trainer__total_training_steps=2, trainer__save_freq=1, **adapter)
    return folder / "run"


def copy_of(run: Path, target: Path) -> Path:
    """A copy of a run's directory, and its newest checkpoint."""
    shutil.copytree(run, target, symlinks=True)
    return target / "global_step_2"


def seal(directory: Path, **changes: object) -> None:
    """Write a manifest that fits the files as they are now: what is wrong then is not a file's content."""
    before = read_manifest(directory)
    files = entries_of(directory, find_files(directory))
    Manifest(**{"verl": before.verl, "step": before.step, "world_size": before.world_size, "files": files, **changes}).write(directory)  # type: ignore[arg-type]


def change_json(path: Path, **changes: object) -> None:
    """Change fields of a JSON object; a value of None removes the field."""
    found = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in found.items() if value is not None}))


def change_manifest(directory: Path, **changes: object) -> None:
    change_json(directory / MANIFEST, **changes)


def hashes(directory: Path) -> dict[str, str]:
    """Of all files of an undamaged checkpoint, but those that hold a path."""
    assert find_damage(directory) is None
    return {name: entry.sha256 for name, entry in read_manifest(directory).files.items() if not name.endswith(".metadata")}


# Ways to damage any file


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def flip_and_keep_the_time(path: Path) -> None:
    before = path.stat()
    flip(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def delete(path: Path) -> None:
    path.unlink()


def link(path: Path) -> None:
    """Replace it by a link to the same content."""
    run = next(parent for parent in path.parents if parent.name == "global_step_2").parent
    elsewhere = run / f"{path.name}.elsewhere"
    os.replace(path, elsewhere)
    path.symlink_to(elsewhere)


def loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def directory_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


def pipe_instead(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def take_from_the_other(path: Path) -> None:
    """Replace it by the file of that name of the other checkpoint of the run."""
    parts = list(path.parts)
    place = next(number for number, part in enumerate(parts) if part == "global_step_2")
    parts[place] = "global_step_1"
    shutil.copy2(Path(*parts), path)
