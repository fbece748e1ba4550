"""Functions of the C library and calls of the kernel that Python does not have."""

import ctypes
import os
import platform

NUMBERS = {"landlock_create_ruleset": 444, "landlock_add_rule": 445, "landlock_restrict_self": 446, "mount_setattr": 442}
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
CAPABILITY_VERSION = 0x20080522
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
SIGKILL = 9

Argument = int | bytes | None

_libc = ctypes.CDLL(None, use_errno=True)


def call(function: str, *arguments: Argument) -> int:
    """Call a function of the C library that returns -1 if it fails.

    Raises:
        OSError: it failed. The message begins with its name.
    """
    found: int = getattr(_libc, function)(*[ctypes.c_ulong(one) if isinstance(one, int) else one for one in arguments])
    if found == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{function}: {os.strerror(number)}")
    return found


def system_call(name: str, *arguments: Argument) -> int:
    """Make a system call that the C library has no function for. Raises OSError: it failed."""
    number = PIVOT_ROOT[platform.machine()] if name == "pivot_root" else NUMBERS[name]
    try:
        return call("syscall", number, *arguments)
    except OSError as error:
        raise OSError(error.errno, f"{name}: {os.strerror(error.errno or 0)}") from error


def end_with(parent: int) -> None:
    """Let the kernel end this process when the one that has started it ends."""
    call("prctl", PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it has ended before
        os._exit(1)


def give_up_rights() -> None:
    """Give up all capabilities, also those of root, for good."""
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    header = CAPABILITY_VERSION.to_bytes(4, "little") + bytes(4)
    call("capset", header, bytes(24))  # effective, permitted and inheritable, in two halves: none
