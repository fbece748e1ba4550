"""The trainer's side of the sandbox: it starts the fork server, hands code to programs, and reads what they print."""

import asyncio
import atexit
import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

from verl.errors import UserError
from verl.sandbox import probe
from verl.sandbox.fork_server import MESSAGE_BYTES
from verl.sandbox.limits import Limits
from verl.sandbox.program import LENGTH_BYTES

HOME = str(Path(__file__).resolve().parents[2])  # the folder that has verl
START = (
    "import sys; home, connection, wall, *modules = sys.argv[1:]; sys.path[0] = home; del sys.argv[1:]; "
    "from verl.sandbox.fork_server import serve; sys.path[0] = ''; serve(int(connection), wall, modules)"
)
# One thread for the libraries below NumPy, since no thread can be started; the same order of sets in each run.
VARIABLES = {"PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "LANG": "C.UTF-8"}
WHERE = "the sandbox for Python"
ELSEWHERE = "use a system that has it, or run this environment's programs elsewhere, in an environment of your own (docs/environments.md)"
SECONDS_TO_START, SECONDS_TO_END = 60.0, 10.0


@dataclass(frozen=True)
class Outcome:
    """What a piece of code has given.

    Attributes:
        output: what it has printed.
        ended: why the program is no more, such as "ran longer than 10 s"; None: it waits for the next piece.
    """

    output: str
    ended: str | None = None


class Sandbox:
    """A fork server, from which programs come. It ends with this object's `close`, and with this process.

    Args:
        wall: the wall around files; None: the first that the system allows.
        modules: that all programs have imported when they begin, such as `numpy`, so that they need not wait for it.
    Raises:
        UserError: the system cannot hold programs, or a module cannot be imported.
    """

    def __init__(self, *, wall: str | None = None, modules: tuple[str, ...] = ()):
        _check_system()
        self._owner = os.getpid()
        self._sending, self.wall, self.variables = threading.Lock(), "", tuple(VARIABLES)
        failures = []
        for name in [wall] if wall else ["mounts", "landlock"]:
            self._server, self._control, failure = _started(name, modules)
            if failure is None:
                self.wall = name
                break
            failures.append(f"{name}: {failure}")
        if not self.wall:
            raise _refused(failures, modules)
        try:
            probe.check(self)
        except BaseException:
            self.close()
            raise

    def program(self, limits: Limits, seed: int = 0) -> "Program":
        """Start a program. It waits for its first piece of code."""
        lines, code, output = (socket.socketpair(socket.AF_UNIX, kind) for kind in (socket.SOCK_SEQPACKET, *2 * [socket.SOCK_STREAM]))
        message = json.dumps({"limits": asdict(limits), "seed": seed}).encode()
        theirs = [pair[1] for pair in (lines, code, output)]
        try:
            with self._sending:
                socket.send_fds(self._control, [message], [one.fileno() for one in theirs])
        except OSError as error:
            raise UserError(
                "its process was ended", where=WHERE, fix="start again; the kernel's log says whether memory ran out"
            ) from error
        finally:
            for one in theirs:
                one.close()
        return Program(self, lines[0], code[0], output[0], limits)

    def is_running(self) -> bool:
        """Return whether the server still runs."""
        return self._server.poll() is None

    def forget(self) -> None:
        """Close this process's end of the connection with the server, which another process may have started."""
        self._control.close()

    def close(self) -> None:
        """End the server and all programs, if this process has started it."""
        self.forget()
        if self._owner == os.getpid():
            try:
                self._server.wait(SECONDS_TO_END)
            except subprocess.TimeoutExpired:
                self._server.kill()
                self._server.wait()


class Program:
    """A running program: see `Sandbox.program`. Its calls are made one after the other."""

    def __init__(self, sandbox: Sandbox, line: socket.socket, code: socket.socket, output: socket.socket, limits: Limits):
        self._sandbox = sandbox  # which ends, and all its programs with it, when nothing refers to it
        self._line, self._code, self._output, self._limits = line, code, output, limits
        self._is_ready = False
        for one in (line, code, output):
            one.setblocking(False)

    async def run(self, code: str) -> Outcome:
        """Run a piece of code. Its variables are there for the next one, unless the program has ended."""
        if not self._is_ready:
            answer = await self._answer()
            if answer != "ready":
                return Outcome("", answer)
            self._is_ready = True
        printed = bytearray()
        reading = asyncio.ensure_future(self._read(printed))
        try:
            await self._give(code)
            answer = await self._answer()
        finally:
            reading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reading
        self._read_rest(printed)
        if answer == "done" and len(printed) > self._limits.output_bytes:
            self._end_for_output()
            answer = await self._answer()
        output = bytes(printed[: self._limits.output_bytes]).decode(errors="replace")
        return Outcome(output, None if answer == "done" else answer)

    def close(self) -> None:
        """End the program."""
        for one in (self._line, self._code, self._output):
            one.close()

    async def _give(self, code: str) -> None:
        data, loop = code.encode(errors="replace"), asyncio.get_running_loop()
        with contextlib.suppress(OSError):  # the program has ended, and the next answer says why
            self._line.send(b"run")
            await loop.sock_sendall(self._code, len(data).to_bytes(LENGTH_BYTES, "big") + data)

    async def _answer(self) -> str:
        """Return what the server says: `ready`, `done`, or why the program has ended."""
        try:
            message = await asyncio.get_running_loop().sock_recv(self._line, MESSAGE_BYTES)
        except OSError:
            message = b""
        return message.decode().removeprefix("ended: ") or "ended with the sandbox's process"

    async def _read(self, printed: bytearray) -> None:
        """Read what is printed; end the program if it is too much."""
        while len(printed) <= self._limits.output_bytes:
            piece = await asyncio.get_running_loop().sock_recv(self._output, 2**16)
            if not piece:
                return
            printed += piece
        self._end_for_output()

    def _end_for_output(self) -> None:
        with contextlib.suppress(OSError):
            self._line.send(b"output")

    def _read_rest(self, printed: bytearray) -> None:
        with contextlib.suppress(OSError):
            while len(printed) <= self._limits.output_bytes and (piece := self._output.recv(2**16)):
                printed += piece


def _check_system() -> None:
    if sys.platform != "linux":
        raise UserError(f"it needs Linux, found {sys.platform}", where=WHERE, fix=ELSEWHERE)
    from verl.sandbox.seccomp import lacking

    if lack := lacking():
        raise UserError(f"it needs {lack}", where=WHERE, fix=ELSEWHERE)


def _started(wall: str, modules: tuple[str, ...]) -> tuple["subprocess.Popen[bytes]", socket.socket, str | None]:
    """Start a server. Return it, the connection, and why it does not work."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-c", START, HOME, str(theirs.fileno()), wall, *modules]
    server = subprocess.Popen(  # noqa: S603
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=VARIABLES, cwd="/",
        pass_fds=[theirs.fileno()], start_new_session=True,
    )  # fmt: skip
    theirs.close()
    ours.settimeout(SECONDS_TO_START)
    try:
        message = ours.recv(MESSAGE_BYTES).decode() or "its process ended at once"
    except OSError as error:
        message = str(error)
    ours.settimeout(None)
    if message == "ready":
        return server, ours, None
    ours.close()
    server.kill()
    server.wait()
    return server, ours, message


def _refused(failures: list[str], modules: tuple[str, ...]) -> UserError:
    if modules and all("ModuleNotFoundError" in one or "ImportError" in one for one in failures):
        return UserError(failures[0].partition(": ")[2], where="environment.modules", fix="install it, or leave it out")
    what = f"this system can hold no programs: it allows neither {' nor '.join(failures)}"
    return UserError(what, where=WHERE, fix=f"allow user namespaces or Landlock (Linux 5.13 or newer); or {ELSEWHERE}")


_shared: dict[tuple[str, ...], tuple[int, Sandbox]] = {}
_one_at_a_time = threading.Lock()


def shared(modules: tuple[str, ...] = ()) -> Sandbox:
    """Return the sandbox of this process with these modules. It is started when it is first asked for, and again if it was ended.

    Raises:
        UserError: the system cannot hold programs, or a module cannot be imported.
    """
    with _one_at_a_time:
        owner, found = _shared.get(modules, (0, None))
        if found is not None and owner == os.getpid() and found.is_running():
            return found
        if found is not None:
            found.forget()
        new = Sandbox(modules=modules)
        _shared[modules] = os.getpid(), new
        atexit.register(new.close)
        return new
