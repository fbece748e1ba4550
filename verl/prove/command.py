"""Runs the proofs of `verl prove MODEL`, and prints their table."""

import importlib
import json
import pkgutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import torch
from transformers import PretrainedConfig

from verl.errors import EXIT_CODE, UserError
from verl.models.load import loading
from verl.progress import quiet_libraries
from verl.prove import proofs
from verl.prove.outcome import Outcome, failed, refused
from verl.prove.proofs import training
from verl.prove.report import Report, summary
from verl.prove.subject import Subject, with_config
from verl.prove.twin import randomness, read_config, settle, write_twin

SECONDS = 30  # after which a line that is not finished says so, again and again
FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken")  # of a Hub model
GROUPS = ("data", "fine-tuning", "experts", "adapter", "generation", "reinforcement")


def prove(path: str, *, real: bool = False, json_file: Path | None = None) -> int:
    """Run all proofs of a model, print each as it is finished, and write what they found as JSON if asked for.

    Args:
        path: a model directory, a Hub name, or a config.json.
        real: whether to prove the model itself, in place of a tiny twin of its architecture.
    Returns:
        the exit code: 0, 1 if anything is wrong, or 2 if verl refuses to fine-tune the model.
    Raises:
        UserError: no such model, or there can be no twin of it.
    """
    since = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="verl-prove-") as scratch, quiet_libraries():
        warnings.filterwarnings("ignore", module="peft")  # between the lines of the table
        with told_while("the model is read" if real else "its twin is made"):
            subject = make_subject(path, Path(scratch), real=real)
        report, found = Report(subject), []
        for outcome in outcomes(subject):
            report.show(outcome)
            found.append(outcome)
    seconds = time.perf_counter() - since
    report.end(found, seconds)
    if json_file is not None:
        json_file.expanduser().write_text(json.dumps(summary(subject, found, seconds), indent=1) + "\n", encoding="utf-8")
    return exit_code(found)


def exit_code(found: Sequence[Outcome]) -> int:
    """Return the exit code of what was found."""
    if any(outcome.state == "wrong" for outcome in found):
        return 1
    return EXIT_CODE if any(outcome.name == training.NAME and outcome.state == "refused" for outcome in found) else 0


def make_subject(path: str, folder: Path, *, real: bool) -> Subject:
    """Read the config, and write the twin, or what stands for the model itself.

    Raises:
        UserError: no such model, or there can be no twin of it.
    """
    config = read_config(path)
    local = Path(path).expanduser()
    origin = None if local.is_file() else path
    random = randomness(config.get_text_config(decoder=True).to_dict())
    if not real:
        model = write_twin(config, folder / "twin")
        return Subject(path, model, folder, read_config(str(model)), config, origin, random)
    if origin is None:
        raise UserError("is a config without weights", where=path, fix="leave out --real, or give a model directory or a Hub name")
    model = still(local if local.is_dir() else _downloaded(path), config, folder / "still")
    return Subject(path, model, folder, read_config(str(model)), config, origin, random)


def still(model: Path, config: PretrainedConfig, target: Path) -> Path:
    """Return a model directory without what is random and without the routers' loss, which have lines of their own: itself, or another."""
    stated = json.loads((model / "config.json").read_text(encoding="utf-8"))
    values = json.loads(json.dumps(stated))
    settle(values, config.to_dict())
    return model if values == stated else with_config(model, values, target)


def _downloaded(name: str) -> Path:
    """Return the directory of a Hub model, in the Hub's cache."""
    from huggingface_hub import snapshot_download

    with loading("model", name):
        return Path(snapshot_download(name, allow_patterns=list(FILES)))


def modules() -> list[ModuleType]:
    """Return the proofs, in the order of the table."""
    found = [importlib.import_module(f"{proofs.__name__}.{entry.name}") for entry in pkgutil.iter_modules(proofs.__path__)]
    return sorted(found, key=lambda proof: GROUPS.index(proof.GROUP))


def outcomes(subject: Subject) -> Iterator[Outcome]:
    """Yield the outcome of each proof."""
    for proof in modules():
        with told_while(f"{proof.NAME} is looked at"):
            found = outcome_of(proof, subject)
        yield found


def outcome_of(proof: ModuleType, subject: Subject) -> Outcome:
    """Run one proof. Whatever it raises is an outcome, too."""
    try:
        found: Outcome = proof.prove(subject)
    except UserError as error:
        found = refused(proof.GROUP, proof.NAME, error)
    except Exception as error:  # this is what is looked for
        found = failed(proof.GROUP, proof.NAME, error)
    return replace(found, found=subject.named(found.found))


@contextmanager
def told_while(what: str) -> Iterator[None]:
    """Say every half minute on standard error that something still runs. A signal does so: a thread would not live in forked ranks."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    since = time.perf_counter()

    def tell(*_: object) -> None:
        print(f"… {what}, for {time.perf_counter() - since:.0f} seconds", file=sys.__stderr__, flush=True)

    before = signal.signal(signal.SIGALRM, tell)
    signal.setitimer(signal.ITIMER_REAL, SECONDS, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def use_cpu() -> None:
    """Hide GPUs, which a tiny model does not need: what is proved is the arithmetic of float32. Called before CUDA is used."""
    import os

    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(max(1, min(4, torch.get_num_threads())))
