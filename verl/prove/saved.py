"""What two model directories have on disk."""

from pathlib import Path

from safetensors import safe_open


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
