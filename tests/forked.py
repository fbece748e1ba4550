"""Commands of verl as `python -m` runs them, in processes forked from one that has imported everything.

A start takes 0.1 s of CPU instead of seven. What comes after the imports is that of a new interpreter: a process and a session of its own,
its own environment, folder, output and signal handlers, and a launcher's ranks are its children. Only what a start or the end of an
interpreter does is not tried; tests of these start one. On a machine with a GPU, each is a new interpreter.
"""

import atexit
import ctypes
import functools
import importlib
import importlib.util
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

from places import FORKS, HAS_GPU, MARK, ROOM

HOOKS = Path(__file__).parent / "faults" / "fault_hooks"
_changed: list[tuple[Any, str, Any]] = []  # what a fault has replaced: owner, name and what was there
_room = 0  # where this process's environment has room for a mark


class Forked:
    """What `subprocess.Popen` offers of a process, for one that is forked. Its output goes to files."""

    def __init__(self, command: Sequence[str], folder: Path, variables: Mapping[str, str]):
        """Start `command`: ["-m", module, words …] or [script, words …], without Python's name."""
        self.stdout = self.stderr = None
        self._logs = [folder / f".{name}-{time.monotonic_ns()}" for name in ("out", "err")]
        self._process = FORKS.Process(target=_run, args=(list(command), str(folder), dict(variables), list(map(str, self._logs))))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("a forked process", timeout or 0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        out, err = (log.read_text(errors="replace") if log.exists() else "" for log in self._logs)
        return out, err

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run_forked(
    *words: object, folder: Path, processes: int = 0, env: Mapping[str, str] | None = None, timeout: float = 240
) -> subprocess.CompletedProcess[str]:
    """Run a command, or torchrun with so many processes of it, to its end in a forked process, as `runs.command` does in a new interpreter.

    Args:
        folder: where it works.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nnodes=1", f"--nproc_per_node={processes}"] if processes else []
    command = [*launcher, *map(str, words)]
    own = {MARK: "", "WANDB_MODE": "", "WANDB_API_KEY": "", "OMP_NUM_THREADS": "1"}
    process = Forked(command, folder, {**os.environ, **own, **(env or {})})
    try:
        out, err = process.communicate(timeout)
    finally:
        process.kill()
    assert process.returncode is not None
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def _run(command: list[str], folder: str, variables: dict[str, str], logs: list[str]) -> None:
    os.setsid()
    for number, log in enumerate(logs, 1):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), number)
    os.chdir(folder)
    if HAS_GPU:  # a GPU's driver does not outlast a fork
        os.execve(sys.executable, [sys.executable, *command], variables)
    _take(variables)
    _execute(command)


def _take(variables: Mapping[str, str]) -> None:
    """Make these the environment. The mark and the rank are also written where /proc shows them to other processes."""
    global _room
    if not _room:
        getenv = ctypes.CDLL(None).getenv
        getenv.restype = ctypes.c_void_p
        _room = getenv(MARK.encode())
    rank = [f"RANK={variables['RANK']}"] if "RANK" in variables else []
    shown = "\0".join([variables.get(MARK, "").strip(), *rank]).encode() + b"\0"
    assert len(shown) < ROOM
    ctypes.memmove(_room, shown.ljust(ROOM, b"\0"), ROOM)
    os.environ.clear()
    os.environ.update(variables)


def _execute(command: list[str]) -> None:
    """Run a command in this process as a new interpreter would."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler as torchrun

    from verl import launch, parent, signals

    launch.subprocess = SimpleNamespace(Popen=Rank)  # type: ignore[assignment]  # a launcher's processes are forked from it
    torchrun.Popen = Rank  # type: ignore[misc, assignment]
    _place_fault()
    sys.argv = command[1:] if command[0] == "-m" else command
    sys.orig_argv = [sys.executable, *command]
    if command[0] != "-m":
        sys.path.insert(0, os.path.dirname(os.path.abspath(command[0])))
        runpy.run_path(command[0], run_name="__main__")
        return
    module = command[1]
    if module.startswith("verl.trainer."):  # what `verl/__init__.py` does for such a command
        signals.own_process()
        parent.end_with_launcher()
        sys.modules.pop(module, None)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _place_fault() -> None:
    """Do what fault_hooks/sitecustomize.py does while modules are imported, where they have been.

    The fault of a launcher, from which this process is forked, is taken away: it may be meant for another rank.
    """
    while _changed:
        setattr(*_changed.pop())
    spec = importlib.util.spec_from_file_location("fault_hooks", HOOKS / "sitecustomize.py")
    assert spec is not None and spec.loader is not None
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    if (fault := hooks.asked()) is None:
        return
    place, function, action = fault
    *owners, last = function.split(".")
    owner: Any = functools.reduce(getattr, owners, importlib.import_module(place))
    before = getattr(owner, last)
    after = hooks.wrapped(before, action)
    modules = [found for key, found in sys.modules.items() if key.partition(".")[0] == "verl"]  # may have imported it by its name
    for each, name in [(owner, last), *((module, key) for module in modules for key, value in vars(module).items() if value is before)]:
        _changed.append((each, name, before))
        setattr(each, name, after)


class Rank:
    """What a launcher needs of `subprocess.Popen`, for a rank that is forked from it."""

    def __init__(self, args: Sequence[str], *, env: Mapping[str, str], start_new_session: bool, pass_fds: Sequence[int] = (), **logs: None):
        assert start_new_session and not any(logs.values())
        command = [word for word in args[1:3] if word not in ("-u", "-P")] + list(args[3:])
        self.returncode: int | None = None
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _become_rank(command, env, pass_fds)

    def poll(self) -> int | None:
        if self.returncode is None:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            if found:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a rank", timeout)
            time.sleep(0.02)
        return self.returncode or 0

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _become_rank(command: list[str], variables: Mapping[str, str], kept: Sequence[int]) -> NoReturn:
    """Leave all that belongs to the launcher, and run the command."""
    code = 1
    try:
        os.setsid()
        _close_all_but({0, 1, 2, *kept})
        _forget_signals()
        _take(variables)
        _execute(command)
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _close_all_but(kept: set[int]) -> None:
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in kept:
            with suppress(OSError):  # the directory that was listed
                os.close(int(name))


def _forget_signals() -> None:
    """The launcher has handlers, and a thread beside them that is not forked."""
    from verl import signals

    signal.set_wakeup_fd(-1)
    for number in signals.STOP_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    signals._previous.clear()
    signals.listeners.clear()
    vars(signals._state).clear()
