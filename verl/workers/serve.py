"""The inside of a worker: it imports the user's module and answers calls until the trainer closes the connection.

A worker is two processes: a keeper and, forked from it, the one that runs the user's code. The keeper ends them both, and all that the
user's code has started, when the trainer has ended, even by SIGKILL.
"""

import asyncio
import contextlib
import ctypes
import faulthandler
import os
import pickle
import signal
import sys
import threading
from collections.abc import Awaitable, Collection
from dataclasses import dataclass
from inspect import isawaitable
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from verl import plugin, user_files
from verl.errors import UserError
from verl.workers.calls import failure_of, late, packed, result_of
from verl.workers.spawned import run_in_children

PR_SET_CHILD_SUBREAPER = 36
ROUNDS = 5  # of looking for processes to end


@dataclass(frozen=True)
class Code:
    """What a worker runs.

    Attributes:
        name: path or dotted name of the user's module.
        settings: the pickled settings that each function gets as its last argument; None: it has none.
        is_async: whether calls run at the same time.
    """

    name: str
    settings: bytes | None
    is_async: bool


@dataclass(frozen=True)
class Call:
    """A call, as it is sent to a worker.

    Attributes:
        number: identifies its result.
        seconds: time limit. The worker keeps it if the function is `async`; otherwise the trainer does.
        arguments: pickled, so that no call sees what another has changed.
    """

    number: int
    function: str
    seconds: float
    arguments: bytes


def serve(connection: int, lifeline: int, trace: int) -> None:
    """Run a worker. The arguments are file descriptors.

    Args:
        connection: a socket for calls and results.
        lifeline: a pipe that the trainer never writes to; its end is the end of the trainer.
        trace: a file that gets the stack if the process crashes, or receives SIGUSR1.
    """
    _fork_from_keeper(connection, lifeline)
    record_stacks(trace)
    pipe = Connection(connection)
    os.set_inheritable(connection, False)
    try:
        _Server(pipe).serve()
    except (EOFError, OSError):  # the trainer has closed the connection
        os._exit(0)


class _Server:
    def __init__(self, pipe: Connection):
        self._pipe, self._process, self._sending = pipe, os.getpid(), threading.Lock()
        code: Code = pipe.recv()
        self._module, settings = self._loaded(code)
        self._more = () if settings is None else (settings,)
        self._is_async = code.is_async
        self._loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self._loop)
        self._send(process=self._process)

    def serve(self) -> None:
        if self._is_async:
            self._loop.run_until_complete(self._serve_together())
        while True:
            call: Call = self._pipe.recv()
            self._reply(call, self._called(call))

    def _loaded(self, code: Code) -> tuple[ModuleType, Any]:
        try:
            return loaded(code.name, code.settings)
        except UserError as error:
            self._send(value=error)
        raise EOFError

    def _reply(self, call: Call, value: object) -> None:
        if os.getpid() != self._process:  # a fork that the user's code has made and not ended
            os._exit(1)
        self._send(number=call.number, value=value)

    def _send(self, **message: object) -> None:
        with self._sending:
            self._pipe.send_bytes(packed(**message))

    def _called(self, call: Call) -> object:
        try:
            arguments = pickle.loads(call.arguments)  # noqa: S301 - from the trainer
            value = getattr(self._module, call.function)(*arguments, *self._more)
            if isawaitable(value):
                value = self._loop.run_until_complete(_awaited(value))
            return result_of(call.function, value, arguments)
        except BaseException as error:  # `exit()` and KeyboardInterrupt in the user's code are failures too
            return failure_of(error, call.function, self._module)

    async def _serve_together(self) -> NoReturn:
        """Run each call as a task of its own. Calls are read in a thread, so that they also arrive while tasks run."""
        calls: asyncio.Queue[Call | None] = asyncio.Queue()
        threading.Thread(target=self._read, args=(calls,), daemon=True).start()
        running: set[asyncio.Task[None]] = set()
        while (call := await calls.get()) is not None:
            task = self._loop.create_task(self._answer(call))
            running.add(task)
            task.add_done_callback(running.discard)
        raise EOFError

    def _read(self, calls: "asyncio.Queue[Call | None]") -> None:
        call: Call | None = None
        while True:
            try:
                call = self._pipe.recv()
            except (EOFError, OSError):
                call = None
            self._loop.call_soon_threadsafe(calls.put_nowait, call)
            if call is None:
                return

    async def _answer(self, call: Call) -> None:
        try:
            value = await asyncio.wait_for(self._called_async(call), call.seconds)
        except (TimeoutError, asyncio.TimeoutError):
            value = late(call.seconds)
        self._reply(call, value)

    async def _called_async(self, call: Call) -> object:
        try:
            arguments = pickle.loads(call.arguments)  # noqa: S301 - from the trainer
            value = getattr(self._module, call.function)(*arguments, *self._more)
            return result_of(call.function, await value if isawaitable(value) else value, arguments)
        except asyncio.CancelledError as error:  # at the time limit
            return late(call.seconds, user_files.place_of(error, self._module))
        except BaseException as error:
            return failure_of(error, call.function, self._module)


async def _awaited(value: Awaitable[object]) -> object:
    return await value


def loaded(name: str, settings: bytes | None) -> tuple[ModuleType, Any]:
    """Import a user's module by its path or dotted name, and unpickle its settings. Raises UserError: one of them cannot be read."""
    module = plugin.load("verl", name)
    path = Path(module.__file__ or "").resolve()
    if module.__name__.startswith(user_files.FOLDER):
        run_in_children(path)
    sys.path.append(str(path.parent))  # for `importlib.import_module` and pickles of the user's
    try:
        return module, None if settings is None else pickle.loads(settings)  # noqa: S301
    except Exception as error:  # settings of a class of the user's
        what = f"cannot read its settings: {type(error).__name__}: {error}"
        raise UserError(what, where=name, fix="correct its Settings") from error


def record_stacks(trace: int) -> None:
    """Write the stack to the file if the process crashes, is asked by SIGUSR1, or leaves by `os._exit`."""
    faulthandler.enable(file=trace)
    faulthandler.register(signal.SIGUSR1, file=trace)
    leave, process = os._exit, os.getpid()

    def record_and_leave(status: int) -> NoReturn:
        if os.getpid() == process:
            faulthandler.dump_traceback(file=trace)
        leave(status)

    os._exit = record_and_leave


class _WorkerEnded(BaseException):
    """The process that runs the user's code has ended; the argument is its exit code."""


def _fork_from_keeper(connection: int, lifeline: int) -> None:
    """Return in a new process. This one waits for its end, or for that of the trainer, and ends all that the user's code has started."""
    worker = 0

    def child_ended(*_: object) -> None:
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if ended[0] == worker:
                raise _WorkerEnded(os.waitstatus_to_exitcode(ended[1]))

    adopt_orphans()
    signal.signal(signal.SIGCHLD, child_ended)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    worker = os.fork()
    if worker == 0:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        os.close(lifeline)
        return
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        os.close(connection)
        os.read(lifeline, 1)
    except _WorkerEnded as end:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        end_descendants(os.getpid())
        _end_as(end.args[0])
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    end_descendants(os.getpid())
    os.killpg(0, signal.SIGKILL)


def adopt_orphans() -> None:
    """Let processes whose parent ends become children of this one, so that it finds those that left its group (on Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_descendants(process: int, without: Collection[int] = ()) -> None:
    """End the processes that descend from one, also those in sessions of their own (on Linux). They may start others meanwhile.

    Args:
        without: processes that are left alone, with all that descend from them.
    """
    for _ in range(ROUNDS):
        found = _descendants(process, without)
        for one in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(one, signal.SIGKILL)
        if not found:
            break


def _descendants(process: int, without: Collection[int]) -> list[int]:
    """Return the running processes that descend from one."""
    children: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            state, parent = status.read_text(errors="replace").rpartition(")")[2].split()[:2]
            if state not in "ZX":
                children.setdefault(int(parent), []).append(int(status.parent.name))
    found = [process]
    for one in found:  # it grows meanwhile
        found += [child for child in children.get(one, []) if child not in without]
    return found[1:]


def _end_as(code: int) -> NoReturn:
    """End with the exit code of another process, or by the signal that ended it."""
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code not in (signal.SIGKILL, signal.SIGSTOP) else None
        os.kill(os.getpid(), -code)
    os._exit(code)
