"""Saves checkpoints beside training: the state is copied to host memory, and a thread writes, hashes, flushes and commits the copy.

Only the main threads of the ranks talk to each other, at points that all ranks reach: `start` and `advance`.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from verl import dist
from verl.engine import checkpoint
from verl.engine.draft import Draft, Written, disk_errors, random_states
from verl.engine.engine import Engine
from verl.engine.host_copy import HostCopy
from verl.engine.position import Position
from verl.engine.stored_state import StoredState, local_tensors

Write = Callable[[Path], None]


class SavedModel(Protocol):
    """A trained model whose Hugging Face files are written from copies of its trained weights."""

    @property
    def engine(self) -> Engine: ...

    def export(self, directory: Path) -> None: ...

    def gathered(self, copies: dict[str, Tensor]) -> Write: ...


class Background:
    """Saves a run's checkpoints in a thread, one at a time.

    It allocates the host memory when it is made, so that no save waits for it. Every rank makes it, and calls its methods.

    Args:
        root: the run's directory.
        say: prints a message.
    """

    def __init__(self, root: Path, actor: SavedModel, critic: SavedModel | None, say: Callable[[str], None]):
        self._root, self._actor, self._critic, self._say = root, actor, critic, say
        states = checkpoint.states_of(actor.engine, critic)
        self._states = {folder: StoredState.planned(state) for folder, state in states.items()}
        self._copy = HostCopy(self._shards())
        self._writes(root, self._copy.take(self._shards()))  # what it keeps for later saves takes a while
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._draft: Draft | None = None
        self._job: Future[Any] | None = None
        self._commits = False  # whether the job is the commit, the second of two where there are several ranks
        say(f"checkpoints are written beside training (trainer.async_save), from {self._copy.describe()} for each process")

    @property
    def is_busy(self) -> bool:
        """Whether a save has been started and not been returned by `advance`; the same on every rank."""
        return self._job is not None

    def start(self, position: Position) -> None:
        """Copy the state, and begin to write it. The save before must be done. Returns as soon as training may change the weights.

        Raises:
            DiskError: on all ranks: the directory cannot be made.
        """
        assert not self.is_busy
        draft = Draft(self._root, position, self._states, self._say)
        draft.begin()
        copies = self._copy.take(self._shards())
        tensors = {folder: _below(f"{folder}: ", copies) for folder in self._states}
        writes = self._writes(draft.temporary, copies)
        random = random_states(self._actor.engine.device)
        self._draft, self._commits = draft, dist.world_size() == 1

        def work() -> Written | Path:
            with disk_errors(draft.temporary, draft.least_bytes):
                for directory, write in writes.items():
                    write(directory)
            written = draft.write(tensors, random)
            return draft.commit([written]) if self._commits else written

        self._job = self._thread.submit(work)

    def advance(self, *, until_done: bool) -> Path | None:
        """Return the checkpoint if the save is done. Every rank calls it, after the same steps.

        Args:
            until_done: wait for it; otherwise None is returned while it is being written.
        Raises:
            DiskError: on all ranks: the disk is full or fails. Earlier checkpoints remain.
        """
        while self._job is not None and self._draft is not None:
            if until_done:
                wait([self._job])
            if dist.any_rank(not self._job.done()):
                return None
            done = self._finish_job(self._draft, self._job)
            if done is not None or not until_done:
                return done
        return None

    def _finish_job(self, draft: Draft, job: Future[Any]) -> Path | None:
        """Take the results of the jobs of all ranks, and start the commit if they have written their parts."""
        self._job = None  # if it failed, nothing is being written any more
        results: list[Any] = []
        draft.together(lambda: results.append(job.result()))
        if self._commits:
            return draft.final
        of_ranks: list[Written] = dist.gathered(results[0])
        self._commits = True
        self._job = self._thread.submit(lambda: draft.commit(of_ranks) if dist.is_main() else draft.final)
        return None

    def close(self) -> None:
        """Wait for this process's part of a save, and free the memory. No other rank is waited for."""
        self._thread.shutdown(wait=True)
        self._copy.close()

    def _writes(self, directory: Path, copies: dict[str, Tensor]) -> dict[Path, Write]:
        """Return what writes the Hugging Face files of each model, by their directory. Every rank calls it."""
        models = {("trainer", directory): self._actor}
        if self._critic is not None:
            models["trainer/critic", directory / "critic"] = self._critic
        return {place: model.gathered(_below(f"{folder}: model.", copies)) for (folder, place), model in models.items()}

    def _shards(self) -> dict[str, Tensor]:
        states = checkpoint.states_of(self._actor.engine, self._critic)
        return {f"{folder}: {name}": tensor for folder, state in states.items() for name, tensor in local_tensors(state).items()}


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names have the prefix, by the rest of the name."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
