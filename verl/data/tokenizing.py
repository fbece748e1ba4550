"""Tokenizing in several processes, which end with this one, even if it is killed. Signals are handled by this process alone."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from types import ModuleType
from typing import TypeVar

from verl import safe_path
from verl.errors import UserError
from verl.parent import end_with
from verl.signals import STOP_SIGNALS

PARENT = "VERL_TOKENIZES_FOR"  # variable of a tokenizing process: the process id of its parent
if PARENT in os.environ and "--multiprocessing-fork" in sys.orig_argv:  # it has yet to import most of what it needs, which takes seconds
    end_with(int(os.environ[PARENT]), None)

Chunk = TypeVar("Chunk")
Done = TypeVar("Done")


def in_processes(prepare: Callable[[], Callable[[Chunk], Done]], chunks: Iterator[Chunk], workers: int) -> Iterator[Done]:
    """Yield the results of the chunks, in order. Processes are spawned, not forked: this process may have threads and a GPU context.

    Args:
        prepare: called once in each process; returns the function that is applied to each chunk.
    Raises:
        UserError: a process died.
    """
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start, (prepare,))  # type: ignore[arg-type]
    waiting: deque[Future[Done]] = deque()
    try:
        for chunk in chunks:
            with _callers_script_hidden(), _beginning(), safe_path.guarded():
                waiting.append(pool.submit(_apply, chunk))  # type: ignore[arg-type]
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        time.sleep(0.2)  # if a signal has ended the process, this one has got it too, and its handler runs
        fix = "use fewer processes, because each needs its own memory"
        raise UserError("a tokenizing process died", where="data.num_workers", fix=fix) from error
    except BaseException:  # a signal, for instance: nobody needs what is being tokenized
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _callers_script_hidden() -> Iterator[None]:
    """While this lasts, new interpreters do not run the program's script first, as multiprocessing has them do: it may call a trainer."""
    script = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script


@contextmanager
def _beginning() -> Iterator[None]:
    """In this context, new processes know their parent, and begin with the signals blocked that stop a run: Ctrl-C reaches them, too."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    os.environ[PARENT] = str(os.getpid())
    try:
        yield
    finally:
        del os.environ[PARENT]
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_function: Callable[[object], object]


def _start(prepare: Callable[[], Callable[[object], object]]) -> None:
    global _function
    for number in STOP_SIGNALS:
        if number != signal.SIGTERM:  # by which the pool ends its processes
            signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()  # where the kernel does not end it
    _function = prepare()


def _end_with(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def _apply(chunk: object) -> object:
    return _function(chunk)
