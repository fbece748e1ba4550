"""The signals that stop a run, in every phase of it.

    early   before a run begins, such as while libraries are imported: the process ends at once
    raised  what may be left at any time, such as tokenizing or loading: the handler raises Stopped
    held    steps and saving: the signal is noted, and `received` tells of it after the step
    done    the run has ended, and the process is about to: there is nothing left to stop

A second signal ends the process of a command at once. So does a first one if the process is still in a phase that may be left after
LEAVE_SECONDS, for instance because it waits in a library. In other programs, the second signal does what it did before the run.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, Literal, NoReturn

from verl.errors import AbandonedError, Stopped

# SIGTERM from schedulers, SIGINT from Ctrl-C, SIGHUP from a lost connection, SIGUSR1 from SLURM ahead of a time limit (`sbatch --signal`).
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP") if hasattr(signal, name)]
LEAVE_SECONDS = 7.0  # for a phase that may be left to end by itself
SECOND_SECONDS = 0.5  # a signal that follows sooner is the same request: launchers pass on what processes also get themselves
AGAIN_SECONDS = 1.0  # for the handler to act on a second signal; if it cannot, because the process is in a library, the watcher does

Mode = Literal["early", "raised", "held", "done"]


class _State:
    """What this process knows of signals.

    Attributes:
        received: the first signal.
        is_command: whether the process belongs to a command of verl, which may end it.
        phase, step: what the run is doing; the number of the step counts from 1.
        moves: a count that grows whenever the run gets on, see `verl.peers`.
        is_limited: whether the run should get on all the time in this phase, because it is no work of one rank alone.
    """

    received: signal.Signals | None = None
    since = 0.0
    mode: Mode = "early"
    is_command = False
    process = 0
    phase, step, moves, is_limited = "starting", 0, 0, False
    note = ""  # what a signal in a held phase leads to


_state = _State()
_previous: dict[signal.Signals, Any] = {}
listeners: list[Callable[[], None]] = []  # called when a phase without steps begins, so that other ranks know of it


def own_process() -> None:
    """Handle signals from now on until this process ends, which may end it: it runs a command."""
    if not _state.is_command:
        _state.is_command = True
        _install()


def _install() -> None:
    _state.process = os.getpid()
    for number in STOP_SIGNALS:
        handler = signal.getsignal(number)
        if handler is None or (handler == signal.SIG_IGN and number != signal.SIGINT):  # such as SIGHUP under nohup
            continue
        _previous[number] = handler
        signal.signal(number, _on_signal)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    if before != -1:  # somebody else's, such as an event loop's
        signal.set_wakeup_fd(before)
    threading.Thread(target=_watch, args=(reading,), name="signals", daemon=True).start()


@contextmanager
def handled() -> Iterator[None]:
    """Handle signals in this context, which may be left at any time unless it says `held`. Only the main thread of a program can.

    Raises:
        Stopped: a signal came, in a phase that may be left.
    """
    if threading.current_thread() is not threading.main_thread():  # Python allows handlers only there
        yield
        return
    installs = not _previous
    if installs:
        _install()
    if not _state.is_command:
        _state.received = None
    _state.phase, _state.step, _state.is_limited = "starting", 0, False
    try:
        with _in("raised"):
            yield
    finally:
        _state.mode = "done"
        if installs:
            _restore()


def _restore() -> None:
    writing = signal.set_wakeup_fd(-1)
    if writing != -1:
        os.close(writing)  # the watcher ends
    for number, handler in _previous.items():
        signal.signal(number, handler)
    _previous.clear()
    _state.received, _state.mode = None, "early"


@contextmanager
def _in(mode: Mode) -> Iterator[None]:
    before, _state.mode = _state.mode, mode
    try:
        if mode == "raised" and _state.received is not None:
            _stop(_state.received)
        yield
    finally:
        _state.mode = before


@contextmanager
def held(note: str = "stopping after this step") -> Iterator[None]:
    """In this context, a signal is only noted.

    Args:
        note: what it leads to, for the line that is printed at once.
    """
    before, _state.note = _state.note, note
    try:
        with _in("held"):
            yield
    finally:
        _state.note = before


@contextmanager
def at_once() -> Iterator[None]:
    """In this context, which is part of a held one, a signal raises Stopped: at its start if one came before."""
    with _in("raised" if _previous and threading.current_thread() is threading.main_thread() else _state.mode):
        yield


@contextmanager
def abandoning() -> Iterator[None]:
    """In this context, which is part of a held one, a signal raises AbandonedError, which `dist.together` raises on all ranks."""
    try:
        with at_once():
            yield
    except Stopped:
        raise AbandonedError("given up, because the run stops") from None


def received() -> signal.Signals | None:
    """Return the signal that asked this process to stop; None if none did."""
    return _state.received


def request(number: int) -> None:
    """Stop this process as if it got the signal itself: another rank has got it. Any thread may call it."""
    if _previous and _state.received is None:
        os.kill(os.getpid(), number)


def enter(phase: str, step: int = 0, *, limited: bool = False) -> None:
    """Say what the run does from now on.

    Args:
        phase: such as "loading the model".
        step: number of the optimizer step, from 1; 0: none.
        limited: see `_State.is_limited`.
    """
    _state.phase, _state.step, _state.is_limited = phase, step, limited
    _state.moves += 1
    if step == 0:
        for tell in listeners:
            tell()


def moved() -> None:
    """Note that the run gets on."""
    _state.moves += 1


def where() -> str:
    """Return what the run is doing, such as `training, step 12`."""
    return f"{_state.phase}, step {_state.step}" if _state.step else _state.phase


def place() -> tuple[str, int, int, bool]:
    """Return the phase, the step, the count of moves, and whether the phase is limited."""
    return _state.phase, _state.step, _state.moves, _state.is_limited


def _on_signal(number: int, frame: FrameType | None) -> None:
    if os.getpid() != _state.process:  # a fork: the signal has its ordinary meaning
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        return
    if _state.received is None:
        _first(signal.Signals(number))
    elif time.monotonic() - _state.since > SECOND_SECONDS:
        _second(signal.Signals(number), frame)


def _first(number: signal.Signals) -> None:
    _state.received, _state.since = number, time.monotonic()
    if _state.mode == "early" and _state.is_command:
        _end(number, f"stopped by {number.name} while starting; nothing was saved; the same command starts again")
    if _state.mode == "raised":
        _stop(number)
    if _state.mode == "held":
        _say(f"{number.name}: {_state.note}; send it again to stop at once")


def _stop(number: signal.Signals) -> NoReturn:
    raise Stopped(number, None, phase=where())


def _second(number: signal.Signals, frame: FrameType | None) -> None:
    if _state.is_command:
        _end(number, f"stopped at once by a second signal, {number.name}; nothing more was saved, and checkpoints are complete")
    handler = _previous.get(number, signal.SIG_DFL)
    signal.signal(number, handler)
    handler(number, frame) if callable(handler) else os.kill(os.getpid(), number)


def _end(number: signal.Signals, line: str) -> NoReturn:
    """End the process with 128 + the signal's number. The processes that it has started end with it (`verl.parent`, `verl.workers`)."""
    _say(line)
    os._exit(128 + number)


def _say(line: str) -> None:
    """Print a line on rank 0, also from a signal handler, in which Python's files must not be used."""
    if os.environ.get("RANK", "0") == "0":
        cursor = "\x1b[?25h" if sys.__stderr__ is not None and sys.__stderr__.isatty() else ""  # a progress bar hides it
        with suppress(OSError):
            os.write(2, f"{cursor}\n{line}\n".encode())


def _watch(reading: int) -> None:
    """Act on signals for a main thread that is in a library and runs no handler. The pipe has the number of each signal that comes."""
    first: float | None = None
    while numbers := os.read(reading, 64):
        for number in numbers:
            if number not in STOP_SIGNALS or not _state.is_command:
                continue
            if first is None:
                first = time.monotonic()
                _after(LEAVE_SECONDS, signal.Signals(number), again=False)
            elif time.monotonic() - first > SECOND_SECONDS:
                _after(AGAIN_SECONDS, signal.Signals(number), again=True)
    os.close(reading)


def _after(seconds: float, number: signal.Signals, *, again: bool) -> None:
    def end() -> None:
        if again:
            _end(number, f"stopped at once by a second signal, {number.name}; nothing more was saved, and checkpoints are complete")
        elif _state.mode != "held" and os.getpid() == _state.process:
            _end(number, f"stopped by {number.name} while {where()}, which did not end within {seconds:g} s; nothing more was saved")

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
