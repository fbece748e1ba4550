"""The two walls around a program's files, and what a program may read behind them."""

import os
import site
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Protocol

from verl.sandbox import folder as _folder
from verl.sandbox import landlock, mounts

SYSTEM = ("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/share/zoneinfo", "/etc/localtime", "/etc/ld.so.cache")
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")


class Wall(Protocol):
    """A wall, as the fork server uses it. Each method raises an OSError if the system does not allow what it does."""

    def begin(self) -> None:
        """Prepare the fork server. It may return in another process."""
        ...

    def make_folder(self) -> str | None:
        """Return a new folder for a program; None: it makes its own."""
        ...

    def enclose(self, folder: str | None, size: int, files: int) -> str:
        """Enclose this process, which is a program's. Return its folder."""
        ...

    def is_full(self, folder: str | None, process: int, size: int, files: int) -> bool:
        """Return whether a program has written more than it may."""
        ...

    def remove(self, folder: str | None) -> None:
        """Remove an ended program's folder."""
        ...


class Mounts:
    """A file system of its own, see `mounts`. Folders are in memory, and the kernel limits them."""

    def begin(self) -> None:
        mounts.enter(readable())

    def make_folder(self) -> str | None:
        return None

    def enclose(self, folder: str | None, size: int, files: int) -> str:
        return mounts.own_folder(size, files)

    def is_full(self, folder: str | None, process: int, size: int, files: int) -> bool:
        return False

    def remove(self, folder: str | None) -> None: ...


class Landlock:
    """Refused files, see `landlock`. Folders are on disk, and are measured while a program runs."""

    def begin(self) -> None:
        if landlock.version() == 0:
            raise OSError("the kernel has no Landlock, or it is switched off")

    def make_folder(self) -> str | None:
        return tempfile.mkdtemp(prefix="verl-sandbox-")

    def enclose(self, folder: str | None, size: int, files: int) -> str:
        assert folder is not None
        landlock.restrict(readable(), folder)
        return folder

    def is_full(self, folder: str | None, process: int, size: int, files: int) -> bool:
        return _folder.holds_more_than(str(folder), process, size, files)

    def remove(self, folder: str | None) -> None:
        _folder.remove(str(folder))


WALLS: dict[str, Wall] = {"mounts": Mounts(), "landlock": Landlock()}  # the first that the system allows is taken


def readable() -> list[str]:
    """Return the files and folders that a program may read: Python's libraries, the system's, and devices without content."""
    own = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    python = [os.path.join(prefix, "lib") for prefix in (sys.prefix, sys.base_prefix)]
    packages = [path for path in [*site.getsitepackages(), *sys.path] if Path(path).name in ("site-packages", "dist-packages")]
    libraries = sorted({path for path in [*own, *python, *packages, *SYSTEM] if os.path.exists(path)})
    outermost = [path for path in libraries if not any(path.startswith(f"{other}/") for other in libraries)]
    return [*outermost, *filter(os.path.exists, DEVICES)]
