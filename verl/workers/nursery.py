"""The inside of the process that runs agents: it forks a process for each run of an agent's program, and ends it at its limit of time.

A Python program is imported once, so that a run costs a fork, and not a start of Python. Each run is a session of its own, with variables
of its own. What it has started ends with it; a process that has left the session ends when no run is left, and with the trainer at the
latest (see `verl.workers.serve`).
"""

import asyncio
import contextlib
import faulthandler
import json
import os
import pickle
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from inspect import isawaitable
from multiprocessing.connection import Connection, wait
from types import ModuleType
from typing import Any, NoReturn

from verl import user_files
from verl.errors import UserError
from verl.workers.calls import LONGEST_TEXT, Failure, WrongResultError, failure_of, number, packed, shown
from verl.workers.serve import adopt_orphans, end_descendants, fork_from_keeper, loaded
from verl.workers.warm import warm_openai

LOOK_SECONDS = 0.02  # between two looks at whether a run has ended
STACK_SECONDS = 0.05  # for a late run to write its stack
MOST_OUTPUT = 2**20  # bytes of a run's output that are kept, the last ones
LATE = "did not end within"
EXPECTED = "expected None, a number (its reward), a text (its answer), or {'reward': …, 'text': …}"


@dataclass(frozen=True)
class Program:
    """The program of an agent.

    Attributes:
        name: a Python file or module with `run(row)`; None: it is a command.
        words: the command, with its arguments.
    """

    name: str | None
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Start:
    """A run of the program, as it is sent to the process that forks it.

    Attributes:
        number: identifies the run.
        row: the data row, pickled.
        variables: environment variables that are the run's own.
        seed: of Python's random numbers.
        seconds: time limit.
    """

    number: int
    row: bytes
    variables: dict[str, str]
    seed: int
    seconds: float


@dataclass(frozen=True)
class Stop:
    """End a run now."""

    number: int


def serve(connection: int, lifeline: int, trace: int) -> None:
    """Run agents until the trainer closes the connection. The arguments are file descriptors, as those of `verl.workers.serve.serve`."""
    fork_from_keeper(connection, lifeline)
    os.close(trace)
    adopt_orphans()
    pipe = Connection(connection)
    os.set_inheritable(connection, False)
    try:
        _Nursery(pipe).serve()
    except (EOFError, OSError):  # the trainer has closed the connection
        os._exit(0)


@dataclass
class _Run:
    """A run that goes on.

    Attributes:
        process: its process, which leads a group and a session of its own.
        pipes: what it writes, by descriptor: its result, and what it prints beside it. A pipe that it has closed is no longer there.
    """

    start: Start
    process: int
    result: int
    said: int
    pipes: dict[int, bytearray] = field(default_factory=dict)
    is_late: bool = False
    _done: dict[int, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.pipes = {self.result: bytearray(), self.said: bytearray()}
        self.deadline = time.monotonic() + self.start.seconds
        for pipe in self.pipes:
            os.set_blocking(pipe, False)

    def read(self) -> None:
        """Read what the run has written. It never waits."""
        for pipe, found in list(self.pipes.items()):
            with contextlib.suppress(BlockingIOError):
                while read := os.read(pipe, 2**16):
                    found += read
                    del found[:-MOST_OUTPUT]
                self._close(pipe)

    def _close(self, pipe: int) -> None:
        self._done[pipe] = bytes(self.pipes.pop(pipe))
        os.close(pipe)

    def text(self, pipe: int) -> str:
        """Return what the run has written to a pipe."""
        return (self._done[pipe] if pipe in self._done else bytes(self.pipes[pipe])).decode(errors="replace")

    def end(self) -> None:
        """End the run's process with its descendants and its group, and close the pipes."""
        end_descendants(self.process)
        for kill in (os.killpg, os.kill):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                kill(self.process, signal.SIGKILL)

    def close(self) -> None:
        self.read()
        for pipe in list(self.pipes):
            self._close(pipe)


class _Nursery:
    def __init__(self, pipe: Connection):
        self._pipe, self._runs = pipe, dict[int, _Run]()
        program: Program = pipe.recv()
        self._words = program.words
        self._module = None if program.name is None else self._loaded(program.name)
        self._send(process=os.getpid())

    def _loaded(self, name: str) -> ModuleType:
        try:
            module, _ = loaded(name, None)
        except UserError as error:
            self._send(value=error)
            raise EOFError from error
        warm_openai()
        return module

    def _send(self, **message: object) -> None:
        self._pipe.send_bytes(packed(**message))

    def serve(self) -> NoReturn:
        while True:
            pipes = [pipe for run in self._runs.values() for pipe in run.pipes]
            ready = wait([self._pipe, *pipes], timeout=LOOK_SECONDS if self._runs else None)
            if self._pipe in ready:
                self._take(self._pipe.recv())
            for run in list(self._runs.values()):
                run.read()
                self._attend(run)

    def _take(self, message: Start | Stop) -> None:
        if isinstance(message, Start):
            self._runs[message.number] = self._forked(message)
        elif (run := self._runs.get(message.number)) is not None:
            run.end()

    def _forked(self, start: Start) -> _Run:
        """Start a run, and return it. In its own process, this does not return."""
        (result, gives), (said, says) = os.pipe(), os.pipe()
        process = os.fork()
        if process:
            os.close(gives)
            os.close(says)
            return _Run(start, process, result, said)
        others = [self._pipe.fileno(), result, said, *(pipe for run in self._runs.values() for pipe in run.pipes)]
        code = 1
        try:
            os.setsid()
            for descriptor in others:
                os.close(descriptor)
            os.environ.update(start.variables)
            run = self._run_command if self._module is None else self._run_function
            code = run(start, gives, says)
        finally:
            os._exit(code)

    def _run_function(self, start: Start, gives: int, says: int) -> int:
        """Call `run(row)` in a run's own process, and write the result to the trainer."""
        assert self._module is not None
        _redirect(os.open(os.devnull, os.O_RDONLY), 0)
        _redirect(says, 1)
        _redirect(1, 2)
        faulthandler.register(signal.SIGUSR1, file=2)
        _seed(start.seed)
        try:
            value = self._module.run(pickle.loads(start.row))  # noqa: S301 - from the trainer
            message = packed(result=result_of_run(asyncio.run(_awaited(value)) if isawaitable(value) else value))
        except BaseException as error:  # `exit()` in the program is a failure too
            message = packed(value=failure_of(error, "run", self._module))
        sys.stdout.flush()
        sys.stderr.flush()
        with os.fdopen(gives, "wb") as file:
            file.write(message)
        return 0

    def _run_command(self, start: Start, gives: int, says: int) -> int:
        """Become the command, in a run's own process: it reads the row as JSON from standard input."""
        with tempfile.TemporaryFile() as row:  # a pipe would fill up if the command does not read
            row.write(json.dumps(pickle.loads(start.row), default=str).encode())  # noqa: S301 - from the trainer
            row.seek(0)
            os.dup2(row.fileno(), 0)
        _redirect(gives, 1)
        _redirect(says, 2)
        try:
            os.execvp(self._words[0], self._words)  # noqa: S606 - the user's own program
        except OSError as error:
            os.write(2, f"{self._words[0]} cannot be started: {error.strerror}\n".encode())
        return 127

    def _attend(self, run: _Run) -> None:
        """Finish a run that has ended, and end one that is late."""
        process, status = os.waitpid(run.process, os.WNOHANG)
        if process:
            self._finish(run, os.waitstatus_to_exitcode(status))
        elif time.monotonic() > run.deadline and not run.is_late:
            run.is_late = True
            if self._module is not None:
                os.kill(run.process, signal.SIGUSR1)  # it writes its stack
                time.sleep(STACK_SECONDS)
                run.read()
            run.end()

    def _finish(self, run: _Run, code: int) -> None:
        run.end()  # what it has left behind
        run.close()
        del self._runs[run.start.number]
        if not self._runs:
            end_descendants(os.getpid())  # what has left its session
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
        self._send(number=run.start.number, **self._outcome(run, code))

    def _outcome(self, run: _Run, code: int) -> dict[str, Any]:
        """Return a run's result, or its failure."""
        result, said = run.text(run.result), run.text(run.said)
        if run.is_late:
            return {"value": Failure(f"{LATE} {run.start.seconds:g} s (agent.seconds)", self._place(said))}
        if self._module is not None and result:
            found: dict[str, Any] = json.loads(result)
            return found
        if self._module is None and code == 0:
            try:
                return {"result": result_of_output(result)}
            except WrongResultError as error:
                return {"value": Failure(str(error))}
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        last = next((line.strip() for line in reversed(said.splitlines()) if line.strip()), "")
        return {"value": Failure(f"ended {how}{f': {last[:LONGEST_TEXT]}' if last else ''}")}

    def _place(self, said: str) -> str | None:
        """Return the last line of the user's own code in a stack that a late run has written; None if there is none."""
        if self._module is None:
            return None
        frames = re.findall(r'File "(.+?)", line (\d+) in', said)  # the innermost first
        return next((f"{name}:{line}" for name, line in frames if user_files.is_own_file(name, self._module)), None)


def _redirect(descriptor: int, target: int) -> None:
    os.dup2(descriptor, target)
    if descriptor > 2:
        os.close(descriptor)


def _seed(seed: int) -> None:
    """Give a run random numbers of its own: all runs are forks of one process."""
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)


async def _awaited(value: Any) -> object:
    return await value


def result_of_run(value: object) -> dict[str, Any]:
    """Return what `run(row)` has returned as {"reward": number or None, "text": text or None}.

    Raises:
        WrongResultError: it is something else.
    """
    if value is None or isinstance(value, str):
        return {"reward": None, "text": value}
    if isinstance(value, dict):
        reward, text = value.get("reward"), value.get("text")
        if value.keys() <= {"reward", "text"} and (text is None or isinstance(text, str)):
            return {"reward": None if reward is None else _reward(number, reward), "text": text}
        raise WrongResultError(f"returned {shown(value)}, {EXPECTED}")
    return {"reward": _reward(number, value), "text": None}


def _reward(read: Callable[[object], float], value: object) -> float:
    try:
        return read(value)
    except WrongResultError as error:
        raise WrongResultError(f"returned {shown(value)}, {EXPECTED}") from error


def result_of_output(output: str) -> dict[str, Any]:
    """Return what a command has printed as `result_of_run` does.

    If its last line is a JSON object, it is the result, else there is none.

    Raises:
        WrongResultError: the object has other keys than `reward` and `text`, or values of other types.
    """
    last = next((line for line in reversed(output.splitlines()) if line.strip()), "")
    if not last.lstrip().startswith("{"):
        return result_of_run(None)
    try:
        found = json.loads(last)
    except ValueError:
        return result_of_run(None)
    return result_of_run(found)
