"""Reads a checkpoint back: weights, optimizer and random states into an engine, and the position of its run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from verl import dist
from verl.engine import damage
from verl.engine.checkpoint import SavedCritic, state_of
from verl.engine.engine import Engine
from verl.engine.position import Position
from verl.engine.stored_metadata import Reader, read_metadata
from verl.errors import UserError
from verl.typed_json import DamageError

Found = TypeVar("Found")
_ANOTHER = "resume from another checkpoint: trainer.resume_mode=resume_path trainer.resume_from_path=…/global_step_N"


def load(directory: Path, engine: Engine, critic: SavedCritic | None = None) -> None:
    """Load a checkpoint into an engine: trained weights, optimizer and random states. The world size may differ from that of the save.

    Raises:
        UserError: the checkpoint is from another model or optimizer, or has no critic.
    """
    _load_into(engine, directory / "trainer")
    if critic is not None:
        if not (directory / "trainer" / "critic").is_dir():
            fix = "restore algorithm.name, or start a new run from it: model.partial_pretrain=<this directory> trainer.resume_mode=disable"
            raise UserError("the checkpoint has no critic", where=str(directory), fix=fix)
        _load_into(critic.engine, directory / "trainer" / "critic")
    random_states = directory / "trainer" / f"rng_{dist.rank()}.safetensors"
    if random_states.exists():
        _restore_random_states(_undamaged(directory, lambda: damage.read_random_states(random_states)), engine.device)


def _load_into(engine: Engine, directory: Path) -> None:
    state = state_of(engine)
    _check_same_tensors(state, directory)
    try:
        dcp.load(state, storage_reader=Reader(directory), process_group=dist.group())  # in place: these are the engine's own tensors
    except CheckpointException as error:
        reason = next((str(failure) for failure, _ in error.failures.values()), "it cannot be read").splitlines()[0]
        what = f"the checkpoint is damaged: a tensor in its .distcp files cannot be read ({reason:.200})"
        raise UserError(what, where=str(directory), fix=_ANOTHER) from error
    engine.weights.publish()


def read_position(directory: Path) -> Position:
    """Read the position that a checkpoint was saved at. Raises UserError: its file is damaged."""
    return _undamaged(directory, lambda: damage.read_position(directory))


def _undamaged(directory: Path, read: Callable[[], Found]) -> Found:
    """Return what is read. Raises UserError that names the checkpoint: it is damaged."""
    try:
        return read()
    except DamageError as error:
        raise UserError(f"the checkpoint is damaged: {error}", where=str(directory), fix=_ANOTHER) from error


def _check_same_tensors(state: dict[str, Any], directory: Path) -> None:
    """Raise UserError if names, shapes or dtypes of the checkpoint's tensors differ from those of the state to load."""
    found = {
        name: (tensor.properties.dtype, tuple(tensor.size))
        for name, tensor in _undamaged(directory, lambda: read_metadata(directory)).state_dict_metadata.items()
        if isinstance(tensor, TensorStorageMetadata)
    }
    model = {f"model.{name}": tensor for name, tensor in state["model"].items()}
    optimizer = {f"optimizer.{name}.{key}": tensor for name, tensors in state["optimizer"].items() for key, tensor in tensors.items()}
    expected = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in {**model, **optimizer}.items()}
    if found == expected:
        return
    odd = min(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    there, here = (f"{tensors[odd][0]} {list(tensors[odd][1])}" if odd in tensors else "missing" for tensors in (found, expected))
    raise UserError(
        f"this run trains other tensors: {odd} is {there} in the checkpoint and {here} in this run",
        where=str(directory),
        fix="restore the model, model.lora_rank, model.param_dtype and optim.name, or start again with trainer.resume_mode=disable",
    )


def _restore_random_states(states: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
