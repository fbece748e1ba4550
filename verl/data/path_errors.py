"""What is said about a name in `data.train_files` or another key of files that names no file."""

import difflib
import glob
import itertools
import os
import re
from pathlib import Path

from verl.data.formats.files import FORMATS, SUFFIXES, suffix_of
from verl.errors import UserError

MOST_LOOKED_AT = 10_000  # files of a folder that was given in place of its files


def no_file(entry: str, key: str) -> UserError:
    """Return the error of a name without a file: a list or an address in its place, or a misspelled path."""
    return _missing_list(entry, key) or _address(entry, key) or _missing(Path(os.path.expanduser(entry)), key)


def is_file_name(name: str) -> bool:
    """Return whether a name ends like that of a data file."""
    return name.lower().endswith((*SUFFIXES, ".gz"))


def _missing_list(entry: str, key: str) -> UserError | None:
    """Return the error of several files in one text, separated by commas, semicolons or spaces; None if it is not that."""
    for separator in (",", ";", " "):
        parts = [part.strip() for part in entry.split(separator) if part.strip()]
        if len(parts) > 1 and all(is_file_name(part) or Path(os.path.expanduser(part)).is_file() for part in parts):
            return UserError(f"{entry!r} is one text with {len(parts)} files", where=key, fix=f"write a list: '{key}=[{','.join(parts)}]'")
    return None


def _address(entry: str, key: str) -> UserError | None:
    """Return the error of an address on the network; None if it is not that."""
    if "://" not in entry:
        return None
    on_hub = re.match(r"(?:https?://(?:www\.)?huggingface\.co/|hf://)datasets/([\w.-]+/[\w.-]+)", entry)
    fix = f"name the data set: {key}={on_hub[1]}" if on_hub else "download it, and give its path"
    return UserError(f"{entry!r} is an address, expected a file", where=key, fix=fix)


def _missing(path: Path, key: str) -> UserError:
    if glob.has_magic(str(path)):
        return UserError(f"no file matches {str(path)!r}", where=key, fix=f"check the path; the current folder is {Path.cwd()}")
    beside = sorted(other.name for other in path.parent.iterdir()) if path.parent.is_dir() else []
    same = [name for name in beside if name.lower() == path.name.lower()]  # another case
    near = same or difflib.get_close_matches(path.name, beside, n=1)
    if not beside and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+/[\w.-]+", str(path)) and not is_file_name(str(path)):
        *data_set, config = path.parts
        fix = f"for the configuration {config!r} of a data set on the Hub, write {key}={'/'.join(data_set)}:{config}"
        return UserError(f"no file {str(path)!r}", where=key, fix=f"{fix}. The current folder is {Path.cwd()}")
    hint = f"did you mean {path.parent / near[0]}? The" if near else "the" if beside else f"there is no folder {path.parent}. The"
    return UserError(f"no file {str(path)!r}", where=key, fix=f"{hint} current folder is {Path.cwd()}")


def files_in(folder: Path) -> str:
    """Say how to name the data files of a folder."""
    for pattern, every in (("*", folder.glob("*")), ("**/*", folder.rglob("*"))):
        files = itertools.islice(every, MOST_LOOKED_AT)
        if inside := sorted({file.name[file.name.lower().rindex(suffix_of(file)) :] for file in files if suffix_of(file) in SUFFIXES}):
            return f"name its files with a glob, such as '{folder}/{pattern}{inside[0]}'"
    return f"put data files into it ({FORMATS})"
