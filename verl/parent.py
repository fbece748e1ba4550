"""A process that ends with the one that has started it, even if that is killed."""

import ctypes
import os
import signal
import sys
import threading

PR_SET_PDEATHSIG = 1
LAUNCHER, LIFELINE = (
    "VERL_LAUNCHER",
    "VERL_LIFELINE",
)  # variables of a trainer: its launcher's process id, and a pipe that it never writes to


def end_with_launcher() -> None:
    """End this trainer with its launcher: `verl … --gpus N`, or torchrun."""
    launcher = os.environ.get(LAUNCHER)
    if launcher is not None:
        end_with(int(launcher), int(os.environ[LIFELINE]))
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        end_with(os.getppid(), None)


def end_with(parent: int, lifeline: int | None) -> None:
    """End this process with its parent.

    On Linux, the kernel ends it when the thread that has started it ends. Elsewhere, a thread waits for the end of the lifeline.

    Args:
        parent: process id of the parent. If it has ended before, this process ends at once.
        lifeline: file descriptor of a pipe whose other end only the parent holds; None: there is none.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it has ended before the call
            os._exit(1)
    elif lifeline is not None:
        threading.Thread(target=_wait_for_end, args=(lifeline,), daemon=True).start()


def _wait_for_end(lifeline: int) -> None:
    while os.read(lifeline, 1):
        pass
    os._exit(1)
