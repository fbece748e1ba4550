"""Runs at the start of each process that users' code starts with `multiprocessing`: makes the user's file importable there.

Such a process imports the functions that it runs by the name of their module. For a file, that name is one of verl.user_files, which a new
process does not know yet.
"""

import os
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

from verl import user_files

USER_FILE = "VERL_USER_FILE"  # the variable with the path of the file that the worker runs


def run_in_children(path: Path) -> None:
    """Let processes that this one starts by `spawn` or `forkserver` import a user's file under the same name as here."""
    os.environ[USER_FILE] = str(path.resolve())
    # A new process first runs the main module of this one, by its name, as after `python -m`.
    sys.modules["__main__"].__spec__ = ModuleSpec(__name__, None)


if __name__ == "__mp_main__":
    folder = Path(os.environ[USER_FILE]).parent
    user_files.package_of(folder)
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
