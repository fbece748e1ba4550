"""What is said about a name in `data.train_files` or another key of files that names no file."""

import difflib
import glob
import itertools
import os
import re
from pathlib import Path

from verl.data.formats.files import FORMATS, SUFFIXES, TEXT_SUFFIXES, suffix_of
from verl.errors import UserError

# Files beside data: descriptions, and what `save_to_disk` of Hugging Face datasets writes about it.
NO_DATA = re.compile(r"(?:(?:readme|licen[sc]e|changelog)(?:\..*)?|(?:dataset_dict|dataset_infos?|state)\.json)", re.IGNORECASE)
FILES_SEARCHED, GLOBS_SHOWN = 10_000, 4


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


def files_in(folder: Path, *, for_training: bool) -> str:
    """Say how to name the data files of a folder and its subfolders: those to train or to evaluate with, if names tell them apart."""
    if (folder / "config.json").is_file():
        return "it is a model's: name a data file, such as train.jsonl"
    found = _data_files(folder)
    words = ("train",) if for_training else ("test", "val", "dev")
    named = [file for file in found if any(word in str(file.relative_to(folder)).lower() for word in words)] or found
    patterns = list(dict.fromkeys(_glob(file, folder, named, words) for file in named))
    if not patterns:
        return f"put data files into it ({FORMATS})"
    if len(patterns) == 1:
        return f"name its files with a glob, such as '{patterns[0]}'"
    shown = " or ".join(f"'{pattern}'" for pattern in patterns[:GLOBS_SHOWN])
    more = f" ({len(patterns) - GLOBS_SHOWN} more)" if len(patterns) > GLOBS_SHOWN else ""
    return f"name its files with a glob, such as {shown}{more}, or several in a list"


def _data_files(folder: Path) -> list[Path]:
    """Return the files with rows: plain text only if there is nothing else, because a README would be trained."""
    inside = itertools.islice(folder.rglob("*"), FILES_SEARCHED)
    files = sorted(file for file in inside if suffix_of(file) in SUFFIXES and not NO_DATA.fullmatch(file.name) and file.is_file())
    seen = [file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts)]
    return [file for file in seen if suffix_of(file) not in TEXT_SUFFIXES] or seen


def _glob(file: Path, folder: Path, named: list[Path], words: tuple[str, ...]) -> str:
    """Return a glob of the named files of the same format, or of those in the same folder; if others match it, the file."""
    end = file.name[file.name.lower().rindex(suffix_of(file)) :]
    is_flat = all(other.parent == folder for other in named if other.name.endswith(end))
    within = [(file.parent, f"*{word}*{end}") for word in words if word in file.name]
    for place, pattern in ((folder, f"*{end}" if is_flat else f"**/*{end}"), (file.parent, f"*{end}"), *within):
        if set(place.glob(pattern)) <= set(named):
            return f"{place}/{pattern}"
    return str(file)
