"""The trainer's side of agents' programs: it starts runs, waits for their ends, and ends them (see `verl.workers.nursery`)."""

import asyncio
import os
import pickle
import re
import shlex
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from verl import plugin
from verl.config.agent import ADDRESS
from verl.config.workers import WorkersConfig
from verl.errors import UserError
from verl.workers.calls import Failure, check_function, unpacked
from verl.workers.nursery import Program, Start, Stop
from verl.workers.pool import Worker, environment

# What an import says that looks for the endpoint.
LOOKS_FOR_ENDPOINT = re.compile(r"OPENAI_|AGENT_SEED|(?i:\bcredentials\b|\bapi_key\b)")
ONLY_IN_RUN = (
    "OPENAI_BASE_URL, OPENAI_API_KEY, OPENAI_MODEL and AGENT_SEED exist only inside run(row). A client that is made at the import needs "
    'some key, openai.OpenAI(api_key="-"), and in run its address: '
    'client.with_options(base_url=os.environ["OPENAI_BASE_URL"], api_key=os.environ["OPENAI_API_KEY"])'
)
IMPORT_SECONDS = 300.0  # for the program to be imported in its own process


@dataclass(frozen=True)
class Result:
    """What a run of a program has given.

    Attributes:
        reward: its own reward for its answer; None: it gives none.
        text: its answer, for graders; None: the last turn of the model.
    """

    reward: float | None = None
    text: str | None = None


def load_program(given: str) -> Program:
    """Return the program that `agent.program` names: a Python file with `run(row)`, or a command.

    Raises:
        UserError: there is no such file or command, or it has no function `run`.
    """
    where = f"agent.program={given}"
    try:
        words = shlex.split(given)
    except ValueError as error:
        raise UserError(f"cannot be read as a command: {error}", where=where, fix="quote its words as in a shell") from error
    if not words:
        raise UserError("is empty", where="agent.program", fix="give path/to/agent.py with a function run(row), or a command")
    if len(words) == 1 and words[0].endswith(".py"):
        module = _imported(words[0])
        check_function(module, "run", where)
        return Program(words[0])
    if shutil.which(words[0]) is None:
        fix = "give path/to/agent.py with a function run(row), or a command such as 'python agent.py'"
        raise UserError(f"there is no command {words[0]!r}", where=where, fix=fix)
    return Program(None, tuple(words))


def _imported(name: str) -> ModuleType:
    """Import a program as its own process does: without the trainer's address of a service."""
    with _without(ADDRESS):
        try:
            return plugin.load("verl", name, needs=("run",))
        except UserError as error:
            raise _explained(error) from error


@contextmanager
def _without(names: tuple[str, ...]) -> Iterator[None]:
    """In this context, the environment does not have the variables."""
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def _explained(error: UserError) -> UserError:
    """Return the error of an import; with what to do, if it looks for the endpoint there."""
    return UserError(error.what, where=error.where, fix=ONLY_IN_RUN) if LOOKS_FOR_ENDPOINT.search(error.what) else error


class Agents:
    """Runs of an agent's program, each in a process of its own. They end with this object, and with the trainer.

    Args:
        seconds: time limit of a run.
    Attributes:
        dropped: names of the environment variables that look like secrets and that the runs do not get.
    """

    def __init__(self, program: Program, seconds: float, config: WorkersConfig):
        self._program, self._seconds = program, seconds
        variables, dropped = environment(config)
        self._variables = {name: value for name, value in variables.items() if name not in ADDRESS}
        self.dropped = [name for name in dropped if name not in ADDRESS]  # each run has its own
        self._worker: Worker | None = None
        self._waiting: dict[int, tuple[asyncio.AbstractEventLoop, asyncio.Future[Any]]] = {}
        self._started, self._lock = 0, threading.Lock()

    async def run(self, row: Mapping[str, Any], variables: dict[str, str], seed: int) -> Result | Failure:
        """Run the program for a row. If this is cancelled, the run is ended.

        Args:
            variables: environment variables of this run alone.
            seed: of Python's random numbers in the run.
        Raises:
            UserError: the program cannot be used at all.
        """
        loop = asyncio.get_running_loop()
        with self._lock:
            number = self._started = self._started + 1
            self._waiting[number] = loop, loop.create_future()
        try:
            worker = self._ready()
            worker.connection.send(Start(number, pickle.dumps(dict(row)), variables, seed, self._seconds))
            message = await self._waiting[number][1]
        except OSError:
            return Failure("could not be started: the process that runs agents has ended")
        finally:
            with self._lock:
                _, future = self._waiting.pop(number)
            if not future.done() or future.cancelled():
                self._stop(number)
        return Result(**message["result"]) if "result" in message else _failure(message["value"])

    def _stop(self, number: int) -> None:
        if self._worker is not None:
            try:
                self._worker.connection.send(Stop(number))
            except OSError:  # it has ended, and the run with it
                self.close()

    def _ready(self) -> Worker:
        """Return the process that runs agents, which is started if there is none."""
        if self._worker is None or self._worker.has_ended():
            self.close()
            self._worker = Worker(self._program, self._variables, "verl.workers.nursery")
            threading.Thread(target=self._read, args=(self._worker,), name="agents", daemon=True).start()
        return self._worker

    def _read(self, worker: Worker) -> None:
        """Hand on what comes from the process, until it ends."""
        message: dict[str, Any] = {"value": Failure("ended with the process that runs agents (is the memory full?)")}
        try:
            while True:
                received = unpacked(worker.connection.recv_bytes())
                worker.process_id = received.get("process", worker.process_id)
                if "number" in received:
                    self._tell([received["number"]], received)
                elif "value" in received:
                    message = received
        except (EOFError, OSError, ValueError, LookupError):
            self._tell(list(self._waiting), message)

    def _tell(self, numbers: list[int], message: dict[str, Any]) -> None:
        with self._lock:
            for loop, future in (self._waiting[number] for number in numbers if number in self._waiting):
                if not loop.is_closed():
                    loop.call_soon_threadsafe(_finish, future, message)

    def close(self) -> None:
        """End all runs, whatever they do."""
        if self._worker is not None:
            self._worker.end()
            self._worker = None


def _finish(future: "asyncio.Future[Any]", message: dict[str, Any]) -> None:
    if not future.done():
        future.set_result(message)


def _failure(value: Failure | UserError) -> Failure:
    if isinstance(value, UserError):
        raise _explained(value)
    return value
