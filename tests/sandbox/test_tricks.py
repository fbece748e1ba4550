"""Programs that try to break out of the sandbox, behind each of its walls: each is refused or ended, and nothing outside has changed."""

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import escapes
import pytest
from runs import wait_for

from verl.errors import UserError
from verl.sandbox.limits import Limits
from verl.sandbox.sandbox import Outcome, Program, Sandbox

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")

LIMITS = Limits(seconds=1.0, cpu_seconds=1.0, memory_bytes=2**28, folder_bytes=2**22, files=50)
SECRET = "xyzzy-4711"


@dataclass(frozen=True)
class _Outside:
    """What a program must not reach."""

    home: Path
    run: Path
    secret: Path
    unix: Path
    port: int
    victim: int
    trainer: int


def made_or_skipped(wall: str) -> Sandbox:
    """Start a sandbox. Where the system has no such wall, the tests are skipped; one that does not hold is a failure."""
    try:
        return Sandbox(wall=wall)
    except UserError as error:
        if not error.what.startswith("this system can hold no programs"):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="module", params=["mounts", "landlock"])
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    os.environ["MY_TOKEN"] = SECRET
    made = made_or_skipped(request.param)
    yield made
    del os.environ["MY_TOKEN"]
    made.close()


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Outside]:
    home, run = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("run")
    for path in (home / ".bashrc", run / "config.yaml", home / "secret"):
        path.write_text(SECRET)
    with socket.socket() as inet, socket.socket(socket.AF_UNIX) as unix, subprocess.Popen(["sleep", "600"]) as victim:
        inet.bind(("127.0.0.1", 0))
        inet.listen()
        unix.bind(str(run / "socket"))
        unix.listen()
        yield _Outside(home, run, home / "secret", run / "socket", inet.getsockname()[1], victim.pid, os.getpid())
        assert victim.poll() is None, "a program has ended it"
        victim.kill()


def started(sandbox: Sandbox, **limits: float) -> Program:
    return sandbox.program(replace(LIMITS, **limits))  # type: ignore[arg-type]


def ran(sandbox: Sandbox, *pieces: str, **limits: float) -> Outcome:
    """Run pieces of code in a program of their own; return the last outcome."""

    async def run() -> Outcome:
        program = started(sandbox, **limits)
        try:
            return [await program.run(piece) for piece in pieces][-1]
        finally:
            program.close()

    return asyncio.run(run())


def programs_of(sandbox: Sandbox) -> list[int]:
    """Return the processes that the sandbox's server has started, and those that they have started."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found, more = set(), {sandbox._server.pid}
    while more:
        found |= more
        more = {process for process, parent in parents.items() if parent in found} - found
    servers = 2 if sandbox.wall == "mounts" else 1  # one waits outside the namespaces
    return sorted(found)[servers:]


def wait_until_none_is_left(sandbox: Sandbox) -> None:
    deadline = time.monotonic() + 5
    while (left := programs_of(sandbox)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert left == []


@pytest.mark.parametrize("name", escapes.TRICKS)
def test_a_trick_is_refused_or_ended_and_changes_nothing_outside(name: str, sandbox: Sandbox, outside: _Outside) -> None:
    if escapes.TRICKS[name] in escapes.ONLY_ON_X86 and os.uname().machine != "x86_64":
        pytest.skip("its numbers of system calls are those of x86_64")
    found = {field: str(value) if isinstance(value, Path) else value for field, value in vars(outside).items()}
    began = time.monotonic()
    outcome = ran(sandbox, Path(escapes.__file__).read_text(), f"outside = SimpleNamespace(**{found!r})\n{name}()")
    assert time.monotonic() - began < LIMITS.seconds + 2
    assert "ESCAPED" not in outcome.output and SECRET not in outcome.output
    assert outcome.ended or any(word in outcome.output for word in ("refused", "Error"))
    wait_until_none_is_left(sandbox)
    for path in (outside.home / ".bashrc", outside.run / "config.yaml", outside.secret):
        assert path.read_text() == SECRET and path.stat().st_mode & 0o777 == 0o644
    assert not any(Path(path).exists() for path in ("/tmp/new-file", "/tmp/new-folder", "/dev/shm/new", "/etc/new", outside.home / "new"))
    assert ran(sandbox, "1 + 1") == Outcome("2\n")  # and the next program runs


def test_a_program_that_says_that_it_is_done_and_goes_on_is_stopped(sandbox: Sandbox) -> None:
    async def run() -> None:
        program = started(sandbox, seconds=30)
        assert await program.run("import os\nos.write(4, b'.')\nwhile True: pass") == Outcome("")
        (process,) = programs_of(sandbox)
        wait_for(lambda: Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "T", 5)
        program.close()

    asyncio.run(run())
    wait_until_none_is_left(sandbox)
