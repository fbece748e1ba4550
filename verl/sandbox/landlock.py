"""A wall around files by Landlock: the kernel refuses a program all files but those named. It needs Linux 5.13, and no rights.

Landlock does not refuse to look up names and sizes, and to change modes and owners; the latter is not on the list of `seccomp`.
Source: landlock(7).
"""

import os
import stat
import struct
from collections.abc import Iterable

from verl.sandbox import kernel

VERSION_FLAG = 1
WRITE_FILE, READ_FILE, READ_DIR = 1 << 1, 1 << 2, 1 << 3
REMOVE_DIR, REMOVE_FILE, MAKE_DIR, MAKE_FILE, MAKE_LINK = 1 << 4, 1 << 5, 1 << 7, 1 << 8, 1 << 12
RENAME, TRUNCATE = 1 << 13, 1 << 14
OF_FILES = WRITE_FILE | READ_FILE | TRUNCATE
IN_FOLDER = OF_FILES | READ_DIR | REMOVE_DIR | REMOVE_FILE | MAKE_DIR | MAKE_FILE | MAKE_LINK | RENAME
RIGHTS = (13, 14, 15, 15, 16)  # how many rights of files each version has, from version 1; the last number holds for newer ones
PATH_BENEATH = 1


def version() -> int:
    """Return the kernel's version of Landlock; 0: it has none, or it is switched off."""
    try:
        return kernel.system_call("landlock_create_ruleset", None, 0, VERSION_FLAG)
    except OSError:
        return 0


def restrict(readable: Iterable[str], folder: str) -> None:
    """Refuse this process, for good, all files but these.

    Args:
        readable: files and folders that it may read.
        folder: where it may do what it likes.
    Raises:
        OSError: the kernel has no Landlock.
    """
    handled = (1 << RIGHTS[min(version(), len(RIGHTS)) - 1]) - 1
    rules = kernel.system_call("landlock_create_ruleset", struct.pack("=Q", handled), 8, 0)
    for path in readable:
        _allow(rules, path, handled & (WRITE_FILE | READ_FILE | READ_DIR if path.startswith("/dev/") else READ_FILE | READ_DIR))
    _allow(rules, folder, handled & IN_FOLDER)
    kernel.call("prctl", kernel.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)  # the kernel wants it of a process without rights
    kernel.system_call("landlock_restrict_self", rules, 0)
    os.close(rules)


def _allow(rules: int, path: str, rights: int) -> None:
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
        rights &= OF_FILES
    kernel.system_call("landlock_add_rule", rules, PATH_BENEATH, struct.pack("=Qi", rights, descriptor), 0)
    os.close(descriptor)
