"""Verifies a checkpoint that verl wrote before its model is loaded. Any other model directory has no manifest, and is not verified.

What a model is made of must be as it was written: weights, config, tokenizer and chat template. generation_config.json may be edited, and
documents may be added. Who changes another file knowingly deletes manifest.json; the directory is then a model like any other.
"""

import hashlib
import os
import re
import stat
from pathlib import Path

from verl.errors import UserError
from verl.manifest import MANIFEST, Entry, check_hashes, check_sizes, is_checkpoint, read_manifest
from verl.typed_json import DamageError, describe

EDITABLE = "generation_config.json"
# Files that decide what is loaded: if one is added, another model is loaded than was written.
_LOADED = re.compile(
    r".+\.(safetensors|jinja|py|model)|merges\.txt"
    r"|(config|adapter_config|tokenizer.*|special_tokens_map|added_tokens|vocab|prompt_format|.+\.index)\.json"
)
_verified: set[str] = set()  # of this process, for a cache that cannot be written


def verify(path: str) -> None:
    """Compare the files of a model with the manifest of its checkpoint.

    Sizes are always compared, and hashes once: what was found right is remembered in the user's cache until a file changes.

    Args:
        path: directory of a model, an adapter or a critic; a Hub name or a directory without a manifest is not checked.
    Raises:
        UserError: a file is missing, was added, or is not as it was written; or the manifest is malformed.
    """
    folder = Path(path).expanduser()
    root, prefix = (folder.parent, "critic/") if folder.name == "critic" and not is_checkpoint(folder) else (folder, "")
    if not is_checkpoint(root):
        return
    try:
        _verify(root, prefix)
    except DamageError as error:
        fix = f"restore the file, or load another checkpoint; if you changed it knowingly, delete {root / MANIFEST}"
        raise UserError(f"is damaged: {error}", where=path, fix=fix) from error


def _verify(root: Path, prefix: str) -> None:
    listed, found = read_manifest(root).files, _sizes(root / prefix, prefix)
    files = {name: entry for name, entry in listed.items() if _is_beside(name, prefix) and name != EDITABLE}
    check_sizes(files, found)
    if added := sorted(name for name in found.keys() - listed.keys() if _LOADED.fullmatch(name.removeprefix(prefix))):
        raise DamageError(f"{added[0]} is not in {MANIFEST}: it was added later")
    if not any(name.endswith(".safetensors") for name in files):
        raise DamageError(f"{MANIFEST} lists no weights")
    mark = _mark(root, files)
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"  # on each node, one process reads the files for all
    if is_first and mark.name not in _verified and not mark.exists():
        check_hashes(root, files)
        _remember(mark)


def _is_beside(name: str, prefix: str) -> bool:
    """Return whether a file is in the model's own folder, and in none below it."""
    return name.startswith(prefix) and "/" not in name.removeprefix(prefix)


def _sizes(folder: Path, prefix: str) -> dict[str, int]:
    """Return the size of each regular file in a folder; what is below it is not looked at."""
    try:
        stats = {one.name: one.stat(follow_symlinks=False) for one in os.scandir(folder)}
    except OSError as error:
        raise DamageError(f"{folder.name} {describe(error)}") from error
    if links := sorted(name for name, status in stats.items() if stat.S_ISLNK(status.st_mode) and _LOADED.fullmatch(name)):
        raise DamageError(f"{prefix}{links[0]} is a link")
    return {prefix + name: status.st_size for name, status in stats.items() if stat.S_ISREG(status.st_mode)}


def _mark(root: Path, files: dict[str, Entry]) -> Path:
    """Return the file in the user's cache that stands for these files, as they are now, being verified."""
    lines = []
    for name, entry in sorted(files.items()):
        status = (root / name).lstat()
        lines.append(f"{name}\0{entry.sha256}\0{status.st_size}\0{status.st_ino}\0{status.st_mtime_ns}\0{status.st_ctime_ns}")
    key = hashlib.sha256("\n".join([str(root.resolve()), *lines]).encode()).hexdigest()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "verl" / "verified" / key


def _remember(mark: Path) -> None:
    _verified.add(mark.name)
    try:
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
    except OSError:
        return  # the next process hashes again
