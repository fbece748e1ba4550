"""A model directory that verl has written, beside the model in the run and the original."""

from pathlib import Path

import torch
from safetensors import safe_open

from verl.data.pack import Document
from verl.prove import plain
from verl.prove.outcome import TOLERANCE, Outcome, compared
from verl.prove.subject import Subject

HALF = {"BF16": torch.bfloat16, "F16": torch.float16}  # by their names in safetensors


def loaded_again(subject: Subject, group: str, name: str, folder: Path, loss: float) -> Outcome:
    """Compare a written directory, loaded by transformers alone, with the loss of the model in the run, and with the original's tensors."""
    rows = subject.rendered(subject.test_file)
    found = plain.mean_loss(plain.load(folder), rows)
    differing, most = differing_tensors(subject.model, folder), rounding_on_disk(folder, rows)
    path = f"{len(differing)} tensors differ in name, shape or dtype, such as {differing[0]}" if differing else "same names, shapes, dtypes"
    path += f"; rounding on disk makes up to {most:.1e}" if most else ""
    differences = {"loss": abs(found - loss), **({"tensors": 1.0} if differing else {})}
    return compared(group, name, differences, path=path, tolerance=max(TOLERANCE, 2 * most))


def rounding_on_disk(folder: Path, rows: list[Document]) -> float:
    """Return how far the mean loss moves if weights move by up to half a unit in the last place of their dtype on disk; 0 for float32."""
    dtypes = [HALF[dtype] for _, dtype in tensors(folder).values() if dtype in HALF]
    if not dtypes:
        return 0.0
    losses = []
    for seed in range(4):
        model, generator = plain.load(folder), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in model.parameters() if seed else ():
                weight.mul_(1 + torch.finfo(dtypes[0]).eps * (torch.rand(weight.shape, generator=generator) - 0.5))
        losses.append(plain.mean_loss(model, rows))
    return max(losses) - min(losses)


def tensors(folder: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return shape and dtype of each tensor of a directory, by its name."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118, not a dictionary
                part = file.get_slice(name)
                found[name] = tuple(part.get_shape()), part.get_dtype()
    return found


def differing_tensors(first: Path, second: Path) -> list[str]:
    """Return the names of tensors that one directory lacks, or that have another shape or dtype in it."""
    one, two = tensors(first), tensors(second)
    return sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name))
