"""One run: its directory, what it says and logs, its progress bar, and the signals that end it early."""

import json
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn, Protocol
from uuid import uuid4

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from verl import dist, plugin
from verl.config.load import to_yaml
from verl.config.shared import RunConfig
from verl.durable import replace_text
from verl.errors import Stopped, UserError
from verl.progress import Bar, open_console

# A scheduler's end, Ctrl-C, and what SLURM sends ahead of a time limit where it is asked to (`sbatch --signal`).
ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]


_SHOWN = {"rl/reward": "reward {:.3f}", "train/loss": "loss {:.4f}", "perf/tokens_per_second": "{:,.0f} tokens/s"}  # by a progress bar


class Logger(Protocol):
    """What `start(run)` of a module in verl/loggers, or of a user's own file, returns."""

    def log(self, step: int, metrics: dict[str, float]) -> None: ...

    def finish(self) -> None: ...


@dataclass(frozen=True)
class TrainResult:
    """What a training run leaves.

    Attributes:
        checkpoint: its newest checkpoint, a Hugging Face directory, or the one that it went on from where it wrote none; None: neither.
        directory: of the run (trainer.default_local_dir).
        metrics: an object a step, as metrics.jsonl has them, those of the steps before it went on among them.
    """

    checkpoint: Path | None
    directory: Path
    metrics: list[dict[str, float]]


def read_metrics(directory: Path) -> list[dict[str, float]]:
    """The content of a run's metrics.jsonl; nothing where there is none."""
    path = directory / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


class Run:
    """A training run, entered with `with`. Only rank 0 prints, logs and writes.

    Raises:
        UserError: no such logger.
    Attributes:
        directory: where checkpoints, metrics and logs go (trainer.default_local_dir).
        config: the configuration as plain nested values.
        stopped_by: name of the signal that asked the run to end, or None.
        total_steps: optimizer steps of the whole run; 0 until it is known.
        checkpoint: the newest, or the one that the run goes on from; None: there is none yet.
    """

    def __init__(self, config: RunConfig):
        self.config: dict[str, Any] = asdict(config)
        self.project_name, self.experiment_name = config.trainer.project_name, config.trainer.experiment_name
        self.directory = Path(config.trainer.default_local_dir).expanduser()
        self.stopped_by: str | None = None
        self.total_steps = 0
        self.checkpoint: Path | None = None
        self._config = config
        self._console = open_console()
        names = [config.trainer.logger] if isinstance(config.trainer.logger, str) else list(config.trainer.logger)
        self._modules = [plugin.load("verl.loggers", name, needs=("start",)) for name in names]
        self._loggers: list[Logger] = []
        self._handlers: dict[signal.Signals, Any] = {}
        self._bar: Bar | None = None

    def __enter__(self) -> "Run":
        self._open_directory()
        if threading.current_thread() is threading.main_thread():  # signals of a program whose run is in another thread are its own
            self._handlers = {number: handler for number in ENDING if (handler := signal.getsignal(number)) is not None}
        for number in self._handlers:
            signal.signal(number, self._on_signal)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._finish()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _finish(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        while self._loggers:
            self._loggers.pop(0).finish()

    def _open_directory(self) -> None:
        """Make the directory, and see that all nodes have the same one: a checkpoint is written by all processes.

        Raises:
            UserError: on all ranks: it cannot be written, or a node has one of its own.
        """
        mark = self.directory / dist.from_main(f".{uuid4().hex}")
        dist.together(lambda: self._make_directory(mark) if dist.is_main() else None)
        try:
            if self._config.trainer.save_freq != "never":
                dist.together(lambda: self._find(mark))
        finally:
            if dist.is_main():
                mark.unlink()

    def _make_directory(self, mark: Path) -> None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            (self.directory / "train.log").open("a").close()
            mark.touch()
        except OSError as error:
            what = f"cannot be written: {error.strerror}"
            raise UserError(what, where=str(self.directory), fix="set trainer.default_local_dir") from error

    def _find(self, mark: Path) -> None:
        if not mark.exists():
            raise UserError(
                f"{socket.gethostname()} has another folder of this name than the first node, so no checkpoint would be whole",
                where=str(self.directory.absolute()),
                fix="set trainer.default_local_dir to a folder on a file system that all nodes share",
            )

    def start_logging(self, start_step: int, total_steps: int) -> None:
        """Open the loggers and the progress bar, once the steps are known.

        Raises:
            UserError: a logger cannot be opened.
        """
        self.total_steps = total_steps
        if not dist.is_main():
            return
        (self.directory / "config.yaml").write_text(to_yaml(self._config), encoding="utf-8")
        self._forget_metrics_after(start_step)
        self._loggers = [module.start(self) for module in self._modules]
        numbers = (MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[state]}"))
        self._bar = Bar(TextColumn("{task.description}"), BarColumn(), *numbers, console=self._console)
        self._bar.start(total_steps, completed=start_step, description="training", state="")

    def say(self, text: str) -> None:
        """Lines for the person at the terminal and for train.log."""
        if dist.is_main():
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)
            self._append("train.log", text)

    def show(self, write: Callable[[Console], None]) -> None:
        """Something of several colours: `write` is called with the terminal, and with train.log as a plain one."""
        if dist.is_main():
            write(self._console)
            with (self.directory / "train.log").open("a", encoding="utf-8") as file:
                write(open_console(file=file, width=200))

    def line(self, text: str) -> None:
        """A line a step: to train.log, and to a plain terminal; where there is a progress bar it would only push it along."""
        if dist.is_main():
            if self._bar is None or not self._bar.is_drawn:
                self._console.print(text, markup=False, highlight=False, soft_wrap=True)
            self._append("train.log", text)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """A step's metrics to metrics.jsonl, the loggers and the progress bar.

        Args:
            step: optimizer steps done.
        """
        if not dist.is_main():
            return
        self._append("metrics.jsonl", json.dumps({"step": step, **metrics}))
        for logger in self._loggers:
            logger.log(step, metrics)
        if self._bar is not None:
            state = [text.format(metrics[name]) for name, text in _SHOWN.items() if name in metrics]
            self._bar.update(step, state=" · ".join(state))

    def keep_state(self, state: dict[str, Any]) -> None:
        """Write trainer_state.json: how far the run is and its last numbers, for a person or a script to look at."""
        if dist.is_main():
            replace_text(self.directory / "trainer_state.json", json.dumps(state, indent=2) + "\n")

    def should_stop(self) -> bool:
        """Whether a signal asked any rank to end; the same answer on every rank."""
        return dist.any_rank(self.stopped_by is not None)

    def leave(self, step: int) -> NoReturn:
        """End after a step, as the signal asks, saying where the run stands. Every rank calls it.

        Raises:
            Stopped: always.
        """
        how = "nothing was saved" if self.checkpoint is None else f"the same command resumes from {self.checkpoint}"
        self.say(f"stopped by {self.stopped_by or 'a signal to another process'} after step {step}; {how}")
        self._finish()
        dist.barrier()  # torchrun ends all as soon as one has left, and the first may still have loggers to finish
        raise Stopped(signal.Signals[self.stopped_by or "SIGTERM"], self.checkpoint)

    def result(self) -> "TrainResult":
        """What the run leaves. Every rank calls it."""
        metrics = read_metrics(self.directory) if dist.is_main() else []
        return TrainResult(self.checkpoint, self.directory, dist.from_main(metrics))

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        received = signal.Signals(number)
        self.stopped_by = received.name
        signal.signal(received, self._handlers[received])  # a second one ends the process at once
        if dist.is_main():
            kept = "without" if self._config.trainer.save_freq == "never" else "with"
            os.write(2, f"\n{self.stopped_by}: ending after this step, {kept} a checkpoint (again: at once)\n".encode())

    def _append(self, name: str, text: str) -> None:
        with (self.directory / name).open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    def _forget_metrics_after(self, step: int) -> None:
        """A run that goes on from a checkpoint takes the steps after it again."""
        path = self.directory / "metrics.jsonl"
        if path.exists():
            kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
            path.write_text("".join(line + "\n" for line in kept if step > 0), encoding="utf-8")


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # the last line of a run that was killed while writing it
        return float("inf")


@contextmanager
def first_signals_ignored() -> Iterator[None]:
    """While this lasts, the first signal of each kind that ends a run passes: in a process that works for others which have the run."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: handler for number in ENDING if (handler := signal.getsignal(number)) is not None}

    def restore(number: int, frame: FrameType | None) -> None:
        signal.signal(number, handlers[signal.Signals(number)])  # a second one ends the process at once

    for number in handlers:
        signal.signal(number, restore)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
