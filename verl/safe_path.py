"""Where Python looks for modules: not in the current folder, whose files must not be taken for libraries.

A folder of data may hold a `transformers.py` or a `math_verify.py` that somebody else has put there. `python -m` looks into the current
folder before all others, so this file, which is imported first, removes it from the path of `python -m verl…`, and of `verl` if it is
there by an empty entry of PYTHONPATH. Processes that verl starts do not look there either. A module that the user names in the config is
found there all the same, after all libraries (`verl.user_files.from_name`).
"""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

_HOME = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # the folder that has verl: site-packages, or a checkout
_HAS_FLAG = sys.version_info >= (3, 11)  # Python 3.10 has no safe path


def without_current_folder(path: Sequence[str]) -> list[str]:
    """Return a path without the current folder. If that is a checkout of verl, it is at the end, behind all libraries."""
    kept = [entry for entry in path if not _is_current(entry)]
    return [*kept, _HOME] if _is_current(_HOME) and len(kept) < len(path) else kept


def command(module: str, arguments: Sequence[str]) -> list[str]:
    """Return the command that runs a module of verl as `python -m` does, but not with the current folder first."""
    return [sys.executable, "-u", *(["-P"] if _HAS_FLAG else []), "-m", module, *arguments]


def variables() -> dict[str, str]:
    """Return the environment variables with which `command` finds verl, if it is in the current folder and nowhere else."""
    if not _is_current(_HOME):
        return {}
    return {"PYTHONPATH": os.pathsep.join([_HOME, *filter(None, [os.environ.get("PYTHONPATH")])])}


@contextmanager
def guarded() -> Iterator[None]:
    """In this context, new interpreters do not look into the current folder, not even while they start (Python 3.11 and newer)."""
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        del os.environ["PYTHONSAFEPATH"]
        if before is not None:
            os.environ["PYTHONSAFEPATH"] = before


def _is_current(entry: str) -> bool:
    try:
        return entry in ("", ".") or os.path.samefile(entry, os.getcwd())
    except OSError:  # there is no such folder
        return False


def _is_unmeant() -> bool:
    """Return whether this process is a command of verl that has the current folder on its path, though nobody asked for it."""
    words = sys.orig_argv
    named = words[words.index("-m") + 1 :][:1] if "-m" in words else []
    if sys.argv[:1] == ["-m"]:  # while Python looks for the module
        return bool(named) and named[0].partition(".")[0] == "verl"
    is_command = os.path.basename(sys.argv[0] if sys.argv else "") == "verl"
    return is_command and "" in os.environ.get("PYTHONPATH", "-").split(os.pathsep)


if _is_unmeant():
    sys.path[:] = without_current_folder(sys.path)
