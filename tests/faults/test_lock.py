"""One process at a time owns a directory: refused, taken over, or waited for."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from places import ROOT
from runs import wait_for

from verl import lock
from verl.errors import UserError
from verl.lock import Lock, LockedError, Owner, take

HOLDER = """
import sys, time
from pathlib import Path
from verl import lock
if "without flock" in sys.argv:
    lock._flock = lambda handle: None
    lock.SETTLE_SECONDS = 0.5
try:
    held = lock.take(Path(sys.argv[1]), "training", print)
except lock.LockedError as error:
    print("refused", flush=True)
    raise SystemExit(2)
print("held", flush=True)
"""
WAITS = "time.sleep(60)\n"
FORKS = "import os\nif os.fork() == 0:\n    print('forked', os.getpid(), flush=True)\n    time.sleep(20)\n    os._exit(0)\n" + WAITS


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "SETTLE_SECONDS", 0.05)
    monkeypatch.setattr(lock, "WRITING_SECONDS", 0.1)


def start(directory: Path, *words: str, then: str = WAITS) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", HOLDER + then, str(directory), *words], stdout=subprocess.PIPE, text=True, env=environment
    )


@contextmanager
def holding(directory: Path, *words: str, then: str = WAITS) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the lock."""
    process = start(directory, *words, then=then)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def owner(**changes: Any) -> Owner:
    return replace(Owner.this_process("training"), **changes)


def write(directory: Path, **changes: Any) -> Path:
    """A lock file that names some owner, not held by anybody."""
    path = directory / lock.FILE
    path.write_text(json.dumps(asdict(owner(**changes))))
    return path


def taken(directory: Path) -> list[str]:
    """Take the lock and release it; what was noted."""
    notes: list[str] = []
    take(directory, "training", notes.append).release()
    assert not (directory / lock.FILE).exists()
    return notes


def without_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_flock", lambda handle: None)


@pytest.fixture(params=["flock", "without flock"])
def how(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "without flock":
        without_flock(monkeypatch)
    return str(request.param)


def test_a_second_process_is_refused_and_told_of_the_first(tmp_path: Path, how: str) -> None:
    with holding(tmp_path, how) as process:
        with pytest.raises(LockedError) as refused:
            take(tmp_path, "training", print)
        told = str(refused.value)
        assert f"process {process.pid} on {socket.gethostname()}, started 20" in told and "python" in told and "fix: " in told
        assert f"this is process {os.getpid()} on {socket.gethostname()}, started 20" in told
        assert (tmp_path / lock.FILE).exists(), "a refusal leaves the lock as it is"


def test_the_lock_of_a_killed_process_is_taken_over_and_said(tmp_path: Path, how: str) -> None:
    with holding(tmp_path, how) as process:
        process.kill()
        process.wait()
        (note,) = taken(tmp_path)
    assert note.startswith(f"took over {tmp_path}/lock from process {process.pid} on {socket.gethostname()}") and "has ended" in note


def test_a_clean_end_leaves_nothing_to_take_over(tmp_path: Path, how: str) -> None:
    assert taken(tmp_path) == [] and taken(tmp_path) == []


def test_a_process_that_has_the_number_of_the_owner_is_not_the_owner(tmp_path: Path, how: str) -> None:
    boot, space, start_ticks = lock.identity(os.getppid()).split()
    write(tmp_path, pid=os.getppid(), process=f"{boot} {space} {int(start_ticks) - 1}")
    assert len(taken(tmp_path)) == 1


def test_a_process_that_runs_keeps_its_lock_on_a_file_system_without_flock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_flock(monkeypatch)
    write(tmp_path, pid=os.getppid(), process=lock.identity(os.getppid()))
    with pytest.raises(LockedError, match=f"process {os.getppid()} on"):
        take(tmp_path, "training", print)


def test_the_number_of_another_container_says_nothing_without_flock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The owner is process 1 of another container on this machine, and there is a process 1 here: only its heartbeat tells."""
    without_flock(monkeypatch)
    boot, _, ticks = lock.identity(os.getpid()).split()
    path = write(tmp_path, pid=1, process=f"{boot} pid:[1] {ticks}")
    monkeypatch.setattr(lock, "STALE_SECONDS", 5.0)
    with beating(path), pytest.raises(LockedError, match="process 1 on"):
        take(tmp_path, "training", print)


def test_with_flock_the_kernel_knows_that_a_container_with_the_same_numbers_has_ended(tmp_path: Path) -> None:
    boot, _, ticks = lock.identity(os.getpid()).split()
    write(tmp_path, pid=os.getpid(), process=f"{boot} pid:[1] {ticks}")
    since = time.monotonic()
    assert len(taken(tmp_path)) == 1 and time.monotonic() - since < 2


@contextmanager
def beating(path: Path) -> Iterator[None]:
    """The heartbeat of a process on another host."""
    code = "import os, sys, time\nwhile True:\n    os.utime(sys.argv[1])\n    time.sleep(0.2)"
    process = subprocess.Popen([sys.executable, "-c", code, str(path)])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def test_an_owner_on_another_host_whose_heart_beats_is_not_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    monkeypatch.setattr(lock, "STALE_SECONDS", 5.0)
    path = write(tmp_path, host="node-7", pid=12)
    with beating(path), pytest.raises(LockedError) as refused:
        take(tmp_path, "training", print)
    assert "process 12 on node-7" in str(refused.value) and f"or remove {path}" in str(refused.value)
    assert "for a sign that it still runs" in capsys.readouterr().out


def test_an_owner_on_another_host_that_is_silent_is_waited_for_and_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "STALE_SECONDS", 1.0)
    write(tmp_path, host="node-7")
    since = time.monotonic()
    assert "on node-7" in taken(tmp_path)[0] and time.monotonic() - since > 0.8


def test_one_that_has_long_been_silent_is_taken_over_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, host="node-7")
    os.utime(path, (time.time() - 120, time.time() - 120))
    since = time.monotonic()
    assert len(taken(tmp_path)) == 1 and time.monotonic() - since < 2


def test_after_a_reboot_the_lock_of_a_host_is_judged_by_its_heartbeat(tmp_path: Path) -> None:
    path = write(tmp_path, process=f"another-boot {lock.identity(os.getpid()).split(maxsplit=1)[1]}")
    os.utime(path, (time.time() - 120, time.time() - 120))
    assert len(taken(tmp_path)) == 1


def test_the_owner_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.05)
    held = take(tmp_path, "training", print)
    os.utime(tmp_path / lock.FILE, (0, 0))
    wait_for(lambda: (tmp_path / lock.FILE).stat().st_mtime > 0, seconds=20)
    held.release()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"host": "node-7"}', b"null"])
def test_a_lock_file_that_names_nobody_is_in_nobodys_way(content: bytes, tmp_path: Path, how: str) -> None:
    (tmp_path / lock.FILE).write_bytes(content)
    assert taken(tmp_path) == []


@pytest.mark.parametrize("words", [(), ("without flock",)], ids=["flock", "without flock"])
def test_of_processes_that_start_together_at_most_one_gets_it(words: tuple[str, ...], tmp_path: Path) -> None:
    processes = [start(tmp_path, *words) for _ in range(5)]
    said = [process.stdout.readline() for process in processes if process.stdout is not None]
    for process in processes:
        process.kill()
        process.communicate()
    assert said.count("held\n") == 1 if not words else said.count("held\n") <= 1
    assert said.count("held\n") + said.count("refused\n") == 5


def test_a_fork_does_not_hold_the_lock_of_its_killed_owner(tmp_path: Path) -> None:
    with holding(tmp_path, then=FORKS) as process:
        assert process.stdout is not None
        forked = int(process.stdout.readline().split()[1])
        process.kill()
        process.wait()
        try:
            assert len(taken(tmp_path)) == 1
        finally:
            with suppress(ProcessLookupError):
                os.kill(forked, signal.SIGKILL)


def test_without_that_a_fork_would_hold_it(tmp_path: Path) -> None:
    with holding(tmp_path, then="lock._held.clear()\n" + FORKS) as process:
        assert process.stdout is not None
        forked = int(process.stdout.readline().split()[1])
        process.kill()
        process.wait()
        try:
            with pytest.raises(LockedError):
                take(tmp_path, "training", print)
        finally:
            os.kill(forked, signal.SIGKILL)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # of Python 3.12 on, as it has threads
def test_the_lock_that_a_fork_has_is_not_released_by_it(tmp_path: Path) -> None:
    held = take(tmp_path, "training", print)
    if (child := os.fork()) == 0:
        held.release()
        os._exit(0)
    os.waitpid(child, 0)
    assert held.is_held()
    held.release()


def stolen(directory: Path) -> Callable[[], None]:
    """Another process takes the lock, after somebody has removed the file."""

    def steal() -> None:
        (directory / lock.FILE).unlink()
        write(directory, pid=77, host="node-7")

    return steal


def test_an_owner_whose_lock_was_removed_and_taken_stops(tmp_path: Path, how: str) -> None:
    held = take(tmp_path, "training", print)
    stolen(tmp_path)()
    with pytest.raises(LockedError, match="this run stops: the directory now belongs to process 77 on node-7"):
        held.check()
    held.release()
    assert (tmp_path / lock.FILE).exists(), "the other one's lock stays"


def test_a_lock_that_was_only_removed_is_written_again(tmp_path: Path, how: str) -> None:
    held = take(tmp_path, "training", print)
    (tmp_path / lock.FILE).unlink()
    held.check()
    assert held.is_held()
    held.release()
    assert not (tmp_path / lock.FILE).exists()


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> int:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(lock.os, "open", refuse)
    with pytest.raises(UserError, match="Read-only file system"), lock.held(tmp_path, "evaluation"):
        pass


def test_a_second_lock_of_one_process_is_refused(tmp_path: Path) -> None:
    held: Lock = take(tmp_path, "training", print)
    with pytest.raises(LockedError):
        take(tmp_path, "training", print)
    held.release()


def test_passwords_in_the_command_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["verl", "ppo", "rollout.url=http://user:secret-word@host:8000"])
    held = take(tmp_path, "training", print)
    assert "secret-word" not in (tmp_path / lock.FILE).read_text()
    held.release()


def test_temporary_files_that_nobody_writes_are_removed(tmp_path: Path) -> None:
    old, fresh, written, ancient = (tmp_path / f"{name}.tmp" for name in ("old", "fresh", "written", "ancient"))
    for path, age in ((old, 600), (fresh, 0), (written, 600), (ancient, 2 * 86400)):
        path.touch()
        os.utime(path, (time.time() - age, time.time() - age))
    with written.open() as file:
        lock.mark_in_use(file.fileno())
        lock.remove_abandoned(tmp_path.glob("*.tmp"))
    assert {path.name for path in tmp_path.iterdir()} == {"fresh.tmp", "written.tmp"}


def test_without_flock_only_those_of_yesterday_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_flock(monkeypatch)
    for name, age in (("old", 600), ("ancient", 2 * 86400)):
        (tmp_path / f"{name}.tmp").touch()
        os.utime(tmp_path / f"{name}.tmp", (time.time() - age, time.time() - age))
    lock.remove_abandoned(tmp_path.glob("*.tmp"))
    assert {path.name for path in tmp_path.iterdir()} == {"old.tmp"}


def test_a_file_that_its_owner_removes_meanwhile_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock on a file that no longer has its name would exclude nobody."""
    flock, opened = lock._flock, [0]

    def removed(handle: int) -> bool | None:
        opened[0] += 1
        if opened[0] == 1:
            (tmp_path / lock.FILE).unlink()
        return flock(handle)

    monkeypatch.setattr(lock, "_flock", removed)
    held = take(tmp_path, "training", print)
    assert opened == [2] and held.is_held()
    held.release()


def test_without_flock_the_last_name_that_is_written_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_flock(monkeypatch)
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: write(tmp_path, pid=77, token="of another"))
    with pytest.raises(LockedError, match="in use by process 77"):
        take(tmp_path, "training", print)
