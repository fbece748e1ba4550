"""Objects of a user's class in processes of their own, one object at a time in each: the trainer's side (see `verl.workers.host`).

Many objects live side by side, and a call of one waits for nothing but itself. What raises, crashes its process or takes too long is a
failure of that call alone, and in the last two cases the end of its object.
"""

import asyncio
import contextlib
import os
import pickle
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

from verl import user_files
from verl.config.workers import WorkersConfig
from verl.errors import UserError
from verl.workers.calls import Failure, unpacked
from verl.workers.host import COMMAND, END, FORK, LENGTH, TELL, Call, Hosted, Late, late
from verl.workers.pool import environment
from verl.workers.serve import end_descendants

GRACE_SECONDS = 1.0  # for a host to keep the time limit of an `async` method
IMPORT_SECONDS = 600.0  # for the keeper to import what this process has imported before
STACK_SECONDS = 1.0  # for a host to record what it is doing
LARGEST_RESULT = 2**26  # bytes
START = "import sys; given, sys.path[:] = sys.argv[1], sys.argv[2:]; del sys.argv[1:]; from verl.workers.host import keep; keep(int(given))"


class HostEndedError(Exception):
    """The process of an object has ended, or was ended because of its time limit.

    Attributes:
        failure: what happened; of the time limit, it is Late.
    """

    def __init__(self, failure: Failure):
        super().__init__(str(failure))
        self.failure = failure


class Hosts:
    """Processes that each host an object of a user's class. They end with this object, and with the trainer.

    Args:
        module: the user's module, as this process has imported it.
        kind: name of the class.
        settings: what the class is called with; None: nothing.
        what: name of the code for messages, such as "environment mine".
        most: maximum number of processes. More objects wait.
        secrets: names of variables of the environment that the processes get although they look like secrets.
    Attributes:
        dropped: names of the variables that look like secrets and that the processes do not get.
    """

    def __init__(self, module: ModuleType, kind: str, settings: object | None, what: str, *, most: int, secrets: list[str]):
        is_file = module.__name__.startswith(user_files.FOLDER)
        name = str(Path(str(module.__file__)).absolute()) if is_file else module.__name__
        self.module, self.what = module, what
        variables, self.dropped = environment(WorkersConfig(secrets=secrets))
        self.folder = Path(tempfile.mkdtemp(prefix="verl-hosts-"))
        ours, theirs = socket.socketpair()
        self._control = socket.socket(fileno=os.dup(ours.fileno()))
        self._connection = Connection(ours.detach())
        command = [sys.executable, "-u", "-c", START, str(theirs.fileno()), *sys.path]
        self._keeper = subprocess.Popen(  # noqa: S603
            command, stdin=subprocess.DEVNULL, env=variables, pass_fds=[theirs.fileno()], start_new_session=True
        )
        theirs.close()
        self._finalizer = weakref.finalize(self, _end, self._keeper, self._connection, self._control, self.folder, os.getpid())
        self._connection.send(Hosted(name, kind, None if settings is None else pickle.dumps(settings), str(self.folder)))
        self._is_ready, self._codes = False, dict[int, int]()
        _allow_files(most)
        self._room, self._free, self._all = asyncio.Semaphore(most), list[Host](), set[Host]()

    async def begin(self) -> "Host":
        """Return a host for a new object, as soon as there is one. It is given back with `Host.release`.

        Raises:
            UserError: the module cannot be imported there, or no process can be started.
        """
        await self._room.acquire()
        try:
            return self._free.pop() if self._free else await self._start()
        except BaseException:
            self._room.release()
            raise

    async def _start(self) -> "Host":
        if not self._is_ready:
            self._wait_for("process", IMPORT_SECONDS)
            self._is_ready = True
        ours, theirs = socket.socketpair()
        socket.send_fds(self._control, [COMMAND.pack(FORK, 0)], [theirs.fileno()])
        theirs.close()
        process = int(self._wait_for("process", IMPORT_SECONDS)["process"])
        reader, writer = await asyncio.open_connection(sock=ours, limit=LARGEST_RESULT)
        host = Host(self, process, reader, writer)
        self._all.add(host)
        return host

    def _wait_for(self, key: str, seconds: float) -> dict[str, Any]:
        """Return the keeper's next message that has the key. Raises UserError: it is an error, or the keeper has ended."""
        try:
            deadline = time.monotonic() + seconds
            while self._connection.poll(max(0.0, deadline - time.monotonic())):
                message = unpacked(self._connection.recv_bytes())
                if "ended" in message:
                    self._codes[int(message["ended"])] = int(message["code"])
                if "value" in message:
                    error = message["value"]
                    raise UserError(f"{self.what} {error.what}, in its own process", where=error.where, fix=error.fix)
                if key in message:
                    return message
        except (EOFError, OSError):
            pass
        raise UserError(f"{self.what} cannot be imported in its own process", where=self.module.__file__, fix="correct the file")

    def command(self, command: int, process: int) -> None:
        """Tell the keeper what to do with a host."""
        with contextlib.suppress(OSError):  # it has ended, and its hosts with it
            self._control.sendall(COMMAND.pack(command, process))

    def code_of(self, process: int) -> int | None:
        """Return the exit code of a host that has ended by itself; None if it is not known. It may have to be waited for a moment."""
        deadline = time.monotonic() + 2.0
        while process not in self._codes and time.monotonic() < deadline:
            with contextlib.suppress(UserError):
                self._wait_for("ended", deadline - time.monotonic())
        return self._codes.pop(process, None)

    def take_back(self, host: "Host") -> None:
        """Let another object have the host's room, and the host itself if it still runs."""
        if not host.has_ended:
            self._free.append(host)
        self._room.release()

    def forget(self, host: "Host") -> None:
        """Note that a host has ended."""
        self._all.discard(host)

    def fix_for(self, what: str) -> str | None:
        """Return the fix of a failure whose text names a variable that the processes do not get."""
        named = [name for name in self.dropped if name in what]
        if not named:
            return None
        return f"the process has no variables that look like secrets; pass on what it needs: environment.secrets=[{','.join(named)}]"

    async def close(self) -> None:
        """End the processes, whatever they do."""
        for host in list(self._all):
            host.close()
        await asyncio.sleep(0)  # for the connections to close
        self._finalizer()


class Host:
    """A process that hosts an object. One call at a time is made.

    Attributes:
        has_ended: whether it hosts no more objects.
    """

    def __init__(self, hosts: Hosts, process: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self._hosts, self._process, self._reader, self._writer = hosts, process, reader, writer
        self.has_ended = False

    async def call(self, function: str, *arguments: Any, seconds: float, seed: int | None = None) -> Any:
        """Call a method of the object. Return its result as JSON's types, or a Failure.

        Args:
            seconds: time limit.
            seed: not None: make a new object first.
        Raises:
            HostEndedError: the process has ended, or was ended because of the time limit.
            UserError: the code cannot be used at all.
        """
        task = asyncio.ensure_future(self._exchange(Call(function, arguments, seconds, seed)))
        try:
            done, _ = await asyncio.wait({task}, timeout=seconds + GRACE_SECONDS)
            if not done:
                place = await self._place_now()
                raise HostEndedError(late(seconds, place))
            return self._read(task.result())
        except (EOFError, OSError):
            raise HostEndedError(self._how_it_ended()) from None
        finally:
            if not task.done() or task.cancelled() or task.exception() is not None:
                task.cancel()
                self.close()

    def _read(self, message: dict[str, Any]) -> Any:
        if "result" in message:
            return message["result"]
        value = message["value"]
        if isinstance(value, UserError):
            raise value
        kind = Late if message.get("is_late") else Failure
        return kind(value.what, value.place, self._hosts.fix_for(value.what))

    async def _exchange(self, call: Call) -> dict[str, Any]:
        message = pickle.dumps(call)
        self._writer.write(LENGTH.pack(len(message)) + message)
        await self._writer.drain()
        (length,) = LENGTH.unpack(await self._reader.readexactly(LENGTH.size))
        if length > LARGEST_RESULT:
            return {"value": Failure(f"returned {length:,} bytes, more than {LARGEST_RESULT:,}")}
        found = await self._reader.readexactly(length)
        return unpacked(found)

    async def _place_now(self) -> str | None:
        """Return the line of the user's code at which the process is."""
        self._hosts.command(TELL, self._process)
        deadline = time.monotonic() + STACK_SECONDS
        while not self._stack() and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.05)  # the first lines are there, and the rest follows
        return self._place()

    def _how_it_ended(self) -> Failure:
        code = self._hosts.code_of(self._process)
        how = "" if code is None else f" by {signal.Signals(-code).name}" if code < 0 else f" with exit code {code}"
        why = " (is the memory full?)" if code == -signal.SIGKILL else ""
        return Failure(f"ended its process{how}{why}", self._place())

    def _stack(self) -> str:
        with contextlib.suppress(OSError):
            return (self._hosts.folder / str(self._process)).read_text(errors="replace")
        return ""

    def _place(self) -> str | None:
        frames = re.findall(r'File "(.+?)", line (\d+) in', self._stack())  # the innermost first
        return next((f"{name}:{line}" for name, line in frames if user_files.is_own_file(name, self._hosts.module)), None)

    def release(self) -> None:
        """Give the host back, for another object."""
        self._hosts.take_back(self)

    def close(self) -> None:
        """End the process, whatever it does, and all that it has started."""
        if not self.has_ended:
            self.has_ended = True
            self._hosts.forget(self)
            self._hosts.command(END, self._process)
            self._writer.close()


def _allow_files(more: int) -> None:
    """Let this process have so many more files open, as far as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(hard, 1024 + more) if hard != resource.RLIM_INFINITY else 1024 + more
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _end(keeper: "subprocess.Popen[bytes]", connection: Connection, control: socket.socket, folder: Path, owner: int) -> None:
    if os.getpid() != owner:  # a fork of the trainer
        return
    end_descendants(keeper.pid)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(keeper.pid, signal.SIGKILL)
    keeper.wait()
    connection.close()
    control.close()
    shutil.rmtree(folder, ignore_errors=True)
