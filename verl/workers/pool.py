"""The trainer's side of worker processes: it hands out calls, collects results, and replaces workers that crash or take too long."""

import contextlib
import os
import pickle
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
from typing import IO, Any, Protocol

from verl import user_files
from verl.config.workers import WorkersConfig
from verl.errors import AbandonedError, UserError
from verl.redaction import holds_secret
from verl.workers.calls import Failure, InProcess, is_async, late, unpacked
from verl.workers.serve import Call, Code, end_descendants

SECONDS_BETWEEN_LOOKS = 0.2  # at deadlines and signals, while no result arrives
TOGETHER = 64  # calls of an `async` function that run at the same time in a worker
AHEAD = 32  # calls that wait in the pipe to a worker whose last call was quick, so that it need not wait for the trainer between calls
AHEAD_BYTES = 2**15  # of these calls: far below the pipe's buffer, so that sending never waits for a call to end
QUICK_SECONDS = 0.005
SECONDS_BEFORE_LINE = 10.0  # of a wait; the time to each next line is twice as long
GRACE_SECONDS = 5.0  # for a worker to keep the time limit of an `async` function
STOP_SECONDS = 3.0  # for calls to end after a signal, so that the run has saved and ended within 10 seconds
START = (
    "import sys; given, sys.path[:] = sys.argv[1:4], sys.argv[4:]; del sys.argv[1:]; from {module} import serve; serve(*map(int, given))"
)
# Names of variables that hold secrets, such as HF_TOKEN, AWS_SECRET_ACCESS_KEY and SSH_AUTH_SOCK.
SECRET_NAME = re.compile(
    r"(?i)token(?!iz)|secret|passw|passphrase|credential|apikey|_key(?:_|$)|(?:^|_)key$|(?:^|_)auth|(?:^|_)pat$|(?:^|_)pass$|_pwd$"
)


class Watch(Protocol):
    """Who is told what the workers are waited for, and knows whether the wait shall end."""

    def waiting(self, text: str | None, *, line_is_due: bool = False) -> None:
        """Called about once a second after the first second of a wait, and with None when it is over.

        Args:
            line_is_due: whether a log that has no progress bar gets a line: after 10, 20, 40, … seconds.
        """
        ...

    def stopping(self) -> bool:
        """Return whether a signal has asked the run to end."""
        ...


class Unwatched:
    """Nobody is told, and nothing ends the wait."""

    def waiting(self, text: str | None, *, line_is_due: bool = False) -> None: ...

    def stopping(self) -> bool:
        return False


@dataclass
class _Calls:
    """The calls of one `run`.

    Attributes:
        waiting: numbers of calls that no worker has.
        suspects: numbers of calls, one of which has ended a worker. Each runs alone.
        results: by number.
        failed: whether one of them is a Failure.
    """

    function: str
    arguments: list[tuple[Any, ...]]
    waiting: deque[int]
    suspects: deque[int] = field(default_factory=deque)
    results: dict[int, object] = field(default_factory=dict)
    failed: bool = False
    _packed: tuple[int, bytes] = (-1, b"")

    def packed(self, number: int) -> bytes:
        """Return the pickled arguments of a call. Those of the last one asked for are kept."""
        if self._packed[0] != number:
            self._packed = number, pickle.dumps(self.arguments[number])
        return self._packed[1]

    def finish(self, number: int, value: object) -> None:
        self.results[number] = value
        self.failed = self.failed or isinstance(value, Failure)

    def weight(self, number: int) -> int:
        """Return the number of answers that a call is about."""
        return len(self.arguments[number][1]) if self.function == "score_group" else 1


class Workers:
    """Worker processes that run the functions of a user's module. They end with this object, and with the trainer.

    Args:
        module: the user's module, as this process has imported it.
        settings: the last argument of each function; None: there is none.
        function: the function that decides whether calls run at the same time, because it is `async`.
        what: name of the code for messages, such as "reward mine".
    Attributes:
        dropped: names of the environment variables that look like secrets and that the workers do not get.
    """

    def __init__(
        self, module: ModuleType, settings: object | None, function: str, what: str, config: WorkersConfig, watch: Watch | None = None
    ):
        is_file = module.__name__.startswith(user_files.FOLDER)
        name = str(Path(str(module.__file__)).absolute()) if is_file else module.__name__
        self._code = Code(name, None if settings is None else pickle.dumps(settings), is_async(module, function))
        self._module, self._what, self._config, self._watch = module, what, config, watch or Unwatched()
        self._environment, self.dropped = environment(config)
        self._workers: list[Worker] = []
        self._start_missing()

    def run(self, function: str, arguments: Sequence[tuple[Any, ...]], *, until_failure: bool = False) -> list[Any]:
        """Call a function once for each tuple of arguments. Return the results; a Failure in place of each that failed.

        Args:
            until_failure: return at the first failure, with None for calls that have not been made.
        Raises:
            UserError: the code cannot be used at all: it cannot be imported, or raises UserError itself.
            AbandonedError: a signal has asked the run to end, and calls have not ended in time.
        """
        calls = _Calls(function, list(arguments), deque(range(len(arguments))))
        self._start_missing()
        wait = _Wait(self._watch, f"waiting for {self._what}", self._config.timeout_seconds)
        try:
            while len(calls.results) < len(calls.arguments):
                self._hand_out(calls)
                self._collect(calls)
                if until_failure and calls.failed:
                    break
                wait.go_on(calls, imported=all(worker.process_id for worker in self._workers))
        finally:
            wait.end()
            self._keep([worker for worker in self._workers if not worker.running])
        return [calls.results.get(number) for number in range(len(calls.arguments))]

    def close(self) -> None:
        """End the workers, whatever they do."""
        self._keep([])

    def _keep(self, kept: "list[Worker]") -> None:
        for worker in self._workers:
            if worker not in kept:
                worker.end()
        self._workers = kept

    def _start_missing(self) -> None:
        while len(self._workers) < self._config.workers:
            self._workers.append(Worker(self._code, self._environment))

    def _hand_out(self, calls: _Calls) -> None:
        """Give calls to the workers that have room, first those that may run next to others."""
        for worker in list(self._workers):
            try:
                while self._has_room(worker, calls):
                    if calls.waiting:
                        self._send(worker, calls, calls.waiting.popleft())
                    elif calls.suspects and not worker.running:  # nothing is ahead either
                        worker.has_suspect = True
                        self._send(worker, calls, calls.suspects.popleft())
                    else:
                        break
            except OSError:
                self._bury(worker, calls)

    def _has_room(self, worker: "Worker", calls: _Calls) -> bool:
        if not worker.process_id or worker.has_suspect:
            return False
        if self._code.is_async:
            return len(worker.running) < TOGETHER
        return not worker.running or (len(calls.waiting) > 0 and worker.takes_ahead(len(calls.packed(calls.waiting[0]))))

    def _send(self, worker: "Worker", calls: _Calls, number: int) -> None:
        seconds = self._config.timeout_seconds * calls.weight(number)
        limit = seconds + GRACE_SECONDS if self._code.is_async else seconds
        arguments = calls.packed(number)
        try:
            worker.connection.send(Call(number, calls.function, seconds, arguments))
        except OSError:  # the worker has ended before, so this call has not ended it
            calls.waiting.appendleft(number)
            raise
        if worker.running and not self._code.is_async:
            worker.ahead.append(_Ahead(number, limit, seconds, len(arguments)))
        else:
            worker.start(number, limit, seconds)

    def _collect(self, calls: _Calls) -> None:
        """Wait a moment for results, then attend to each worker: one may have ended or be late."""
        now = time.monotonic()
        next_deadline = min((deadline for worker in self._workers for deadline, _ in worker.running.values()), default=float("inf"))
        wait([worker.connection for worker in self._workers], timeout=max(0.0, min(SECONDS_BETWEEN_LOOKS, next_deadline - now)))
        for worker in list(self._workers):
            self._attend(worker, calls)

    def _attend(self, worker: "Worker", calls: _Calls) -> None:
        try:
            while worker.connection.poll():
                self._receive(worker, unpacked(worker.connection.recv_bytes()), calls)
        except (EOFError, OSError, ValueError, LookupError):  # it has ended, or what it sends is no message
            self._bury(worker, calls)
        else:
            self._bury(worker, calls) if worker.has_ended() else self._end_if_late(worker, calls)

    def _receive(self, worker: "Worker", message: dict[str, Any], calls: _Calls) -> None:
        if "process" in message:
            worker.process_id = int(message["process"])
            return
        value = message["value"]
        if "number" not in message:  # the module cannot be imported there
            raise UserError(f"{self._what} {value.what}, in its own process", where=value.where, fix=self._fix_for(value.what) or value.fix)
        number = int(message["number"])
        worker.finish(number)
        if isinstance(value, UserError):
            raise value
        calls.finish(number, replace(value, fix=self._fix_for(value.what)) if isinstance(value, Failure) else value)

    def _end_if_late(self, worker: "Worker", calls: _Calls) -> None:
        """End a worker with a call that has exceeded its time limit.

        Of several calls at the same time, one may have kept all others from running, so each of them gets another try, alone.
        """
        exceeded = [seconds for deadline, seconds in worker.running.values() if deadline < time.monotonic()]
        if exceeded:
            worker.ask_for_stack()
            worker.end()
            worker.may_have_ended_before = False  # it is the running call that is late
            self._replace(worker, calls, late(exceeded[0], worker.place(self._module)))

    def _bury(self, worker: "Worker", calls: _Calls) -> None:
        """Replace a worker that has ended by itself."""
        code = worker.end(patience=2.0)
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        why = " (is the memory full?)" if code == -signal.SIGKILL else ""
        place = worker.place(self._module)
        if not worker.process_id:
            what = f"{self._what} cannot be imported in its own process: it ended {how}{why}"
            raise UserError(what, where=place or self._module.__file__, fix="correct the file")
        self._replace(worker, calls, Failure(f"ended its process {how}{why}", place))

    def _replace(self, worker: "Worker", calls: _Calls, failure: Failure) -> None:
        self._workers.remove(worker)
        self._start_missing()
        calls.waiting.extendleft(one.number for one in reversed(worker.ahead))
        if len(worker.running) == 1 and not worker.may_have_ended_before:
            calls.finish(next(iter(worker.running)), failure)
        else:
            calls.suspects.extend(worker.running)

    def _fix_for(self, what: str) -> str | None:
        """Return the fix of a failure whose text names a variable that the workers do not get."""
        named = [name for name in self.dropped if name in what]
        if not named:
            return None
        return f"the process has no variables that look like secrets; pass on what it needs: reward.secrets=[{','.join(named)}]"


def load_code(
    module: ModuleType, settings: object | None, function: str, what: str, config: WorkersConfig, watch: Watch | None = None
) -> InProcess | Workers:
    """Make the functions of a module ready to run: a user's own in worker processes, those of verl in this process.

    A module of verl whose `needs_limit(settings)` is true runs in worker processes too: it holds a program of the user's, such as a regex.

    The arguments are those of `Workers`.
    """
    needs_limit = user_files.is_own(module) or getattr(module, "needs_limit", lambda _: False)(settings)
    return Workers(module, settings, function, what, config, watch) if needs_limit else InProcess(module, settings)


class _Wait:
    """One wait for workers: what is said of it, and when a signal ends it."""

    def __init__(self, watch: Watch, what: str, limit: float):
        self._watch, self._what, self._limit = watch, what, limit
        self._since, self._said, self._stop_at = time.monotonic(), 0.0, float("inf")
        self._next_line = SECONDS_BEFORE_LINE

    def go_on(self, calls: _Calls, *, imported: bool) -> None:
        """Tell of the wait once a second. Raises AbandonedError: a signal has asked the run to end, and calls have not ended in time."""
        now = time.monotonic()
        if now - max(self._since, self._said) >= 1.0:
            self._said = now
            units = "prompts" if calls.function == "score_group" else "answers"
            state = f"{len(calls.results):,} of {len(calls.arguments):,} {units}" if imported else "it is imported in its own process"
            text = f"{self._what}: {state}, {now - self._since:.0f} s (reward.timeout_seconds={self._limit:g} for an answer)"
            line_is_due = now - self._since >= self._next_line
            self._next_line = 2 * max(self._next_line, now - self._since) if line_is_due else self._next_line
            self._watch.waiting(text, line_is_due=line_is_due)
        if self._stop_at == float("inf") and self._watch.stopping():
            self._stop_at = now + STOP_SECONDS
        if now > self._stop_at:
            raise AbandonedError(f"stopped {self._what} after {now - self._since:.0f} s")

    def end(self) -> None:
        if self._said:
            self._watch.waiting(None)


@dataclass(frozen=True)
class _Ahead:
    """A call that waits in the pipe to a worker.

    Attributes:
        limit: seconds that it may take once it runs.
        seconds: the time limit that is told if it takes longer.
        size: bytes of its arguments.
    """

    number: int
    limit: float
    seconds: float
    size: int


class Worker:
    """A worker process.

    Args:
        code: what it runs; its first message.
        variables: its environment.
        module: the module whose function `serve` is its inside.
    Attributes:
        process_id: of the process that runs the user's code; 0 until it has imported it.
        running: the deadline and the time limit of each of its running calls, by number.
        ahead: calls that it will run after the running one, in this order.
        has_suspect: whether its call may be the one that has ended another worker.
        may_have_ended_before: whether its running call came from `ahead`. The call before it may have ended the process, after its result.
    """

    def __init__(self, code: object, variables: dict[str, str], module: str = "verl.workers.serve"):
        self.process_id, self.has_suspect, self._stack = 0, False, ""
        self.running: dict[int, tuple[float, float]] = {}
        self.ahead: deque[_Ahead] = deque()
        self.may_have_ended_before, self._is_quick, self._started = False, False, 0.0
        ours, theirs = socket.socketpair()
        end, lifeline = os.pipe()
        self._trace = tempfile.TemporaryFile()  # noqa: SIM115 - closed when the process is ended
        descriptors = (theirs.fileno(), end, self._trace.fileno())
        command = [sys.executable, "-u", "-c", START.format(module=module), *map(str, descriptors), *sys.path]
        self.keeper = subprocess.Popen(  # noqa: S603
            command, stdin=subprocess.DEVNULL, env=variables, pass_fds=descriptors, start_new_session=True
        )
        theirs.close()
        os.close(end)
        # A worker that does not read its calls must not stop the trainer.
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 60, 0))
        self.connection = Connection(ours.detach())
        self._end = weakref.finalize(self, _end_process, self.keeper, self.connection, lifeline, self._trace, os.getpid())
        self.connection.send(code)

    def takes_ahead(self, size: int) -> bool:
        """Return whether a call of this size may be sent ahead. After a slow call none is: another worker may be free sooner."""
        return self._is_quick and len(self.ahead) < AHEAD and sum(one.size for one in self.ahead) + size <= AHEAD_BYTES

    def start(self, number: int, limit: float, seconds: float) -> None:
        """Note that a call runs now, for at most `limit` seconds."""
        self._started, self.may_have_ended_before = time.monotonic(), False
        self.running[number] = self._started + limit, seconds

    def finish(self, number: int) -> None:
        """Note that a call has ended; the next one that was sent ahead runs."""
        del self.running[number]
        self.has_suspect, self._is_quick = False, time.monotonic() - self._started < QUICK_SECONDS
        if self.ahead:
            following = self.ahead.popleft()
            self.start(following.number, following.limit, following.seconds)
            self.may_have_ended_before = True

    def has_ended(self) -> bool:
        """Return whether the process has ended. It is not waited for, so that its number is not another's yet."""
        return os.waitid(os.P_PID, self.keeper.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def end(self, *, patience: float = 0.0) -> int:
        """End the process and all that it has started. Return its exit code; a negative one is a signal.

        Args:
            patience: seconds in which it may end by itself.
        """
        deadline = time.monotonic() + patience
        while self._end.alive and time.monotonic() < deadline and not self.has_ended():
            time.sleep(0.01)
        if self._end.alive:
            self._stack = self._recorded()
        self._end()
        return self.keeper.wait()

    def ask_for_stack(self) -> None:
        """Have the running process record what it is doing."""
        os.kill(self.process_id, signal.SIGUSR1)
        deadline = time.monotonic() + 1.0
        while not self._recorded() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)  # the first lines are there, and the rest follows

    def place(self, module: ModuleType) -> str | None:
        """Return the last line of the user's own code that an ended worker has recorded, as `file.py:LINE`; None if it is unknown."""
        frames = re.findall(r'File "(.+?)", line (\d+) in', self._stack)  # the innermost first
        return next((f"{name}:{line}" for name, line in frames if user_files.is_own_file(name, module)), None)

    def _recorded(self) -> str:
        self._trace.seek(0)
        return self._trace.read().decode(errors="replace")


def _end_process(keeper: "subprocess.Popen[bytes]", connection: Connection, lifeline: int, trace: IO[bytes], owner: int) -> None:
    if os.getpid() != owner:  # a fork of the trainer
        return
    end_descendants(keeper.pid)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(keeper.pid, signal.SIGKILL)
    keeper.wait()
    connection.close()
    os.close(lifeline)
    trace.close()


def environment(config: WorkersConfig) -> tuple[dict[str, str], list[str]]:
    """Return the environment of the workers, and the names of the variables that look like secrets and are left out."""
    secret = {name for name, value in os.environ.items() if SECRET_NAME.search(name) or holds_secret(value)}
    dropped = sorted(secret - set(config.secrets))
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return {**kept, "CUDA_VISIBLE_DEVICES": _own_gpu() if config.use_gpu else ""}, dropped


def _own_gpu() -> str:
    """Return CUDA's name of the GPU that this process trains on."""
    visible, number = os.environ.get("CUDA_VISIBLE_DEVICES"), int(os.environ.get("LOCAL_RANK", "0"))
    return str(number) if visible is None else [*visible.split(","), *[""] * number][number]
