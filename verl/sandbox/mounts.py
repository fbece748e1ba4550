"""A wall around files by namespaces: programs see a file system that has Python's libraries, read-only, and a folder in memory.

They have no network, and process numbers of their own. It needs user namespaces, which some systems and most containers forbid.
Sources: user_namespaces(7), mount_namespaces(7), pivot_root(2), mount_setattr(2).
"""

import os
import struct
from collections.abc import Iterable

from verl.sandbox import kernel

NEW_MOUNTS, NEW_NAMES, NEW_IPC, NEW_USER, NEW_PROCESSES, NEW_NETWORK = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
NO_SETUID, NO_DEVICES, NO_PROGRAMS, BIND, RECURSIVE, PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
DETACH = 2
HERE = (1 << 64) - 100  # AT_FDCWD
AT_RECURSIVE = 0x8000
READ_ONLY = 1
ROOT = "/proc"  # where the new file system is built: a folder that is always there and that holds nothing a program may read
FOLDER = "/box"  # of each program


def enter(readable: Iterable[str]) -> None:
    """Put this process into new namespaces and return in a child, the first process there. This process waits for its end, and ends too.

    Raises:
        OSError: the system does not allow it. The process can then not be used for anything else.
    """
    user, group = os.geteuid(), os.getegid()
    kernel.call("unshare", NEW_USER | NEW_MOUNTS | NEW_PROCESSES | NEW_NETWORK | NEW_IPC | NEW_NAMES)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    _change_root(readable)
    _continue_in_child()


def own_folder(size: int, files: int) -> str:
    """Give this process a folder in memory that no other sees. Return its path.

    Args:
        size: bytes that fit into it.
        files: how many files and folders it may have.
    """
    kernel.call("unshare", NEW_MOUNTS)
    options = f"size={size},nr_inodes={files},mode=700".encode()
    kernel.call("mount", b"box", FOLDER.encode(), b"tmpfs", NO_SETUID | NO_DEVICES | NO_PROGRAMS, options)
    return FOLDER


def _change_root(readable: Iterable[str]) -> None:
    kernel.call("mount", b"none", b"/", None, RECURSIVE | PRIVATE, None)
    kernel.call("mount", b"root", ROOT.encode(), b"tmpfs", NO_SETUID | NO_PROGRAMS, b"size=1m,mode=755")
    for path in readable:
        _show(path)
    os.mkdir(ROOT + FOLDER)
    os.chdir(ROOT)
    _make_read_only(".", recursive=False)
    kernel.system_call("pivot_root", b".", b".")  # the old root is now on top of the new one
    kernel.call("umount2", b".", DETACH)
    os.chdir("/")


def _show(path: str) -> None:
    target, is_device = ROOT + path, path.startswith("/dev/")
    os.makedirs(target if os.path.isdir(path) else os.path.dirname(target), exist_ok=True)
    if not os.path.isdir(path):
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
    kernel.call("mount", os.path.realpath(path).encode(), target.encode(), None, BIND | RECURSIVE, None)
    if not is_device:
        _make_read_only(target, recursive=True)


def _make_read_only(path: str, *, recursive: bool) -> None:
    attributes = struct.pack("=QQQQ", READ_ONLY | NO_SETUID, 0, 0, 0)
    kernel.system_call("mount_setattr", HERE, path.encode(), AT_RECURSIVE if recursive else 0, attributes, len(attributes))


def _continue_in_child() -> None:
    child = os.fork()
    if child:
        os.closerange(0, os.sysconf("SC_OPEN_MAX"))  # whoever waits for the end of a connection shall not wait for this process
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 0xFF)
    kernel.call("prctl", kernel.PR_SET_PDEATHSIG, kernel.SIGKILL, 0, 0, 0)
