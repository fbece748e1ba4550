"""Files of a model directory stay inside it: an index or a link that leads elsewhere is refused."""

import json
from pathlib import Path

from verl.errors import UserError


def check_inside(folder: Path) -> None:
    """Check the files of a model directory.

    Links into the folder itself are followed, and so are those of the Hub's cache, from `snapshots/<revision>` into `blobs`.

    Raises:
        UserError: a file is a link to outside, or an index of weights names a file outside.
    """
    folder = folder.resolve()
    roots = [folder, *([folder.parent.parent / "blobs"] if folder.parent.name == "snapshots" else [])]
    for file in folder.iterdir():
        if file.is_symlink() and not any(file.resolve().is_relative_to(root) for root in roots):
            what = f"{file.name} is a link to {str(file.readlink())!r}, outside the directory"
            raise UserError(what, where=str(folder), fix="copy the file into the directory, or give the directory that has it")
    for index in folder.glob("*.index.json"):
        for name in sorted(_names(index)):
            if Path(name).name != name:
                what = f"{index.name} names the file {name!r}, outside the directory"
                raise UserError(what, where=str(folder), fix="do not use this model: such a name is no mistake")


def _names(index: Path) -> set[str]:
    try:
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return set()  # loading says what is wrong with it
    return {str(name) for name in named}
