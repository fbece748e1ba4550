"""The lock of a directory: one process at a time writes into it, on any host that shares the file system.

The file `lock` names its owner: host, process and command. Three things tell whether that process still runs:

- `flock` on the file, where the file system has it. The kernel drops it when the process ends, however it ends, so that two processes that
  start at the same moment, or a process number that is used again, cannot confuse it. A fork closes its copy.
- On the same host without `flock`: the process with that number, if it started at the same time.
- On another host: the owner's heartbeat, the file's modification time. It is compared with the clock of the file system, not of a host.

A clean end removes the file. What a killed process left is taken over.
"""

import errno
import fcntl
import json
import os
import shlex
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from uuid import uuid4

from verl.errors import UserError
from verl.redaction import redact_text
from verl.regular_file import check_directory, check_regular, open_file

FILE = "lock"
HEARTBEAT_SECONDS, STALE_SECONDS = 10.0, 60.0
SETTLE_SECONDS = 1.0  # without flock: how long two processes that start together need to see each other's name
WRITING_SECONDS = 2.0  # an owner writes its name right after it has locked the file
ABANDONED_SECONDS = 24 * 3600
UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)  # of flock, on a file system without it


@dataclass(frozen=True)
class Owner:
    """The process that holds a lock.

    Attributes:
        host, pid: where it runs.
        started: when the process started, for people.
        process: what tells it from other processes of the host with the same number; empty if the system does not say.
        command: its command line.
        purpose: what it does in the directory; two runs with the same purpose would do the same.
        token: identifies this lock.
    """

    host: str
    pid: int
    started: str
    process: str
    command: str
    purpose: str
    token: str

    @classmethod
    def this_process(cls, purpose: str) -> "Owner":
        pid = os.getpid()
        command = redact_text(" ".join(map(shlex.quote, sys.orig_argv)))[:2000]
        return cls(socket.gethostname(), pid, _start_of_process(), identity(pid), command, purpose, uuid4().hex)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, started {self.started}: {self.command}"


class LockedError(UserError):
    """The directory is in use.

    Attributes:
        owner: the process that holds the lock; None if it has not written its name.
    """

    def __init__(self, what: str, *, where: str, fix: str, owner: Owner | None):
        super().__init__(what, where=where, fix=fix)
        self.owner = owner

    def __reduce__(self) -> tuple[Callable[[], "LockedError"], tuple[()]]:
        return partial(LockedError, self.what, where=str(self.where), fix=str(self.fix), owner=self.owner), ()


def identity(pid: int) -> str:
    """Return what tells a process from others that have its number at other times or in other containers; empty if it does not run.

    On Linux: the boot of the machine, the container's process numbers, and the process's start in clock ticks since the boot.
    """
    try:
        start = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')} {start}"
    except (OSError, IndexError):
        return ""


class Lock:
    """A lock that this process holds."""

    def __init__(self, path: Path, handle: int, owner: Owner):
        self.owner, self._path, self._handle, self._ended = owner, path, handle, threading.Event()
        _held.add(self)
        threading.Thread(target=self._beat, args=(handle,), daemon=True, name="lock of a directory").start()

    def is_held(self) -> bool:
        """Return whether the file still names this lock."""
        found = _read_at(self._path)
        return found is not None and found.token == self.owner.token

    def check(self) -> None:
        """Check that the lock is still this process's. A file that somebody removed is written again.

        Raises:
            LockedError: another process has taken over.
        """
        if self.is_held():
            return
        if self._path.exists():
            raise _locked(self._path, _read_at(self._path), "this run stops: the directory now belongs to")
        other = take(self._path.parent, self.owner.purpose, lambda _: None)
        self._close()
        self.owner, self._handle, self._ended = other.owner, other._handle, other._ended
        _held.discard(other)
        _held.add(self)

    def release(self) -> None:
        """Remove the file, and give the lock up. Only the process that took the lock does this, not a fork of it."""
        if self._handle >= 0 and self.owner.pid == os.getpid():
            with suppress(OSError):
                if self.is_held():
                    self._path.unlink()
            self._close()

    def _close(self) -> None:
        self._ended.set()
        _held.discard(self)
        handle, self._handle = self._handle, -1
        os.close(handle)

    def _beat(self, handle: int) -> None:
        ended = self._ended
        while not ended.wait(HEARTBEAT_SECONDS):
            with suppress(OSError):
                os.utime(handle)


_held: set[Lock] = set()


def _forget() -> None:
    """Close the locks in a fork, which would otherwise hold them after the end of their owner."""
    for lock in _held:
        os.close(lock._handle)
        lock._handle = -1
    _held.clear()


os.register_at_fork(after_in_child=_forget)


def take(directory: Path, purpose: str, note: Callable[[str], None]) -> Lock:
    """Lock a directory.

    Args:
        purpose: what this process does there; part of the owner's name.
        note: is told, in a line, that a lock has been taken over, or that it is being waited for.
    Raises:
        LockedError: another process has it.
        OSError: the file cannot be written.
    """
    path = directory / FILE
    while True:
        handle = _open(path)
        try:
            is_alone = _flock(handle)
            if is_alone is False:
                raise _locked(path, _read_soon(handle))
            if not _is_at(path, handle):  # its owner has removed it meanwhile
                os.close(handle)
                continue
            before = _read(handle)
            if before is not None:
                _take_over(path, before, is_alone is True, note)
            owner = Owner.this_process(purpose)
            _write(handle, owner)
            if is_alone is None:
                time.sleep(SETTLE_SECONDS)
                if (now := _read_at(path)) != owner:
                    raise _locked(path, now)
        except BaseException:
            os.close(handle)
            raise
        return Lock(path, handle, owner)


def _open(path: Path) -> int:
    """Open the file of a lock, or make it. Raises UserError: a link, which may lead to anybody's file, or no file is in its place."""
    fix = "remove it, or choose another directory"
    check_regular(path, fix)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    if not stat.S_ISREG(os.fstat(handle).st_mode):  # put there meanwhile
        os.close(handle)
        raise UserError("is no file", where=str(path), fix=fix)
    return handle


@contextmanager
def held(directory: Path, purpose: str) -> Iterator[None]:
    """Hold the lock of a directory in this context.

    Raises:
        UserError: another process has it, or the directory cannot be written.
    """
    check_directory(directory, str(directory), "choose a directory; it is made if it is missing")
    try:
        lock = take(directory, purpose, lambda note: print(note, flush=True))
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror}", where=str(directory), fix="choose another directory") from error
    try:
        yield
    finally:
        lock.release()


def mark_in_use(handle: int) -> None:
    """Mark a temporary file as one that this process writes, until it closes it or ends."""
    with suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def remove_abandoned(files: Iterable[Path]) -> None:
    """Remove temporary files whose writers have ended. Without flock, which tells, these are files that nobody has written to for a day."""
    for path in files:
        with suppress(OSError):
            age = time.time() - path.stat().st_mtime
            if age > ABANDONED_SECONDS or (age > STALE_SECONDS and _nobody_writes(path)):
                path.unlink()


def _nobody_writes(path: Path) -> bool:
    handle = open_file(path)
    try:
        return _flock(handle) is True
    finally:
        os.close(handle)


def _flock(handle: int) -> bool | None:
    """Return whether this process now has the file to itself; None if the file system does not tell."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in UNSUPPORTED:
            return None
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True


def _take_over(path: Path, before: Owner, is_alone: bool, note: Callable[[str], None]) -> None:
    """Say that a lock is taken over. Raises LockedError: its owner runs."""
    here = before.host == socket.gethostname() and _same_machine(before.process, identity(os.getpid()), is_alone)
    runs = identity(before.pid) == before.process != "" and before.pid != os.getpid() if here else _beats(path, before, note)
    if runs:
        raise _locked(path, before)
    note(f"took over {path} from {before}; that process has ended without removing it")


def _same_machine(there: str, here: str, is_alone: bool) -> bool:
    """Return whether the process numbers of an owner mean the same here. With flock, they need not: the kernel knows that it has ended."""
    parts = 1 if is_alone else 2  # the boot, and the container's process numbers
    return there.split()[:parts] == here.split()[:parts] if there else is_alone


def _beats(path: Path, before: Owner, note: Callable[[str], None]) -> bool:
    """Return whether an owner on another host gives a sign of life. Waits for one if the last is not long ago."""
    last, now = _modified(path), _file_system_time(path.parent)
    if now - last > STALE_SECONDS:
        return False
    wait = STALE_SECONDS - (now - last)
    print(f"{path} belongs to {before}. Waiting up to {wait:.0f} s for a sign that it still runs", flush=True)
    deadline = time.monotonic() + wait
    while time.monotonic() < deadline:
        time.sleep(min(1.0, STALE_SECONDS / 10))
        if _modified(path) != last:
            return True
    return False


def _modified(path: Path) -> float:
    """Return a file's modification time. The file is opened, because a network file system may answer `stat` from its memory."""
    try:
        handle = open_file(path)
    except FileNotFoundError:
        return 0.0
    try:
        return os.fstat(handle).st_mtime
    finally:
        os.close(handle)


def _file_system_time(directory: Path) -> float:
    mark = directory / f".{uuid4().hex}"
    mark.touch()
    try:
        return mark.stat().st_mtime
    finally:
        mark.unlink()


def _locked(path: Path, owner: Owner | None, what: str = "the directory is in use by") -> LockedError:
    fix = "wait until it has ended, stop it, or choose another directory"
    if owner is not None and owner.host != socket.gethostname():
        fix += f"; if that host is down, wait {STALE_SECONDS:.0f} s and start again, or remove {path}"
    me = Owner.this_process("")
    return LockedError(f"{what} {owner or 'another process'}\n  this is {me}", where=str(path.parent), fix=fix, owner=owner)


def _is_at(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False


def _read_soon(handle: int) -> Owner | None:
    """Return the owner's name, which it may be about to write."""
    deadline = time.monotonic() + WRITING_SECONDS
    while (found := _read(handle)) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def _read_at(path: Path) -> Owner | None:
    try:
        handle = open_file(path)
    except OSError:
        return None
    try:
        return _read(handle)
    finally:
        os.close(handle)


def _read(handle: int) -> Owner | None:
    """Return the owner that a lock file names; None if it is empty or cannot be read, as if it were being written."""
    try:
        values = json.loads(os.pread(handle, 1 << 16, 0))
        return Owner(**{field.name: field.type(values[field.name]) for field in fields(Owner)})  # type: ignore[operator]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(handle: int, owner: Owner) -> None:
    os.ftruncate(handle, 0)
    os.pwrite(handle, (json.dumps(asdict(owner), indent=2) + "\n").encode(), 0)
    os.fsync(handle)


def _start_of_process() -> str:
    """Return when this process started, as text."""
    began = time.time()
    with suppress(OSError, IndexError, ValueError):
        ticks = int(Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19])
        up = float(Path("/proc/uptime").read_text(encoding="utf-8").split()[0])
        began -= up - ticks / os.sysconf("SC_CLK_TCK")
    return time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(began)).strip()
