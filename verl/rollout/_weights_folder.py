"""Folders with new weights for a server. One that a killed run has left behind is removed by the next run."""

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = "verl-weights-"
LOCK = "lock"  # held by the writer while it lives, on this machine and in its containers
SECONDS_TO_LOCK = 600.0  # a folder without a lock that is older than this has lost its writer


@contextmanager
def weights_folder(place: Path) -> Iterator[Path]:
    """Yield a new folder that others can read, and remove it afterwards."""
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))
    try:
        with (folder / LOCK).open("w") as lock:
            with suppress(OSError):  # a network folder without locks
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            folder.chmod(0o755)  # the server may run as another user
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_abandoned(place: Path) -> None:
    """Remove the folders of this user whose writers have ended."""
    for folder in place.glob(f"{PREFIX}*"):
        with suppress(OSError):  # another run has just removed it
            found = folder.lstat()
            if found.st_uid == os.geteuid() and not folder.is_symlink() and _is_abandoned(folder, time.time() - found.st_mtime):
                shutil.rmtree(folder, ignore_errors=True)


def _is_abandoned(folder: Path, age: float) -> bool:
    try:
        with (folder / LOCK).open("r") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return age > SECONDS_TO_LOCK
    except OSError:  # it is locked
        return False
    return True
