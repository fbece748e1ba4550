"""A checkpoint that is being written: under a temporary name, until all of it is on disk and it is renamed.

The steps of a save are those of `checkpoint.save`. Steps that need other ranks are called by the main thread of each; `write` and `commit`
need none, so that a thread can run them beside training.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.storage import WriteResult

from verl import __version__, dist
from verl.disk import check_room, disk_error, folder_bytes, full_disk
from verl.durable import flush, replace_text
from verl.engine.position import STATE, Position
from verl.engine.stored_state import StoredState
from verl.errors import DiskError, UserError
from verl.manifest import MANIFEST, Entry, Manifest, check_sizes, entry_of, find_files, step_name
from verl.typed_json import DamageError

LATEST = "latest_checkpointed_iteration.txt"
FIX = "make room or set trainer.default_local_dir to another disk; earlier checkpoints are complete, and the same command resumes"


@dataclass(frozen=True)
class Written:
    """What a rank has written: the results of each folder of tensors, and each file with its size and hash."""

    results: dict[str, list[WriteResult]]
    files: dict[str, Entry]


@dataclass(frozen=True)
class Draft:
    """A checkpoint that is being written, as `global_step_N.tmp`.

    Attributes:
        root: the run's directory.
        states: trained weights and optimizer of each model, by their folder in the checkpoint.
        say: prints a message.
    """

    root: Path
    position: Position
    states: Mapping[str, StoredState]
    say: Callable[[str], None]

    @property
    def final(self) -> Path:
        return self.root / step_name(self.position.step)

    @property
    def temporary(self) -> Path:
        return self.root / f"{self.final.name}.tmp"

    @property
    def least_bytes(self) -> int:
        """The bytes of the weights and optimizer states, without the Hugging Face files."""
        return sum(state.size_bytes for state in self.states.values())

    def begin(self) -> None:
        """Make the directory, as all ranks agree. Every rank calls it. Raises DiskError."""

        def make() -> None:
            remove(self.temporary)
            needed = max(self.least_bytes, *map(folder_bytes, self.root.glob("global_step_*")), 0)  # checkpoints have the same size
            check_room(self.temporary, needed, what="a checkpoint", fix=FIX)
            for folder in self.states:
                (self.temporary / folder).mkdir(parents=True)

        self.together(lambda: make() if dist.is_main() else None)

    def together(self, work: Callable[[], object]) -> None:
        """Run the work on every rank. If the disk fails on one, remove the draft and raise DiskError on all."""

        def attempt() -> None:
            with disk_errors(self.temporary, self.least_bytes):
                work()

        try:
            dist.together(attempt)
        except DiskError:
            self.discard()
            raise

    def discard(self) -> None:
        """Remove what was written; rank 0 does."""
        if dist.is_main():
            shutil.rmtree(self.temporary, ignore_errors=True)

    def write(self, tensors: Mapping[str, Mapping[str, Tensor]], random_states: Mapping[str, Tensor]) -> Written:
        """Write this rank's tensors and random states. On rank 0, the Hugging Face files are there already; they are hashed meanwhile.

        Args:
            tensors: this rank's shards of each of `states`.
        Raises:
            DiskError: the disk is full or fails.
        """
        with disk_errors(self.temporary, self.least_bytes), ThreadPoolExecutor(4) as pool:
            files = {name: pool.submit(self._stored, name) for name in (find_files(self.temporary) if dist.is_main() else ())}
            results = {folder: state.write(self.temporary / folder, tensors[folder]) for folder, state in self.states.items()}
            name = f"trainer/rng_{dist.rank()}.safetensors"
            save_file(dict(random_states), self.temporary / name)
            mine = {f"{folder}/{result.storage_data.relative_path}" for folder, of_state in results.items() for result in of_state}
            files |= {name: pool.submit(self._stored, name) for name in sorted({*mine, name})}
            return Written(results, {name: entry.result() for name, entry in files.items()})

    def _stored(self, name: str) -> Entry:
        """Wait until a file is on disk, and return its size and hash."""
        path = self.temporary / name
        path.chmod(0o666 & ~_umask())  # safetensors makes files that only the owner can read
        flush(path)
        return entry_of(path)

    def commit(self, written: list[Written]) -> Path:
        """Complete the draft and give it its final name. Rank 0 calls it, with what each rank has written.

        A checkpoint that already has that name is not removed: it is renamed, and this is said.

        Raises:
            DiskError: the disk is full or fails, or a file is not what its rank has written.
        """
        with disk_errors(self.temporary, self.least_bytes):
            for folder, state in self.states.items():
                state.finish(self.temporary / folder, [of_rank.results[folder] for of_rank in written])
            (self.temporary / "trainer" / STATE).write_text(json.dumps(asdict(self.position), indent=2) + "\n", encoding="utf-8")
            own = [f"trainer/{STATE}", *(f"{folder}/.metadata" for folder in self.states)]
            files = {name: entry for of_rank in written for name, entry in of_rank.files.items()}
            files |= {name: self._stored(name) for name in own}
            found = find_files(self.temporary)
            check_sizes(files, found)
            if unknown := sorted(found.keys() - files.keys()):
                raise DamageError(f"{unknown[0]} was not written by this run")
            Manifest(__version__, self.position.step, dist.world_size(), dict(sorted(files.items()))).write(self.temporary)
            self._rename()
        return self.final

    def _rename(self) -> None:
        flush(self.temporary / MANIFEST)
        for path in [*(path for path in self.temporary.rglob("*") if path.is_dir()), self.temporary]:
            path.chmod(0o777 & ~_umask())
            flush(path)
        if os.path.lexists(self.final):
            self._set_aside()
        self.temporary.rename(self.final)
        replace_text(self.root / LATEST, f"{self.position.step}\n")
        flush(self.root)

    def _set_aside(self) -> None:
        """Rename what has the final name: a damaged checkpoint that was passed over, or one of an abandoned run."""
        number = next(n for n in range(1, 10**6) if not os.path.lexists(f"{self.final}.replaced-{n}"))
        aside = self.final.with_name(f"{self.final.name}.replaced-{number}")
        self.final.rename(aside)
        self.say(f"{self.final.name} was there already, from another run or damaged; it is now {aside.name}, and can be deleted")


def random_states(device: torch.device) -> dict[str, Tensor]:
    """Return the states of this process's generators of random numbers."""
    states = {"cpu": torch.get_rng_state()}
    return {**states, "cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else states


@contextmanager
def disk_errors(directory: Path, needed: int) -> Iterator[None]:
    """Raise a DiskError in place of an error of the disk.

    Libraries raise errors of many kinds. Any of them counts as one of the disk if hardly any space is left.
    """
    try:
        yield
    except UserError:
        raise
    except DamageError as error:
        raise DiskError(f"cannot be written: {error}", where=str(directory), fix=FIX) from error
    except (Exception, CheckpointException) as error:
        found = disk_error(error, where=directory, needed=needed, fix=FIX) or full_disk(directory, needed=needed, fix=FIX)
        if found is None:
            raise
        raise found from error


def remove(path: Path) -> None:
    """Remove a directory, a file or a link; nothing if there is none. Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
