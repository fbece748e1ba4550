"""Starts a trainer in several processes on this machine: `verl sft --gpus N`. It passes signals on, and ends with the processes' exit code.

The launcher holds the store in which the processes meet, so that it answers even if one of them dies.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from types import FrameType

import torch.distributed as dist

from verl import safe_path
from verl.cores import usable
from verl.deadline import STARTED, started
from verl.errors import RANK_EXIT_CODE, SAVED_EXIT_CODE
from verl.parent import LAUNCHER, LIFELINE
from verl.signals import STOP_SIGNALS

LOOK_SECONDS = 0.05
PEERS = "/verl/attempt_0/peers 1"  # where the store has what `verl.peers` writes
END_SECONDS = 12.0  # after one process has failed, for the others to end by themselves


class Launcher:
    """The processes of a trainer.

    Args:
        module: the trainer.
        words: its command-line arguments.
        processes: how many to start.
    """

    def __init__(self, module: str, words: Sequence[str], processes: int):
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))
        self._reported: set[int] = set()
        reading, self._lifeline = os.pipe()  # its end is the end of this process
        variables = {
            **os.environ,
            **safe_path.variables(),
            "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is here
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, usable() // processes))),
            LAUNCHER: str(os.getpid()),
            LIFELINE: str(reading),
            STARTED: str(started()),
        }
        self._processes = [
            subprocess.Popen(  # noqa: S603
                safe_path.command(module, words),
                env={**variables, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                pass_fds=[reading],
                start_new_session=True,  # Ctrl-C reaches the launcher alone, which passes it on once
            )
            for rank in range(processes)
        ]
        os.close(reading)

    def run(self) -> int:
        """Wait for the processes, and return their exit code."""
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN or number == signal.SIGINT:
                signal.signal(number, self._pass_on)
        failed_at = float("inf")
        while any(process.poll() is None for process in self._processes):
            time.sleep(LOOK_SECONDS)
            self._report_ended()
            if failed_at == float("inf") and (any(process.returncode for process in self._processes) or self._has_failed()):
                failed_at = time.monotonic()
            if time.monotonic() > failed_at + END_SECONDS:
                self._kill()
        self._report_ended()
        return code_of([process.returncode for process in self._processes])

    def _has_failed(self) -> bool:
        """Return whether a process has told that it fails. Its GPU may keep it from ending."""
        keys = [f"{PEERS}/left {rank}" for rank in range(len(self._processes))]
        return any(json.loads(self._store.get(key))["code"] for key in keys if self._store.check([key]))

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        for process in self._processes:
            process.send_signal(number)

    def _kill(self) -> None:
        for rank, process in enumerate(self._processes):
            if process.poll() is None:
                self._reported.add(rank)
                process.kill()

    def _report_ended(self) -> None:
        """Tell the other processes of one that has ended without a word, or the user if there are no others."""
        for rank, process in enumerate(self._processes):
            code = process.poll()
            if not code or rank in self._reported:
                continue
            self._reported.add(rank)
            key = f"{PEERS}/left {rank}"
            what = f"ended with exit code {code}" if code > 0 else f"was killed by {signal.Signals(-code).name}"
            if self._store.check([key]):  # it has told the others itself
                if code < 0 and json.loads(self._store.get(key))["code"] in (0, SAVED_EXIT_CODE):
                    print(f"error: rank {rank} ({socket.gethostname()}) {what} after it was done", file=sys.stderr, flush=True)
                continue
            left = {"code": RANK_EXIT_CODE, "what": what + (" (is the memory full?)" if code == -signal.SIGKILL else "")}
            self._store.set(key, json.dumps(left))
            if code < 0 and all(other.poll() is not None for other in self._processes):
                print(f"error: rank {rank} ({socket.gethostname()}) {what}", file=sys.stderr, flush=True)


def code_of(codes: Sequence[int]) -> int:
    """Return the exit code of all processes: that of a failure, if one has failed, else SAVED_EXIT_CODE or that of a signal.

    Args:
        codes: return codes; a negative one is a signal that has killed the process.
    """
    failed = [code for code in codes if 0 < code < SAVED_EXIT_CODE]
    if failed and set(failed) != {RANK_EXIT_CODE}:
        one_failed = any(code == RANK_EXIT_CODE or code < 0 for code in codes)
        return RANK_EXIT_CODE if one_failed else failed[0]
    if failed or (len(codes) > 1 and any(code < 0 for code in codes)):
        return RANK_EXIT_CODE
    stopped = [code if code >= 0 else 128 - code for code in codes if code]
    return SAVED_EXIT_CODE if SAVED_EXIT_CODE in stopped else next(iter(stopped), 0)
