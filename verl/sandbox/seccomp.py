"""The system calls that a program may make. All others fail as if the user had no permission.

The kernel runs a filter before each call. A filter is a short program of the "classic BPF" machine, see seccomp(2). Not allowed are, among
others: starting processes and threads, running other programs, sockets, signals to others, changes of owners, modes and limits, and all
that is newer than this list. Sources: seccomp(2); the numbers are those of the kernel's `unistd_64.h` (x86_64) and `asm-generic/unistd.h`
(aarch64).
"""

import ctypes
import errno
import platform
import struct
from collections.abc import Mapping, Sequence

from verl.sandbox import kernel

# name, number on x86_64, number on aarch64
ALLOWED = """
    read 0 63, write 1 64, close 3 57, lseek 8 62, pread64 17 67, pwrite64 18 68, readv 19 65, writev 20 66, preadv 295 69,
    pwritev 296 70, open 2 -, openat 257 56, fstat 5 80, stat 4 -, lstat 6 -, newfstatat 262 79, statx 332 291, statfs 137 43,
    fstatfs 138 44, access 21 -, faccessat 269 48, faccessat2 439 439, getdents 78 -, getdents64 217 61, getcwd 79 17, chdir 80 49,
    fchdir 81 50, rename 82 -, renameat 264 38, renameat2 316 276, mkdir 83 -, mkdirat 258 34, rmdir 84 -, unlink 87 -, unlinkat 263 35,
    symlink 88 -, symlinkat 266 36, readlink 89 -, readlinkat 267 78, umask 95 166, fsync 74 82, fdatasync 75 83, ftruncate 77 46,
    fallocate 285 47, fadvise64 221 223, copy_file_range 326 285, sendfile 40 71, dup 32 23, dup2 33 -, dup3 292 24, close_range 436 436,
    pipe 22 -, pipe2 293 59,
    mmap 9 222, mprotect 10 226, munmap 11 215, mremap 25 216, madvise 28 233, brk 12 214, membarrier 324 283,
    select 23 -, pselect6 270 72, poll 7 -, ppoll 271 73, epoll_create 213 -, epoll_create1 291 20, epoll_ctl 233 21, epoll_wait 232 -,
    epoll_pwait 281 22, eventfd2 290 19, futex 202 98, pause 34 -, nanosleep 35 101, clock_nanosleep 230 115, sched_yield 24 124,
    restart_syscall 219 128, rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, rt_sigpending 127 136,
    rt_sigtimedwait 128 137, rt_sigsuspend 130 133, sigaltstack 131 132, getitimer 36 102, setitimer 38 103, alarm 37 -,
    getpid 39 172, gettid 186 178, getppid 110 173, getpgrp 111 -, getpgid 121 155, getsid 124 156, getuid 102 174, geteuid 107 175,
    getgid 104 176, getegid 108 177, getgroups 115 158, getresuid 118 148, getresgid 120 150, getrlimit 97 163, getrusage 98 165,
    sysinfo 99 179, uname 63 160, times 100 153, time 201 -, gettimeofday 96 169, clock_gettime 228 113, clock_getres 229 114,
    sched_getaffinity 204 123, getrandom 318 278, recvfrom 45 207, exit 60 93, exit_group 231 94
"""
# Allowed with these arguments only.
CONDITIONAL = "ioctl 16 29, fcntl 72 25, kill 62 129, tgkill 234 131, prctl 157 167, prlimit64 302 261, socketpair 53 199, sendto 44 206"
TERMINAL_MODE, CLOSE_ON_EXEC, KEEP_ON_EXEC, BYTES_TO_READ, NON_BLOCKING = 0x5401, 0x5451, 0x5450, 0x541B, 0x5421  # ioctl
# fcntl: duplicates, flags and locks; not the owner of a file's signals, which would reach other processes.
DUPLICATE_AND_LOCK = (0, 1, 2, 3, 4, 5, 6, 7, 1030, 1032)
SET_NAME, GET_NAME = 15, 16  # prctl
AF_UNIX = 1

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # AUDIT_ARCH_…
FIRST_X32 = 0x40000000  # numbers of a second set of calls on x86_64
LOAD, EQUAL, AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06
ALLOW, KILL, REFUSE = 0x7FFF0000, 0x80000000, 0x00050000 | errno.EPERM
NUMBER_AT, ARCHITECTURE_AT, ARGUMENTS_AT = 0, 4, 16  # bytes in struct seccomp_data
MODE_FILTER = 2

Condition = tuple[int, tuple[int, ...]]  # number of a half of an argument, lower half first, and the values that it may have
Instruction = tuple[int, int, int, int]


def lacking() -> str | None:
    """Return what this machine lacks for the filter; None: nothing."""
    if platform.machine() not in ARCHITECTURES:
        return f"a processor of {' or '.join(ARCHITECTURES)}, found {platform.machine()}"
    return None


def restrict(process: int) -> None:
    """Restrict this process, for good, to the calls on the list. It has given up its rights before (`kernel.give_up_rights`).

    Args:
        process: its number, the only one that it may send signals to.
    Raises:
        OSError: the kernel has no seccomp.
    """
    program = b"".join(struct.pack("=HBBI", *one) for one in instructions(platform.machine(), process))
    buffer = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("@HP", len(program) // 8, ctypes.addressof(buffer))
    kernel.call("prctl", kernel.PR_SET_SECCOMP, MODE_FILTER, header, 0, 0)


def instructions(machine: str, process: int) -> list[Instruction]:
    """Return the filter: an operation, how many instructions to skip if its condition holds and if not, and its operand."""
    listed = numbers(ALLOWED, machine)
    begin = [(LOAD, 0, 0, ARCHITECTURE_AT), (EQUAL, 1, 0, ARCHITECTURES[machine]), _returned(KILL), (LOAD, 0, 0, NUMBER_AT)]
    x32 = [(AT_LEAST, 0, 1, FIRST_X32), _returned(KILL)] if machine == "x86_64" else []
    plain = [one for number in listed.values() for one in ((EQUAL, 0, 1, number), _returned(ALLOW))]
    with_arguments = [one for number, conditions in _conditions(machine, process).items() for one in _checked(number, conditions)]
    return [*begin, *x32, *plain, *with_arguments, _returned(REFUSE)]


def numbers(table: str, machine: str) -> dict[str, int]:
    """Return the numbers of a table's calls, by name. Some calls are not there on aarch64."""
    column = list(ARCHITECTURES).index(machine) + 1
    entries = [entry.split() for entry in table.split(",")]
    return {entry[0]: int(entry[column]) for entry in entries if entry[column] != "-"}


def _conditions(machine: str, process: int) -> Mapping[int, Sequence[Condition]]:
    null = 0
    wanted: dict[str, list[Condition]] = {
        "ioctl": [(2, (TERMINAL_MODE, CLOSE_ON_EXEC, KEEP_ON_EXEC, BYTES_TO_READ, NON_BLOCKING))],
        "fcntl": [(2, DUPLICATE_AND_LOCK)],
        "kill": [(0, (process,))],
        "tgkill": [(0, (process,))],
        "prctl": [(0, (SET_NAME, GET_NAME))],
        "prlimit64": [(0, (0,)), (4, (null,)), (5, (null,))],  # its own limits are told, and no new ones taken
        "socketpair": [(0, (AF_UNIX,))],  # connected to itself, which asyncio needs
        "sendto": [(8, (null,)), (9, (null,))],  # without an address
    }
    return {number: wanted[name] for name, number in numbers(CONDITIONAL, machine).items()}


def _checked(number: int, conditions: Sequence[Condition]) -> list[Instruction]:
    """Return the instructions that allow a call if all conditions hold."""
    body: list[Instruction] = []
    for half, values in conditions:
        body.append((LOAD, 0, 0, ARGUMENTS_AT + 4 * half))
        body += [(EQUAL, len(values) - index, 0, value) for index, value in enumerate(values)]
        body.append(_returned(REFUSE))
    body.append(_returned(ALLOW))
    return [(EQUAL, 0, len(body), number), *body]


def _returned(action: int) -> Instruction:
    return (RETURN, 0, 0, action)
