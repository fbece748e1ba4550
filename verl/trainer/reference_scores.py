"""The reference's log-probabilities of all trained tokens, computed once and kept in the run's directory, for later epochs and resumes.

Dimensions: N documents; V values of all documents in a row.
"""

import hashlib
import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from verl import dist
from verl.data.batch import Batch
from verl.data.loader import Loader, TokenizedRows
from verl.durable import flush, no_link, real_folder
from verl.engine.build import Built, whole_tensors
from verl.run import Run
from verl.trainer.validation import VALIDATION_ROWS

FOLDER = "reference"  # in the run's directory
SAVE_SECONDS = 300.0  # a run that is killed while it computes loses no more
CHUNK = 2**22  # numbers of a weight that are hashed at a time
Values = dict[int, np.ndarray]  # log-probabilities of each document, float32, by its number


@dataclass(frozen=True)
class ReferenceScores:
    """Computes log-probabilities under the model as it is now, unless they are in a file. Every rank calls it.

    Attributes:
        places: folders in which files may be: the run's own, in which new ones are written, and that of the run it resumes from.
        identity: what the log-probabilities depend on, besides the documents.
    """

    built: Built
    run: Run
    places: list[Path]
    identity: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def of(built: Built, run: Run) -> "ReferenceScores":
        """Return the scores of a model that has the weights which the run starts from."""
        own = run.directory / FOLDER
        other = None if run.checkpoint is None else run.checkpoint.resolve().parent / FOLDER
        places = [own, other] if other is not None and other != own.resolve() else [own]
        decisions = built.decisions
        settings = {"compute_dtype": str(decisions.compute_dtype), "attention": str(decisions.attention.kernel), "format": "1"}
        return ReferenceScores(built, run, places, {"model": weights_digest(built), **settings})

    def add_to(self, documents: Any, name: str, loader: Loader, *, steps: int | None = None) -> Any:
        """Return the documents with `ref_logprob_M`.

        Args:
            documents: Documents, or others that are a dataclass with `values`.
            name: name of the file, without its ending.
            loader: loader of these documents. Its micro-batches are those of training, so that the first step's margin is exactly 0.
            steps: score only the rows of so many steps of the first epoch; None: all rows.
        """
        file = ScoresFile(name, self.places, {**self.identity, "rows": rows_digest(documents)}, np.asarray(documents.trained_N))
        found, said = dist.from_main(file.read() if dist.is_main() else ({}, []))
        for line in said:
            self.run.say(line)
        missing = _rows_missing(documents, loader, steps, found)
        rows = len(np.unique(np.concatenate(missing))) if missing else 0
        self.run.say(f"reference: the initial model; {_told(name, rows, len(found) // documents.documents_per_row, file.own)}")
        if missing:
            found = self._compute(file, documents, loader, missing, found)
        nothing = np.zeros(0, dtype=np.float32)  # of rows that are in no step
        return replace(documents, values={"ref_logprob_M": [found.get(number, nothing) for number in range(len(documents.lengths_N))]})

    def _compute(self, file: "ScoresFile", documents: TokenizedRows, loader: Loader, missing: list[np.ndarray], found: Values) -> Values:
        mine: Values = {}
        saved = time.monotonic()
        for number, rows in enumerate(missing, start=1):
            mine |= score(self.built.engine, documents, loader.micro_batches(documents, rows))
            dist.moved()
            if number == len(missing) or dist.from_main(time.monotonic() - saved > SAVE_SECONDS):
                found = found | {index: values for of_rank in dist.gathered(mine) for index, values in of_rank.items()}
                mine, saved = {}, time.monotonic()
                if dist.is_main() and (problem := file.write(found)):
                    self.run.say(problem)
        return found


def score(engine: Any, documents: TokenizedRows, batches: list[Batch]) -> Values:
    """Return the log-probabilities of the documents in this rank's micro-batches, under the engine's current weights."""
    found: Values = {}
    for batch, out in zip(batches, engine.score(batches), strict=True):
        numbers = batch.sample_ids_S[: batch.documents].tolist()
        ends = np.cumsum(np.asarray(documents.trained_N)[numbers])
        found |= dict(zip(numbers, np.split(out.logprob_M.float().cpu().numpy(), ends), strict=False))
    return found


def _rows_missing(documents: TokenizedRows, loader: Loader, steps: int | None, found: Values) -> list[np.ndarray]:
    """Return the rows to score, as they are packed together: those of each step, or many at a time."""
    everything = np.arange(len(documents))
    chunks = [loader.rows(number) for number in range(steps)] if steps is not None else np.array_split(everything, _pieces(len(everything)))
    first = documents.documents_per_row
    return [rows for rows in chunks if any(int(row) * first not in found for row in rows)]


def _pieces(rows: int) -> int:
    return max(1, -(-rows // VALIDATION_ROWS))


def _told(name: str, rows: int, there: int, path: Path) -> str:
    what = {"train": "the training rows", "val": "the validation rows"}.get(name, f"{name.replace('-', ' ')} rows")
    if not rows:
        return f"its log-probabilities of {what} are read from {path.parent.name}/{path.name}"
    known = f", besides {there:,} that are there," if there else ""
    return f"computing its log-probabilities of {what} ({rows:,}){known} once; they are kept in {path.parent.name}/{path.name}"


# What they depend on


def weights_digest(built: Built) -> str:
    """Return a hash of all weights of the model. Every rank calls it; each tensor is gathered, and hashed where it is."""
    model = built.loaded.model if built.adapted is None else built.adapted
    with torch.no_grad():
        sums = [(name, str(tensor.dtype), list(tensor.shape), checksum(tensor)) for name, tensor in whole_tensors(model)]
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()


def checksum(tensor: Tensor) -> list[int]:
    """Return sums over the bits of a tensor that differ if any number differs or two are exchanged, as good as surely."""
    bits = tensor.detach().contiguous().flatten()
    bits = bits.view(torch.uint8 if bits.element_size() == 1 else torch.int16)
    place = torch.arange(1, min(CHUNK, max(1, len(bits))) + 1, device=bits.device) * 0x9E3779B1 % 0x7FFFFFFF
    total = torch.zeros(2, dtype=torch.int64, device=bits.device)
    for number, part in enumerate(bits.split(CHUNK)):
        wide = part.long() + 0x8000
        total += torch.stack([wide.sum(), (wide * place[: len(part)]).sum() * (2 * number + 1)])
    return [int(value) for value in total]


def rows_digest(documents: Any) -> str:
    """Return a hash of all token ids and of what is trained of them, of Documents or of `verl.data.mismatched.Mismatched`."""
    whole = getattr(documents, "documents", documents)
    print_of = whole.fingerprint
    parts = [print_of.ids, print_of.targets, len(documents.lengths_N), hashlib.sha256(documents.lengths_N.tobytes()).hexdigest()]
    parts += [hashlib.sha256(documents.answer_N.tobytes()).hexdigest()] if whole is not documents else []
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


# The file


@dataclass(frozen=True)
class ScoresFile:
    """A file of log-probabilities with a hash of them and what they depend on.

    Attributes:
        trained_N: number of log-probabilities of each document.
    """

    name: str
    places: list[Path]
    identity: dict[str, str]
    trained_N: np.ndarray

    @property
    def own(self) -> Path:
        return self.places[0] / f"{self.name}.safetensors"

    def read(self) -> tuple[Values, list[str]]:
        """Return the log-probabilities that are there, and lines about files that cannot be used."""
        said: list[str] = []
        for path in (place / self.own.name for place in self.places):
            if not path.is_file():
                continue
            values, why = self._read(path)
            if why is None:
                return values, said
            said.append(f"reference: {path} {why}; it is made anew")
        return {}, said

    def _read(self, path: Path) -> tuple[Values, str | None]:
        try:
            with safe_open(path, framework="numpy") as file:
                told = json.loads((file.metadata() or {})["scores"])
                numbers, values = file.get_tensor("numbers"), file.get_tensor("values")
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            return {}, f"is damaged ({type(error).__name__})"
        if told.get("digest") != _digest(numbers, values):
            return {}, "is damaged (its content does not have its hash)"
        other = [key for key, value in self.identity.items() if told.get(key) != value]
        if other:
            return {}, f"is of other {' and '.join(other)}"
        ends = np.cumsum(self.trained_N[numbers])
        return dict(zip(numbers.tolist(), np.split(values, ends), strict=False)), None

    def write(self, found: Values) -> str | None:
        """Replace the file, as a whole even if the power fails. Returns what to say if it cannot be written."""
        numbers = np.array(sorted(found), dtype=np.int64)
        values = np.concatenate([found[number] for number in numbers.tolist()])
        told = json.dumps({**self.identity, "digest": _digest(numbers, values)})
        try:
            _replace(self.own, save({"numbers": numbers, "values": values}, {"scores": told}))
        except OSError as error:
            return f"warning: the reference's log-probabilities are kept in memory, not in {self.own}: {error.strerror}"
        return None


def _digest(numbers: np.ndarray, values: np.ndarray) -> str:
    return hashlib.sha256(numbers.tobytes() + values.tobytes()).hexdigest()


def _replace(path: Path, content: bytes) -> None:
    real_folder(path.parent)
    temporary = path.with_name(f"{path.name}.{os.urandom(8).hex()}.tmp")
    try:
        with open(temporary, "xb", opener=no_link) as file:
            file.write(content)
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
