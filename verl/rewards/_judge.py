"""The processes that compare expressions. They are ended when one comparison takes too long, and the next one is not delayed by it.

A server process imports SymPy once and forks the workers, so that a new worker takes milliseconds. The server ends with the process that
started it, the workers with the server.
"""

import atexit
import contextlib
import ctypes
import gc
import json
import logging
import os
import select
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass

from verl import safe_path
from verl.errors import UserError

SECONDS = 0.9  # of processor time for one comparison
WAITING_SECONDS = 5.0  # of wall time for one comparison, on a busy machine
MEMORY_BYTES = 4 * 2**30  # address space of a worker, including SymPy
MOST_WORKERS = 8
REMEMBERED = 50_000  # comparisons
PARENT_CHECK_SECONDS = 5.0
PR_SET_PDEATHSIG = 1

Pair = tuple[str, str]  # the right answer and the one that is graded


class Judge:
    """Compares answers in other processes, several at a time, and remembers the results. It may be used in several threads."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[str] | None = None
        self._owner = 0
        self._one_batch_at_a_time = threading.Lock()
        self._known = OrderedDict[Pair, bool]()

    def equal(self, pairs: Sequence[Pair]) -> list[bool]:
        """Return whether the answers of each pair are equal; False for a comparison that takes too long or too much memory.

        Raises:
            UserError: the processes cannot be started.
        """
        with self._one_batch_at_a_time:
            unknown = list(dict.fromkeys(pair for pair in pairs if pair not in self._known))
            if unknown:
                self._known.update(zip(unknown, self._asked(unknown), strict=True))
            found = [self._known[pair] for pair in pairs]
            while len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
            return found

    def _asked(self, pairs: list[Pair]) -> list[bool]:
        for _ in range(2):  # the server may have been ended from outside since the last batch
            server = self._running()
            reply = _ask(server, json.dumps(pairs))
            if reply is not None:
                return [bool(equal) for equal in json.loads(reply)]
            self._end(server)
        raise UserError("the process that compares answers ended", where="reward math", fix=FIX)

    def _running(self) -> "subprocess.Popen[str]":
        if self._server is None or self._owner != os.getpid() or self._server.poll() is not None:
            self._server, self._owner = self._started(), os.getpid()
        return self._server

    def _started(self) -> "subprocess.Popen[str]":
        command = safe_path.command(__name__, [str(_workers())])
        variables = {**os.environ, **safe_path.variables()}
        server = subprocess.Popen(  # noqa: S603
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True, env=variables
        )
        if _ask(server, json.dumps([["x+1", "1+x"]])) != "[true]":
            self._end(server)
            raise UserError("the process that compares answers does not start", where="reward math", fix=FIX)
        atexit.register(self._end, server)
        return server

    def _end(self, server: "subprocess.Popen[str]") -> None:
        if self._owner in (0, os.getpid()):
            with contextlib.suppress(BrokenPipeError), server:  # closes its pipes and waits for it
                pass


FIX = f"run `{sys.executable} -m {__name__} 1` to see why; it needs math-verify and its dependencies"


def _workers() -> int:
    """Return the number of workers: the processors that this process may use, shared with the other ranks of the machine."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MOST_WORKERS, processors // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))))


def _ask(server: "subprocess.Popen[str]", question: str) -> str | None:
    """Return the reply of the server; None if it has ended."""
    assert server.stdin is not None and server.stdout is not None
    try:
        server.stdin.write(question + "\n")
        server.stdin.flush()
        return server.stdout.readline().rstrip("\n") or None
    except BrokenPipeError:
        return None


@dataclass
class _Worker:
    """A worker process. `index` is the number of the pair that it compares."""

    process: int
    connection: socket.socket
    index: int = -1
    deadline: float = 0.0


class _Workers:
    def __init__(self, count: int):
        self._selector = selectors.DefaultSelector()
        self._idle = [self._forked() for _ in range(count)]
        self._busy = list[_Worker]()

    def equal(self, pairs: Sequence[Sequence[str]]) -> list[bool]:
        """Return whether the answers of each pair are equal."""
        results, waiting = [False] * len(pairs), deque(range(len(pairs)))
        while waiting or self._busy:
            while waiting and self._idle:
                self._give(self._idle.pop(), waiting.popleft(), pairs)
            self._collect(results)
        return results

    def _give(self, worker: _Worker, index: int, pairs: Sequence[Sequence[str]]) -> None:
        worker.index, worker.deadline = index, time.monotonic() + WAITING_SECONDS
        self._busy.append(worker)
        worker.connection.sendall((json.dumps(pairs[index]) + "\n").encode())

    def _collect(self, results: list[bool]) -> None:
        """Wait for a result, or for a worker to end or to be too late."""
        now = time.monotonic()
        first = min(worker.deadline for worker in self._busy)
        ready = [key.data for key, _ in self._selector.select(max(first - now, 0))]
        for worker in [one for one in self._busy if one in ready or one.deadline <= time.monotonic()]:
            reply = worker.connection.recv(1) if worker in ready else b""
            results[worker.index] = reply == b"1"
            self._busy.remove(worker)
            self._idle.append(worker if reply else self._replaced(worker))

    def _replaced(self, worker: _Worker) -> _Worker:
        self._selector.unregister(worker.connection)
        worker.connection.close()
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker.process, signal.SIGKILL)
        os.waitpid(worker.process, 0)
        return self._forked()

    def _forked(self) -> _Worker:
        here, there = socket.socketpair()
        server = os.getpid()
        process = os.fork()
        if process == 0:
            here.close()
            _work(there, server)
        there.close()
        worker = _Worker(process, here)
        self._selector.register(here, selectors.EVENT_READ, worker)
        return worker


def _work(connection: socket.socket, server: int) -> None:
    """Run a worker: compare the pairs that the connection brings, until it is closed."""
    from verl.rewards._equality import equal
    from verl.rewards._expression import same

    try:
        _end_with(server)
        _limit_memory()
        for line in connection.makefile("r", encoding="utf-8"):
            expected, answer = json.loads(line)
            signal.setitimer(signal.ITIMER_PROF, SECONDS)  # SIGPROF ends the process, even inside one long multiplication
            try:
                result = equal(expected, answer, same)
            except (MemoryError, RecursionError):
                result = False
            signal.setitimer(signal.ITIMER_PROF, 0)
            connection.sendall(b"1" if result else b"0")
    finally:
        os._exit(0)


def _end_with(server: int) -> None:
    """Let this process end when the server ends, however that happens (on Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != server:
            os._exit(0)


def _limit_memory() -> None:
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform == "linux" and (most == resource.RLIM_INFINITY or most > MEMORY_BYTES):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, most))


WARM_UP = (
    r"\frac{1}{2}+\sqrt{3}",
    r"x^2+2x+1",
    r"2\pi",
    r"\begin{pmatrix}1&2\\3&4\end{pmatrix}",
    r"\sin x",
    r"\log_2 8",
    r"2x+y=3",
    r"a_n = \sum_{k=0}^{n} a_k b_{n-k}",
)


def _serve(count: int) -> None:
    """Run the server: for each input line, a list of pairs, print a list of results, until the input or the parent ends."""
    from verl.rewards._expression import same

    logging.disable()
    for latex in WARM_UP:  # what the parser learns is shared by all workers
        same(latex, f"{latex}+1")
    gc.collect()
    gc.freeze()
    parent, workers = os.getppid(), _Workers(count)
    while os.getppid() == parent:
        if select.select([sys.stdin], [], [], PARENT_CHECK_SECONDS)[0]:
            line = sys.stdin.readline()
            if not line:
                break
            print(json.dumps(workers.equal(json.loads(line))), flush=True)


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
