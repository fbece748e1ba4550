"""Files of a model directory stay inside it, and are files: an index or a link that leads elsewhere is refused, and so is a pipe."""

import json
import stat
from pathlib import Path

from verl.errors import UserError
from verl.regular_file import MAX_BYTES, read

TOKENIZERS, LARGEST_TOKENIZER = ("tokenizer.json", "vocab.json"), 2**30  # bytes


def check_inside(folder: Path) -> None:
    """Check the files of a model directory.

    Links into the folder itself are followed, and so are those of the Hub's cache, from `snapshots/<revision>` into `blobs`.

    Raises:
        UserError: a file is a link to outside, or no file, or far too large, or an index of weights names a file outside.
    """
    folder = folder.resolve()
    roots = [folder, *([folder.parent.parent / "blobs"] if folder.parent.name == "snapshots" else [])]
    for file in folder.iterdir():
        if file.is_symlink() and not any(file.resolve().is_relative_to(root) for root in roots):
            what = f"{file.name} is a link to {str(file.readlink())!r}, outside the directory"
            raise UserError(what, where=str(folder), fix="copy the file into the directory, or give the directory that has it")
        _check_file(file)
    for index in folder.glob("*.index.json"):
        for name in sorted(_names(index)):
            if Path(name).name != name:
                what = f"{index.name} names the file {name!r}, outside the directory"
                raise UserError(what, where=str(folder), fix="do not use this model: such a name is no mistake")


def _check_file(file: Path) -> None:
    """Raise UserError if a library that opens a file would wait for ever, or read more than fits into memory."""
    try:
        found = file.stat()
    except FileNotFoundError:  # a link to nowhere
        return
    fix = "remove it, or download the model again"
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
        raise UserError("is a pipe or a device, expected a file", where=str(file), fix=fix)
    if file.suffix == ".json" and found.st_size > (LARGEST_TOKENIZER if file.name in TOKENIZERS else MAX_BYTES):
        raise UserError(f"has {found.st_size:,} bytes, which no such file of a model has", where=str(file), fix=fix)


def _names(index: Path) -> set[str]:
    try:
        named = json.loads(read(index, follow=True))["weight_map"].values()
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return set()  # loading says what is wrong with it
    return {str(name) for name in named}
