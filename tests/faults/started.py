"""Trainers in processes of their own, in which something goes wrong, and what is left of them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forked import Forked
from places import MARK, ROOT, TESTS
from rl_runs import write_folder
from runs import wait_for

HOOKS = TESTS / "faults" / "fault_hooks"
# What a logger and a reward take of time, from the environment.
SLOW_LOGGER = """
import os, time

class Slow:
    def log(self, step, metrics): time.sleep(float(os.environ.get("LOG_SECONDS", "0.2")))
    def finish(self): time.sleep(float(os.environ.get("FINISH_SECONDS", "0")))

def start(run): return Slow()
"""


def make_folder(folder: Path) -> Path:
    """Problems, pairs, a small model, a reward and a logger that takes its time."""
    write_folder(folder)
    (folder / "slow.py").write_text(SLOW_LOGGER)
    return folder


def words(folder: Path, output: Path, *more: str) -> list[str]:
    """Of fine-tuning, 40 steps that each take a moment."""
    return [
        f"data.train_files={folder / 'train.jsonl'}",
        f"data.cache_dir={folder / 'cache'}",
        "data.train_batch_size=6",
        "data.max_length=256",
        f"model.partial_pretrain={folder / 'model'}",
        f"trainer.default_local_dir={output}",
        "trainer.total_training_steps=40",
        "trainer.save_freq=-1",
        f"trainer.logger={folder / 'slow.py'}",
        "optim.lr=1e-3",
        *more,
    ]


@dataclass
class Started:
    """A process that was started, in a session of its own, with all that it starts."""

    process: subprocess.Popen[str] | Forked
    reached: Path
    mark: str
    since: float = 0.0
    took: float = 0.0

    def wait_until_reached(self, seconds: float = 120) -> None:
        """Until the fault has happened."""
        wait_for(lambda: self.reached.exists() or self.process.poll() is not None, seconds)
        assert self.process.poll() is None, self.process.communicate()

    def send(self, number: int) -> None:
        self.since = time.monotonic()
        self.process.send_signal(number)

    def end(self, seconds: float = 60) -> tuple[int, str]:
        """Wait for the end. Return the exit code, and what was printed."""
        out, err = self.process.communicate(timeout=seconds)
        self.took = time.monotonic() - self.since
        return self.process.returncode, out + err


@contextmanager
def started(
    command: list[str], folder: Path, *, fault: str | None = None, env: Mapping[str, object] | None = None, forks: bool = False
) -> Iterator[Started]:
    """Start a command; whatever is left of it at the end is killed.

    Args:
        command: words after `python`.
        folder: where it works.
        fault: see fault_hooks/sitecustomize.py.
        forks: whether it is forked from a process that has imported all, see tests/forked.py; otherwise it is a new interpreter.
    """
    folder.mkdir(parents=True, exist_ok=True)
    reached = folder / "reached"
    reached.unlink(missing_ok=True)
    mark = f"{folder}/{time.monotonic_ns()}"
    variables = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, HOOKS))),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "FAULT_FILE": str(reached),
        MARK: mark,
        **({"FAULT": fault} if fault else {}),
        **{name: str(value) for name, value in (env or {}).items()},
    }
    process: subprocess.Popen[str] | Forked
    if forks:
        process = Forked(command, folder, variables)
    else:
        options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
        process = subprocess.Popen([sys.executable, *command], cwd=folder, env=variables, **options)
    found = Started(process, reached, mark)
    try:
        yield found
    finally:
        for one in processes(mark):
            with suppress(ProcessLookupError):
                os.kill(one, signal.SIGKILL)
        process.wait()
        for pipe in filter(None, (process.stdout, process.stderr)):
            pipe.close()


def processes(mark: str) -> list[int]:
    """Numbers of the running processes that have a started one's environment."""
    found = []
    for status in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            alive = (status.parent / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
            if alive and f"{MARK}={mark}".encode() in status.read_bytes():
                found.append(int(status.parent.name))
    return found


def orphans(found: Started, seconds: float = 5.0) -> list[int]:
    """What is still running `seconds` after the end."""
    deadline = time.monotonic() + seconds
    while (left := processes(found.mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left
