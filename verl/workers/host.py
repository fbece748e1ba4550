"""The inside of the processes that host objects of a user's class, one object at a time in each (see `verl.workers.hosts`).

A keeper imports the user's module once, and forks a host whenever one is asked for. So hosts share the module's memory, and are there in
milliseconds. The keeper ends a host, and all that it has started, when the trainer asks for it or has ended, even by SIGKILL.
"""

import asyncio
import contextlib
import dataclasses
import json
import os
import pickle
import random
import select
import signal
import socket
import struct
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass
from inspect import isawaitable
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from verl import parent, user_files
from verl.errors import UserError
from verl.workers.calls import Failure, WrongResultError, failure_of, packed, shown
from verl.workers.serve import adopt_orphans, end_descendants, loaded, record_stacks

COMMAND = struct.Struct("!BQ")  # one of the following, and the number of a process
FORK, END, TELL = 1, 2, 3  # make a host, end one, or have one record what it is doing
LENGTH = struct.Struct("!Q")  # before each message to and from a host
MOMENT = 1.0  # seconds for a call that is cancelled to end


@dataclass(frozen=True)
class Hosted:
    """What the hosts run.

    Attributes:
        name: path or dotted name of the user's module.
        kind: name of the class.
        settings: the pickled settings that the class is called with; None: it is called without.
        folder: gets a file for each host, named by its process, with its stack when that is asked for or it crashes.
    """

    name: str
    kind: str
    settings: bytes | None
    folder: str


@dataclass(frozen=True)
class Call:
    """A call of a method.

    Attributes:
        seconds: the time limit. The host keeps it if the method is `async`; otherwise the trainer does.
        seed: of Python's `random`, for a call that makes a new object first; None: the call is for the object that is there.
    """

    function: str
    arguments: tuple[Any, ...]
    seconds: float
    seed: int | None = None


def keep(control: int) -> None:
    """Run a keeper. `control` is the file descriptor of a socket to the trainer."""
    connection = Connection(control)
    os.set_inheritable(control, False)
    adopt_orphans()
    try:
        hosted: Hosted = connection.recv()
        try:
            module, settings = loaded(hosted.name, hosted.settings)
            prepare(module, settings)
        except UserError as error:
            connection.send_bytes(packed(value=error))
            raise EOFError from error
        connection.send_bytes(packed(process=os.getpid()))
        _Keeper(connection, hosted, module, settings).serve()
    except (EOFError, OSError):  # the trainer has closed the connection
        end_descendants(os.getpid())
        os._exit(0)


def prepare(module: ModuleType, settings: Any) -> None:
    """Let a module load once what its objects share, if it has a function `prepare`. Raises UserError: the function raised an error."""
    try:
        getattr(module, "prepare", lambda *_: None)(*(() if settings is None else (settings,)))
    except UserError:
        raise
    except Exception as error:
        what = f"its function prepare raised {type(error).__name__}: {error}"
        raise UserError(what, where=user_files.place_of(error, module) or module.__file__, fix="correct it there") from error


class _Keeper:
    def __init__(self, connection: Connection, hosted: Hosted, module: ModuleType, settings: Any):
        self._connection, self._hosted, self._module, self._settings = connection, hosted, module, settings
        self._control = socket.socket(fileno=os.dup(connection.fileno()))
        self._hosts: set[int] = set()
        self._woken, waking = os.pipe()
        os.set_blocking(waking, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(waking, warn_on_full_buffer=False)
        self._pipe = (self._woken, waking)

    def serve(self) -> NoReturn:
        while True:
            watched: list[Any] = [self._control, self._woken]
            ready, _, _ = select.select(watched, [], [])
            if self._woken in ready:
                os.read(self._woken, 4096)
                self._reap()
            if self._control in ready:
                self._obey()

    def _obey(self) -> None:
        message, received, _, _ = socket.recv_fds(self._control, COMMAND.size, 1)
        if not message:
            raise EOFError
        message += _exactly(self._control, COMMAND.size - len(message))
        command, process = COMMAND.unpack(message)
        if command == FORK:
            self._fork(received[0])
        elif command == TELL and process in self._hosts:
            os.kill(process, signal.SIGUSR1)
        elif command == END and process in self._hosts:
            os.kill(process, signal.SIGKILL)
            self._hosts.discard(process)
            os.waitpid(process, 0)
            self._end_strays()

    def _fork(self, descriptor: int) -> None:
        keeper = os.getpid()
        try:
            process = os.fork()
        except OSError as error:
            what = f"no process can be started for it, beside {len(self._hosts):,} others: {error.strerror}"
            self._connection.send_bytes(packed(value=UserError(what, where=self._hosted.name, fix="allow fewer processes")))
            os.close(descriptor)
            return
        if process == 0:
            self._become_host(descriptor, keeper)
        os.close(descriptor)
        self._hosts.add(process)
        self._connection.send_bytes(packed(process=process))

    def _become_host(self, descriptor: int, keeper: int) -> NoReturn:
        """Go on as a host, in the process that was forked."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for one in (*self._pipe, self._connection.fileno(), self._control.detach()):
            os.close(one)
        os.setpgid(0, 0)
        parent.end_with(keeper, None)
        trace = os.open(Path(self._hosted.folder) / str(os.getpid()), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        record_stacks(trace)
        with contextlib.suppress(EOFError, OSError):  # the trainer has closed the connection
            _Host(socket.socket(fileno=descriptor), self._hosted.kind, self._module, self._settings).serve()
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    def _reap(self) -> None:
        """Tell the trainer of hosts that have ended by themselves."""
        has_lost = False
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] in self._hosts:
                    self._hosts.discard(ended[0])
                    self._connection.send_bytes(packed(ended=ended[0], code=os.waitstatus_to_exitcode(ended[1])))
                    has_lost = True
        if has_lost:
            self._end_strays()

    def _end_strays(self) -> None:
        """End what a host has started and left behind: on Linux, it is a child of the keeper now."""
        end_descendants(os.getpid(), self._hosts)


class _Host:
    """Hosts one object of the user's after the other."""

    def __init__(self, pipe: socket.socket, kind: str, module: ModuleType, settings: Any):
        self._pipe, self._module, self._process = pipe, module, os.getpid()
        self._kind, self._more = getattr(module, kind), (() if settings is None else (settings,))
        self._object: Any = None
        self._loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self._loop)

    def serve(self) -> NoReturn:
        while True:
            (length,) = LENGTH.unpack(_exactly(self._pipe, LENGTH.size))
            message = self._called(_exactly(self._pipe, length))
            if os.getpid() != self._process:  # a fork that the user's code has made and not ended
                os._exit(1)
            self._pipe.sendall(LENGTH.pack(len(message)) + message)

    def _called(self, message: bytes) -> bytes:
        call = Call("", (), 0.0)
        try:
            call = pickle.loads(message)  # noqa: S301 - from the trainer
            if call.seed is not None:
                random.seed(call.seed)
                self._object = None
                self._object = self._kind(*self._more)
            if self._object is None:
                raise WrongResultError("has no object, because making it has failed")
            value = getattr(self._object, call.function)(*call.arguments)
            if isawaitable(value):
                value = self._loop.run_until_complete(self._awaited(value, call.seconds))
                if isinstance(value, Late):
                    return packed(value=value, is_late=True)
            return _result(value)
        except BaseException as error:  # `exit()` and KeyboardInterrupt in the user's code are failures too
            return packed(value=failure_of(error, call.function, self._module))

    async def _awaited(self, value: Awaitable[object], seconds: float) -> object:
        """Wait for a call that is `async`, and cancel it at its time limit."""
        task = asyncio.ensure_future(self._placed(value, seconds))
        done, _ = await asyncio.wait({task}, timeout=seconds)
        if not done:
            task.cancel()
            done, _ = await asyncio.wait({task}, timeout=MOMENT)
        return task.result() if done and not task.cancelled() else late(seconds)

    async def _placed(self, value: Awaitable[object], seconds: float) -> object:
        try:
            return await value
        except asyncio.CancelledError as error:
            return late(seconds, user_files.place_of(error, self._module))


class Late(Failure):
    """The failure of a call that has exceeded its time limit."""


def late(seconds: float, place: str | None = None) -> Late:
    """Return the failure of a call that has exceeded its time limit."""
    return Late(f"did not return within {seconds:g} s", place)


def _result(value: object) -> bytes:
    """Return a result as a message; a dataclass is an object of JSON. Raises WrongResultError: it is something that JSON does not have."""
    plain: object = value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        plain = dataclasses.asdict(value)
    elif isinstance(value, Mapping):
        plain = dict(value)
    try:
        return json.dumps({"result": plain}, default=_number).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise WrongResultError(f"returned {shown(value)}, which is not JSON: {error}") from error


def _number(value: Any) -> float:
    """Return a number of another library, such as NumPy, as a float; a truth value, as a bool."""
    if str(getattr(value, "dtype", "")) in ("bool", "torch.bool"):
        return bool(value)
    if hasattr(type(value), "__float__"):
        return float(value)
    raise TypeError(f"{type(value).__name__} is neither text, a number, a list nor an object")


def _exactly(pipe: socket.socket, size: int) -> bytes:
    """Receive so many bytes. Raises EOFError: the other side has closed the connection."""
    parts = []
    while size > 0:
        part = pipe.recv(min(size, 2**20))
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
