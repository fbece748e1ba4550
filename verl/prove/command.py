"""Runs the proofs of `verl prove MODEL`, and prints their table."""

import importlib
import json
import pkgutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch

from verl.errors import UserError
from verl.progress import quiet_libraries
from verl.prove import proofs
from verl.prove.outcome import Outcome, failed, refused
from verl.prove.report import show, summary
from verl.prove.subject import Subject
from verl.prove.twin import randomness, read_config, write_twin
from verl.regular_file import check_output

GROUPS = ("data", "fine-tuning", "experts", "adapter", "generation", "reinforcement")


def prove(path: str, *, real: bool = False, json_file: Path | None = None) -> bool:
    """Run all proofs of a model, print what they found, and write it as JSON if asked for.

    Args:
        path: a model directory, a Hub name, or a config.json.
        real: whether to prove the model itself, in place of a tiny twin of its architecture.
    Returns:
        whether nothing was wrong.
    Raises:
        UserError: no such model, or there can be no twin of it.
    """
    if json_file is not None:
        check_output(json_file)
    since = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="verl-prove-") as scratch, quiet_libraries():
        subject = make_subject(path, Path(scratch), real=real)
        found = list(outcomes(subject))
    seconds = time.perf_counter() - since
    show(subject, found, seconds)
    if json_file is not None:
        json_file.expanduser().write_text(json.dumps(summary(subject, found, seconds), indent=1) + "\n", encoding="utf-8")
    return all(outcome.state != "wrong" for outcome in found)


def make_subject(path: str, folder: Path, *, real: bool) -> Subject:
    """Read the config, and write the twin.

    Raises:
        UserError: no such model, or there can be no twin of it.
    """
    config = read_config(path)
    local = Path(path).expanduser()
    origin = None if local.is_file() else path
    if real:
        if origin is None:
            raise UserError("is a config without weights", where=path, fix="leave out --real, or give a model directory or a Hub name")
        return Subject(path, local, folder, config, config, origin)
    model = write_twin(config, folder / "twin")
    random = randomness(config.get_text_config(decoder=True).to_dict())
    return Subject(path, model, folder, read_config(str(model)), config, origin, random)


def modules() -> list[ModuleType]:
    """Return the proofs, in the order of the table."""
    found = [importlib.import_module(f"{proofs.__name__}.{entry.name}") for entry in pkgutil.iter_modules(proofs.__path__)]
    return sorted(found, key=lambda proof: GROUPS.index(proof.GROUP))


def outcomes(subject: Subject) -> Iterator[Outcome]:
    """Yield the outcome of each proof."""
    for proof in modules():
        yield outcome_of(proof, subject)


def outcome_of(proof: ModuleType, subject: Subject) -> Outcome:
    """Run one proof. Whatever it raises is an outcome, too."""
    try:
        found: Outcome = proof.prove(subject)
    except UserError as error:
        return refused(proof.GROUP, proof.NAME, error)
    except Exception as error:  # this is what is looked for
        return failed(proof.GROUP, proof.NAME, error)
    return found


def use_cpu() -> None:
    """Hide GPUs, which a tiny model does not need: what is proved is the arithmetic of float32. Called before CUDA is used."""
    import os

    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(max(1, min(4, torch.get_num_threads())))
