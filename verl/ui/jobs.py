"""What the page has started: one call of the Python API at a time, in a process of its own, and what came of the last ones."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from verl.errors import UserError

LAST_LINES = 15  # of what a process printed that ended without an answer
Answer = dict[str, Any]


class Worker:
    """A process of `verl.ui.work`."""

    def __init__(self) -> None:
        self._printed: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the object)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "verl.ui.work"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._printed,
            text=True,
            encoding="utf-8",
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,  # Ctrl-C in the terminal is for the page, which then asks the run to stop
        )

    def ask(self, call: str, arguments: dict[str, Any]) -> Answer:
        """Return the answer to a call, as `verl.ui.work.answer_of`. A process that ends without one is an error, or stopped by a signal."""
        assert self._process.stdin is not None and self._process.stdout is not None
        line = ""
        try:
            self._process.stdin.write(json.dumps({"call": call, "arguments": arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except (BrokenPipeError, ValueError):  # it has ended, or was closed meanwhile
            pass
        if line:
            answer: Answer = json.loads(line)
            return answer
        code = self._process.wait()
        if code == -signal.SIGTERM:
            return {"stopped": None}
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        return {"error": {"what": f"the process of the call ended {how}", "where": call, "fix": self._last_lines()}}

    def stop(self) -> None:
        """Ask the call to stop: a run saves a checkpoint after its step."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def close(self) -> None:
        """Wait until the process has answered and ended."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._printed.close()

    def wait(self) -> None:
        """Wait until the process has ended."""
        self._process.wait()

    def _last_lines(self) -> str:
        self._printed.seek(max(0, self._printed.seek(0, os.SEEK_END) - 20_000))
        return "\n".join(self._printed.read().decode(errors="replace").splitlines()[-LAST_LINES:])


@dataclass
class Job:
    """A call that runs or has run.

    Attributes:
        kind: name of the call.
        directory: that of the run; empty if the call has none.
        log_start: size of the run's train.log when the call began.
        answer: None while it runs.
        is_stopping: whether it was asked to stop.
    """

    kind: str
    arguments: dict[str, Any]
    directory: str = ""
    log_start: int = 0
    began: float = field(default_factory=time.monotonic)
    ended: float | None = None
    answer: Answer | None = None
    is_stopping: bool = False

    @property
    def seconds(self) -> float:
        return (self.ended or time.monotonic()) - self.began


class Jobs:
    """The calls of one page.

    Attributes:
        last: the newest call of each kind.
        ended: all calls that have ended.
        pages: files that the page may show, by name: those that its own calls wrote.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.last: dict[str, Job] = {}
        self.ended: list[Job] = []
        self.pages: dict[str, Path] = {}
        self._running: tuple[Job, Worker] | None = None
        self._chat: Worker | None = None
        self._lock = threading.Lock()

    @property
    def running(self) -> Job | None:
        """The call that runs now."""
        return None if self._running is None else self._running[0]

    def start(self, kind: str, arguments: dict[str, Any], directory: str = "") -> Job:
        """Start a call. Raises UserError: another one runs."""
        log = Path(directory).expanduser() / "train.log"
        with self._lock:
            self._check_free()
            self._close_chat()  # its models would take the memory
            job = Job(kind, arguments, directory, log.stat().st_size if directory and log.is_file() else 0)
            worker = Worker()
            self._running, self.last[kind] = (job, worker), job
        threading.Thread(target=self._finish, args=(job, worker), daemon=True).start()
        return job

    def chat(self, arguments: dict[str, Any]) -> Answer:
        """Return the answer to a call of the chat, whose models stay loaded. Raises UserError: another call runs."""
        with self._lock:
            self._check_free()
            self._chat = worker = self._chat or Worker()
            job = Job("chat", arguments)
            self._running = job, worker
        try:
            answer = worker.ask("chat", arguments)
        finally:
            with self._lock:
                self._running = None
        if "result" not in answer:
            self._close_chat()
        return answer

    def stop(self) -> bool:
        """Ask the running call to stop. Returns whether there is one."""
        running = self._running
        if running is None:
            return False
        running[0].is_stopping = True
        running[1].stop()
        return True

    def close(self) -> None:
        """Stop what runs, and wait until it has saved."""
        running = self._running
        self.stop()
        if running is not None:
            running[1].wait()
        self._close_chat()

    def show(self, page: str) -> str:
        """Return the name under which the page shows a file that one of its calls wrote."""
        name = next((name for name, path in self.pages.items() if str(path) == page), f"{len(self.pages) + 1}.html")
        self.pages[name] = Path(page)
        return name

    def _check_free(self) -> None:
        if self._running is not None:
            raise UserError(
                f"one call runs at a time, and one runs now: {self._running[0].kind}",
                where="verl ui",
                fix="wait until it has ended, or stop it",
            )

    def _finish(self, job: Job, worker: Worker) -> None:
        answer = worker.ask(job.kind, job.arguments)
        worker.close()
        job.answer, job.ended = answer, time.monotonic()
        self.ended.append(job)
        with self._lock:
            self._running = None

    def _close_chat(self) -> None:
        if self._chat is not None:
            self._chat.stop()
            self._chat.close()
            self._chat = None
