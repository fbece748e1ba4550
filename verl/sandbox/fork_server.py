"""The process that starts programs and watches them. It has loaded Python already, so that a program starts in milliseconds.

It has no secrets: its environment is empty, and neither code nor output passes through it. On the connection with the process that has
started it come:

    begin       a message in JSON, with three sockets: a line to talk about the program, one for code, one for output

and on the line of each program:

    run         a piece of code comes: the program may run, and its time begins
    output      it has printed too much: end it
    (closed)    end it, and forget it

It answers on that line with `ready`, then with `done` for each piece of code, or `ended: REASON`. Between pieces, a program is stopped
(SIGSTOP). All programs end with this process, which ends when the connection is closed.
"""

import contextlib
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from verl.sandbox import program
from verl.sandbox.limits import Limits
from verl.sandbox.walls import WALLS, Wall

MESSAGE_BYTES = 4096
SECONDS_BETWEEN_LOOKS = 0.02  # at the clocks of running programs
LOOKS_BETWEEN_FOLDERS = 5
SECONDS_TO_START = 30.0


@dataclass
class _Program:
    """A program.

    Attributes:
        process: its number, and `handle` a descriptor of it that cannot become another's.
        line: to the process that wants it; None once that has closed it.
        done: a pipe, to which the program writes after each piece.
        deadline: monotonic time at which it is ended; infinite while it rests.
        cpu_end: processor time at which it is ended.
        reason: why it is being ended.
    """

    process: int
    handle: int
    line: socket.socket | None
    done: int
    folder: str | None
    limits: Limits
    deadline: float
    cpu_end: float
    is_ready: bool = False
    reason: str = ""


def serve(connection: int, wall: str, modules: list[str]) -> NoReturn:
    """Run the server.

    Args:
        connection: file descriptor of a socket.
        wall: name of the wall, see `WALLS`.
        modules: that are imported before the first program starts, so that all have them.
    """
    control = socket.socket(fileno=connection)
    try:
        for name in modules:
            importlib.import_module(name)
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")  # if memory runs out, the kernel ends a program first
        WALLS[wall].begin()
    except Exception as error:
        control.send(f"{type(error).__name__}: {error}".encode())
        os._exit(1)
    gc.collect()
    gc.freeze()
    control.send(b"ready")
    _Server(control, WALLS[wall]).serve()


class _Server:
    def __init__(self, control: socket.socket, wall: Wall):
        self._control, self._wall, self._looks = control, wall, 0
        self._selector = selectors.DefaultSelector()
        self._running: dict[int, _Program] = {}  # by process
        self._programs: dict[int, _Program] = {}
        self._listen(control.fileno(), self._begin)

    def serve(self) -> NoReturn:
        while True:
            for key, _ in self._selector.select(SECONDS_BETWEEN_LOOKS if self._running else None):
                if key.fileobj in self._selector.get_map():  # one before it may have ended its program
                    key.data()
            self._look()

    def _listen(self, descriptor: int, then: Callable[[], None]) -> None:
        self._selector.register(descriptor, selectors.EVENT_READ, then)

    def _begin(self) -> None:
        message, descriptors, _, _ = socket.recv_fds(self._control, MESSAGE_BYTES, 3)
        if not message:
            self._leave()
        wanted = json.loads(message)
        limits, line = Limits(**wanted["limits"]), socket.socket(fileno=descriptors[0])
        try:
            self._fork(limits, line, descriptors[1], descriptors[2], wanted["seed"])
        except OSError as error:  # no more processes, or a full disk
            with contextlib.suppress(OSError):
                line.send(f"ended: it could not be started: {error}".encode())
            line.close()
        for descriptor in descriptors[1:]:
            os.close(descriptor)

    def _fork(self, limits: Limits, line: socket.socket, code: int, output: int, seed: int) -> None:
        folder = self._wall.make_folder()
        done, tell = os.pipe()
        process = os.fork()
        if process == 0:
            program.run(self._wall, limits, folder, (output, code, tell), seed)
        os.close(tell)
        handle = os.pidfd_open(process)
        new = _Program(process, handle, line, done, folder, limits, time.monotonic() + SECONDS_TO_START, float("inf"))
        self._programs[process] = self._running[process] = new
        self._listen(handle, lambda: self._ended(new))
        self._listen(done, lambda: self._told(new))
        self._listen(line.fileno(), lambda: self._asked(new))

    def _asked(self, one: _Program) -> None:
        assert one.line is not None
        message = one.line.recv(MESSAGE_BYTES)
        if message == b"run":
            one.deadline, one.cpu_end = time.monotonic() + one.limits.seconds, _cpu_seconds(one.process) + one.limits.cpu_seconds
            self._running[one.process] = one
            _signal(one, signal.SIGCONT)
        elif message == b"output":
            self._end(one, f"printed more than {one.limits.output_bytes:,} bytes")
        else:
            self._forget_line(one)
            self._end(one, "closed")

    def _told(self, one: _Program) -> None:
        """A program has written that it is ready, or that a piece of code is done. If that is not true, it is stopped all the same."""
        message = os.read(one.done, MESSAGE_BYTES)
        if not message:
            self._selector.unregister(one.done)
            return
        if not one.is_ready and message != b".":
            self._end(one, f"could not be started: {message.decode(errors='replace')}")
            return
        _signal(one, signal.SIGSTOP)
        self._running.pop(one.process, None)
        if self._is_full(one):
            self._end(one, _too_much(one.limits))
            return
        self._say(one, "done" if one.is_ready else "ready")
        one.is_ready = True

    def _look(self) -> None:
        self._looks += 1
        now, with_folders = time.monotonic(), self._looks % LOOKS_BETWEEN_FOLDERS == 0
        for one in list(self._running.values()):
            if now > one.deadline:
                self._end(one, f"ran longer than {one.limits.seconds:g} s" if one.is_ready else "could not be started in time")
            elif _cpu_seconds(one.process) > one.cpu_end:
                self._end(one, f"used more than {one.limits.cpu_seconds:g} s of processor time")
            elif with_folders and self._is_full(one):
                self._end(one, _too_much(one.limits))

    def _is_full(self, one: _Program) -> bool:
        return self._wall.is_full(one.folder, one.process, one.limits.folder_bytes, one.limits.files)

    def _end(self, one: _Program, reason: str) -> None:
        one.reason = one.reason or reason
        one.deadline = one.cpu_end = float("inf")
        _signal(one, signal.SIGKILL)

    def _ended(self, one: _Program) -> None:
        """A program has ended: tell why, and remove what it leaves."""
        code = os.waitstatus_to_exitcode(os.waitpid(one.process, 0)[1])
        with contextlib.suppress(KeyError):
            self._selector.unregister(one.done)
        self._selector.unregister(one.handle)
        os.close(one.done)
        os.close(one.handle)
        del self._programs[one.process]
        self._running.pop(one.process, None)
        self._wall.remove(one.folder)
        self._say(one, f"ended: {one.reason or _way_of(code)}")
        self._forget_line(one)

    def _say(self, one: _Program, text: str) -> None:
        if one.line is not None:
            with contextlib.suppress(OSError):  # it has been closed at the other end
                one.line.send(text.encode())

    def _forget_line(self, one: _Program) -> None:
        if one.line is not None:
            self._selector.unregister(one.line.fileno())
            one.line.close()
            one.line = None

    def _leave(self) -> NoReturn:
        for one in list(self._programs.values()):
            self._end(one, "closed")
            self._ended(one)
        os._exit(0)


def _signal(one: _Program, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(one.handle, number)


def _cpu_seconds(process: int) -> float:
    """Return the processor time of a process, by the clock that each process has: see clock_getcpuclockid(3)."""
    try:
        return time.clock_gettime((~process << 3) | 2)
    except OSError:  # it has just ended
        return 0.0


def _way_of(code: int) -> str:
    if code >= 0:
        return f"ended its process with exit code {code}"
    if -code in (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT):
        return f"crashed ({signal.Signals(-code).name})"
    return f"was ended by signal {-code}"


def _too_much(limits: Limits) -> str:
    return f"kept more than {limits.folder_bytes:,} bytes or {limits.files:,} files in its folder"
