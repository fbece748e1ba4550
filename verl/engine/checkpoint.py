"""Checkpoints: Hugging Face directories from which a run can resume, committed by rename.

    global_step_N/
      config.json  generation_config.json  model*.safetensors  tokenizer*  chat_template.jinja   (LoRA: adapter_*)
      manifest.json       size and sha256 of each file
      trainer/            trained weights and optimizer (torch.distributed.checkpoint, readable at any world size),
                          state.json (step and data position), rng_R.safetensors (random states of rank R)
      critic/             Hugging Face files of the critic, if the method has one; its optimizer is in trainer/critic/

A directory is written under a temporary name, flushed to disk and renamed, so a directory with the final name is complete.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor

from verl import __version__, dist
from verl.data.fingerprint import Fingerprint
from verl.durable import flush, replace_text
from verl.engine.engine import Engine
from verl.engine.optim import optimizer_state
from verl.errors import UserError

LATEST = "latest_checkpointed_iteration.txt"
MANIFEST = "manifest.json"
_STEP = re.compile(r"global_step_(\d+)")


class SavedCritic(Protocol):
    """A second engine of a run, with a function that writes its Hugging Face files."""

    @property
    def engine(self) -> Engine: ...

    def export(self, directory: Path) -> None: ...


@dataclass(frozen=True)
class Position:
    """Progress of a run, and the identity of its data, from which it resumes.

    Attributes:
        step: finished optimizer steps.
        tokens: tokens seen so far over all ranks, without filler.
        supervised_tokens: trained tokens so far.
        rows: rows of the training set.
        rows_per_step: global batch size in rows.
        seed: seed of the row order.
        data_fingerprint: identity of the tokenized rows; in checkpoints of older versions, a hash that cannot be compared.
        drawn: prompts drawn so far, in reinforcement learning.
        kl_coef: current KL coefficient, if it is adaptive.
    """

    step: int
    tokens: int
    supervised_tokens: int
    rows: int
    rows_per_step: int
    seed: int
    data_fingerprint: Fingerprint | str
    drawn: int = 0
    kl_coef: float | None = None


def save(root: Path, engine: Engine, position: Position, export: Callable[[Path], None], critic: SavedCritic | None = None) -> Path:
    """Write and commit `global_step_N`. Every rank calls it.

    Args:
        root: the run's directory.
        export: writes the Hugging Face files into a directory; called on every rank.
        critic: saved too, in a separate directory.
    Returns:
        the committed directory.
    Raises:
        DiskError: the disk is full or fails. Earlier checkpoints remain.
    """
    final = root / f"global_step_{position.step}"
    temporary = root / f"{final.name}.tmp"
    from verl.engine.checkpoint_disk import disk_errors_named

    with disk_errors_named(temporary, [*committed(root)[-1:]], state_bytes(engine, critic)):
        if dist.is_main():
            shutil.rmtree(temporary, ignore_errors=True)
            (temporary / "trainer").mkdir(parents=True)
        dist.barrier()
        export(temporary)
        dcp.save(state_of(engine), checkpoint_id=temporary / "trainer", process_group=dist.group())
        if critic is not None:
            dcp.save(state_of(critic.engine), checkpoint_id=temporary / "trainer" / "critic", process_group=dist.group())
            critic.export(temporary / "critic")
        save_file(_random_states(engine.device), temporary / "trainer" / f"rng_{dist.rank()}.safetensors")
        if dist.is_main():
            (temporary / "trainer" / "state.json").write_text(json.dumps(asdict(position), indent=2) + "\n")
        dist.barrier()
        if dist.is_main():
            _write_manifest(temporary, position.step)
            _commit(temporary, final)
    dist.barrier()
    return final


def newest(root: Path, say: Callable[[str], None]) -> Path | None:
    """Return the newest committed checkpoint under `root` that matches its manifest. Rank 0 checks, and all ranks get the result.

    Damaged checkpoints are skipped, and the reason is reported.

    Raises:
        UserError: there are checkpoints, but all are damaged.
    """
    found = dist.from_main(_newest(root, say) if dist.is_main() else None)
    if isinstance(found, UserError):
        raise found
    return found


def _newest(root: Path, say: Callable[[str], None]) -> Path | UserError | None:
    directories = committed(root)
    for directory in reversed(directories):
        damage = find_damage(directory)
        if damage is None:
            return directory
        say(f"skipping {directory.name}: {damage}")
    if directories:
        return UserError(
            "every checkpoint is damaged", where=str(root), fix="move the directory away, and start again with trainer.resume_mode=disable"
        )
    return None


def committed(root: Path) -> list[Path]:
    """Return the committed checkpoints of a run's directory, oldest first."""
    found = [(int(match[1]), path) for path in root.glob("global_step_*") if (match := _STEP.fullmatch(path.name)) and path.is_dir()]
    return [path for _, path in sorted(found)]


def find_damage(directory: Path) -> str | None:
    """Check a checkpoint's files against its manifest. Return what is wrong, or None."""
    try:
        files: dict[str, dict[str, Any]] = json.loads((directory / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"no readable {MANIFEST} ({type(error).__name__})"
    for name, expected in files.items():
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["size"]:
            return f"{name} has {path.stat().st_size} bytes, not {expected['size']}"
    sums = _checksums(directory, list(files))
    wrong = [name for name, expected in files.items() if sums[name] != expected["sha256"]]
    return f"{wrong[0]} does not match its checksum" if wrong else None


def prune(root: Path, keep: int | None) -> None:
    """Delete all but the newest `keep` checkpoints; None or -1 keeps all. Call it only after the newest one is committed."""
    if keep is None or keep == -1 or not dist.is_main():
        return
    for directory in committed(root)[:-keep]:
        shutil.rmtree(directory)


def remove_unfinished(root: Path) -> None:
    """Delete unfinished checkpoints that a killed run left behind."""
    if dist.is_main():
        for path in root.glob("global_step_*.tmp"):
            shutil.rmtree(path)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def state_of(engine: Engine) -> dict[str, Any]:
    """Return the trained weights and the optimizer state by parameter name. Frozen weights are not saved; they come from the base model.

    The engine owns these tensors, so loading into them restores it.
    """
    trained = engine.weights.trained
    optimizer = {name: optimizer_state(engine.optimizer, parameter) for name, parameter in trained.items()}
    return {"model": {name: p.detach() for name, p in trained.items()}, "optimizer": optimizer}


def state_bytes(engine: Engine, critic: SavedCritic | None = None) -> int:
    """Return the bytes of the trained weights and the optimizer, of all ranks together; those of a critic too."""
    states = [state_of(one) for one in (engine, *(() if critic is None else (critic.engine,)))]
    tensors = [tensor for state in states for part in (state["model"], *state["optimizer"].values()) for tensor in part.values()]
    return sum(tensor.numel() * tensor.dtype.itemsize for tensor in tensors)


def _random_states(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    return {**states, "cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else states


def _write_manifest(directory: Path, step: int) -> None:
    names = sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())
    sums = _checksums(directory, names)
    files = {name: {"size": (directory / name).stat().st_size, "sha256": sums[name]} for name in names}
    manifest = {"verl": __version__, "step": step, "world_size": dist.world_size(), "files": files}
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def _checksums(directory: Path, names: list[str]) -> dict[str, str]:
    with ThreadPoolExecutor() as pool:  # hashing releases the GIL, so files are read in parallel
        return dict(zip(names, pool.map(lambda name: _sha256(directory / name), names), strict=True))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _commit(temporary: Path, final: Path) -> None:
    for path in [*temporary.rglob("*"), temporary]:
        path.chmod(0o777 & ~_umask() if path.is_dir() else 0o666 & ~_umask())  # safetensors makes files that only the owner can read
        flush(path)
    if final.exists():  # left by an abandoned run; a committed checkpoint is never overwritten in place
        shutil.rmtree(final)
    temporary.rename(final)
    replace_text(final.parent / LATEST, _STEP.fullmatch(final.name)[1] + "\n")  # type: ignore[index]
    flush(final.parent)
