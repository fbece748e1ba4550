"""Loaded by each Python process that a fault test starts: makes a function of verl do something else, once, on one rank.

    FAULT=verl.engine.build:build:sleep    module, function or Class.method, action
    FAULT_CALL=3                           at its third call; the first is the default
    FAULT_RANK=1                           on this rank only; none: on all
    FAULT_FILE=/tmp/…                      this file is made when it happens

Actions: sleep (in Python), work (in a library, which runs no signal handlers), raise, user_error, kill, stop, exit; sleep=30 for so many
seconds, kill=2, stop=2 and exit=2 so many seconds later.
"""

import ctypes
import functools
import importlib.machinery
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def act(action: str) -> None:
    name, _, seconds = action.partition("=")
    open(os.environ["FAULT_FILE"], "w").close()
    if name == "sleep":
        time.sleep(float(seconds or 600))
    elif name == "work":
        _wait_in_a_library(float(seconds or 600))
    elif name == "raise":
        raise ValueError("a fault")
    elif name == "user_error":
        from verl.errors import UserError

        raise UserError("a fault of one rank", where="here")
    elif name == "exit":
        time.sleep(float(seconds or 0))
        os._exit(7)
    else:
        time.sleep(float(seconds or 0))
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[name])


def _wait_in_a_library(seconds: float) -> None:
    """Wait for a mutex that this thread has: no signal interrupts that, and it takes no core from other tests."""
    library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(128)
    until = (ctypes.c_int64 * 2)(int(time.time() + seconds), 0)
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_timedlock(mutex, until)


def wrapped(function: Callable[..., Any], action: str) -> Callable[..., Any]:
    calls = 0

    @functools.wraps(function)
    def call(*given: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == int(os.environ.get("FAULT_CALL", "1")):
            act(action)
        return function(*given, **named)

    return call


class Finder:
    """Changes the module as it is imported."""

    def __init__(self, module: str, name: str, action: str):
        self.module, self.name, self.action = module, name, action

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.module:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None
        loader: Any = spec.loader
        execute = loader.exec_module

        def execute_and_change(module: ModuleType) -> None:
            execute(module)
            *owners, last = self.name.split(".")
            owner = functools.reduce(getattr, owners, module)
            setattr(owner, last, wrapped(getattr(owner, last), self.action))

        loader.exec_module = execute_and_change
        return spec


def asked() -> list[str] | None:
    """Module, function and action of the fault of this process; None: it has none."""
    if "FAULT" not in os.environ or os.environ.get("FAULT_RANK", os.environ.get("RANK", "0")) != os.environ.get("RANK", "0"):
        return None
    return os.environ["FAULT"].split(":")


if __name__ == "sitecustomize" and (fault := asked()) is not None:  # not where tests/forked.py takes it
    sys.meta_path.insert(0, Finder(*fault))
