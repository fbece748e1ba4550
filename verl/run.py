"""A training run: its directory, messages, metrics, loggers and progress bar, and the signals that stop it early."""

import json
import math
import os
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType, ModuleType, TracebackType
from typing import Any, NoReturn, Protocol
from uuid import uuid4

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from verl import dist, plugin
from verl.config.load import to_yaml
from verl.config.shared import RunConfig
from verl.durable import no_link, owner_only, replace_text
from verl.errors import Stopped, UserError
from verl.progress import Bar, open_console

# Signals that stop a run: SIGTERM from schedulers, SIGINT from Ctrl-C, and SIGUSR1, which SLURM can send before a time limit
# (`sbatch --signal`).
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]

# Metrics that the progress bar shows, with their formats.
_SHOWN = {"rl/reward": "reward {:.3f}", "train/loss": "loss {:.4f}", "perf/tokens_per_second": "{:,.0f} tokens/s"}


class Logger(Protocol):
    """A logger: the result of `start(run)` in a module of verl/loggers or in a user's own file."""

    def log(self, step: int, metrics: dict[str, float]) -> None: ...

    def finish(self) -> None: ...


@dataclass(frozen=True)
class TrainResult:
    """Result of a training run.

    Attributes:
        checkpoint: the newest checkpoint, a Hugging Face directory; the one that the run resumed from if it saved none; None if there is
            neither.
        directory: the run's directory (trainer.default_local_dir).
        metrics: one dict per step, as in metrics.jsonl. A resumed run includes the steps before it resumed.
    """

    checkpoint: Path | None
    directory: Path
    metrics: list[dict[str, float]]


def read_metrics(directory: Path) -> list[dict[str, float]]:
    """Read a run's metrics.jsonl, one dict per line, with NaN for null. Return an empty list if there is no file."""
    path = directory / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [{name: math.nan if value is None else value for name, value in json.loads(line).items()} for line in lines]


class Run:
    """A training run, as a context manager. Only rank 0 prints, logs and writes.

    Attributes:
        directory: directory of checkpoints, metrics and logs (trainer.default_local_dir).
        config: the config as nested dicts of plain values.
        stopped_by: name of the signal that asked the run to stop, or None.
        total_steps: optimizer steps of the whole run; 0 until it is known.
        checkpoint: the newest checkpoint, or the one that the run resumes from; None if there is none yet.
    Raises:
        UserError: no such logger.
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
        self._names = names
        self._loggers: list[tuple[Logger, str, ModuleType]] = []
        self._handlers: dict[signal.Signals, Any] = {}
        self._bar: Bar | None = None
        self._state = ""  # of the progress bar

    def __enter__(self) -> "Run":
        self._open_directory()
        if threading.current_thread() is threading.main_thread():  # Python allows handlers only there
            self._handlers = {number: handler for number in STOP_SIGNALS if (handler := signal.getsignal(number)) is not None}
        for number in self._handlers:
            signal.signal(number, self._on_signal)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._finish()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _finish(self) -> None:
        """Stop the progress bar and finish the loggers."""
        if self._bar is not None:
            self._bar.stop()
        while self._loggers:
            logger, name, module = self._loggers.pop(0)
            self._attempt("finish", logger, name, module)

    def _open_directory(self) -> None:
        """Create the directory, and check that all nodes share it, because all processes write their part of a checkpoint.

        Raises:
            UserError: on all ranks: it cannot be written, or a node has another directory of this name.
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
            open(self.directory / "train.log", "a", opener=owner_only).close()
            mark.touch()
        except OSError as error:
            what = f"cannot be written: {error.strerror}"
            raise UserError(what, where=str(self.directory), fix="set trainer.default_local_dir") from error

    def _find(self, mark: Path) -> None:
        if not mark.exists():
            raise UserError(
                f"{socket.gethostname()} does not see the first node's folder of this name, so no checkpoint would be complete",
                where=str(self.directory.absolute()),
                fix="set trainer.default_local_dir to a folder on a file system that all nodes share",
            )

    def start_logging(self, start_step: int, total_steps: int) -> None:
        """Write config.yaml, and open the loggers and the progress bar.

        Args:
            start_step: optimizer steps done by the run that this one resumes; 0 for a new run.
            total_steps: optimizer steps of the whole run.
        Raises:
            UserError: on all ranks: a logger cannot be started.
        """
        self.total_steps = total_steps
        if dist.is_main():
            replace_text(self.directory / "config.yaml", to_yaml(self._config), private=True)
            self._drop_metrics_after(start_step)
        dist.together(self._start_loggers)
        if not dist.is_main():
            return
        numbers = (MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[state]}"))
        self._bar = Bar(TextColumn("{task.description}"), BarColumn(), *numbers, console=self._console)
        self._bar.start(total_steps, completed=start_step, description="training", state="")

    def say(self, text: str) -> None:
        """Print a message to the terminal and to train.log."""
        if dist.is_main():
            from verl.redaction import redact_text

            text = redact_text(text)
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)
            self._append("train.log", text)

    def show(self, write: Callable[[Console], None]) -> None:
        """Print colored output: `write` is called with a console for the terminal, and with a plain one for train.log."""
        if dist.is_main():
            write(self._console)
            with open(self.directory / "train.log", "a", encoding="utf-8", opener=owner_only) as file:
                write(open_console(file=file, width=200))

    def line(self, text: str) -> None:
        """Write the line of a step to train.log, and print it unless a progress bar is drawn, which already shows the step."""
        if dist.is_main():
            if self._bar is None or not self._bar.is_drawn:
                self._console.print(text, markup=False, highlight=False, soft_wrap=True)
            self._append("train.log", text)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Write a step's metrics to metrics.jsonl, the loggers and the progress bar.

        Args:
            step: number of optimizer steps done.
            metrics: values by name.
        """
        if not dist.is_main():
            return
        self._append("metrics.jsonl", _json({"step": step, **metrics}))
        self._loggers = [
            (logger, name, module)
            for logger, name, module in self._loggers
            if self._attempt("log", logger, name, module, step, dict(metrics))
        ]
        if self._bar is not None:
            self._state = " · ".join(text.format(metrics[name]) for name, text in _SHOWN.items() if name in metrics)
            self._bar.update(step, state=self._state)

    def _start_loggers(self) -> None:
        """Start the loggers, on rank 0. Raises UserError if one fails."""
        if not dist.is_main():
            return
        for name, module in zip(self._names, self._modules, strict=True):
            try:
                logger = _called(module.start, f"the logger {name} is being started", self)
            except UserError:
                raise
            except (Exception, SystemExit) as error:  # a user's file or a library may raise anything
                what = f"the logger fails to start: {_described(error, module)}"
                raise UserError(what, where=f"trainer.logger={name}", fix="correct it, or choose another logger") from error
            missing = [function for function in ("log", "finish") if not callable(getattr(logger, function, None))]
            if missing:
                what = f"start() returned {logger!r:.60}, which has no {missing[0]!r}"
                raise UserError(what, where=f"trainer.logger={name}", fix="return an object with log(step, metrics) and finish()")
            self._loggers.append((logger, name, module))

    def _attempt(self, function: str, logger: Logger, name: str, module: ModuleType, *arguments: Any) -> bool:
        """Call a logger. If it fails, print why, and return False: no failure of a logger stops a run."""
        try:
            _called(getattr(logger, function), f"the logger {name} is busy in {function}", *arguments)
        except (Exception, SystemExit) as error:  # a user's file or a library may raise anything
            what = f"the logger {name} failed in {function}: {_described(error, module)}"
            self.say(f"warning: {what}; the run continues without it, and metrics.jsonl has every step")
            if function == "log":
                with suppress(Exception, SystemExit):  # it has been told already
                    _called(logger.finish, f"the logger {name} is busy in finish")
            return False
        return True

    def waiting(self, text: str | None, *, line_is_due: bool = False) -> None:
        """Show what the run waits for on the progress bar, and write a line about it if one is due. None: the wait is over."""
        if self._bar is not None:
            self._bar.update(None, state=self._state if text is None else text)
        if text is not None and line_is_due:
            self.line(text)

    def stopping(self) -> bool:
        """Return whether a signal asked this process to stop."""
        return self.stopped_by is not None

    def keep_state(self, state: dict[str, Any]) -> None:
        """Write trainer_state.json: the progress and last metrics of the run, for users and scripts. Training does not read it."""
        if dist.is_main():
            replace_text(self.directory / "trainer_state.json", _json(state, indent=2) + "\n")

    def should_stop(self) -> bool:
        """Return whether a signal asked any rank to stop; the result is the same on every rank."""
        return dist.any_rank(self.stopped_by is not None)

    def leave(self, step: int) -> NoReturn:
        """Stop the run after a step because of a signal, and print the checkpoint to resume from. Every rank calls it.

        Args:
            step: number of optimizer steps done.
        Raises:
            Stopped: always.
        """
        how = "nothing was saved" if self.checkpoint is None else f"the same command resumes from {self.checkpoint}"
        self.say(f"stopped by {self.stopped_by or 'a signal to another process'} after step {step}; {how}")
        self._finish()
        dist.barrier()  # torchrun ends all processes as soon as one exits, and rank 0 may still be finishing its loggers
        raise Stopped(signal.Signals[self.stopped_by or "SIGTERM"], self.checkpoint)

    def result(self) -> "TrainResult":
        """Return the result of the run, the same on every rank. Every rank calls it."""
        metrics = read_metrics(self.directory) if dist.is_main() else []
        return TrainResult(self.checkpoint, self.directory, dist.from_main(metrics))

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        received = signal.Signals(number)
        self.stopped_by = received.name
        signal.signal(received, self._handlers[received])  # a second signal ends the process at once
        if dist.is_main():
            checkpoint = "without" if self._config.trainer.save_freq == "never" else "with"
            os.write(
                2, f"\n{self.stopped_by}: stopping after this step, {checkpoint} a checkpoint; send it again to stop at once\n".encode()
            )

    def _append(self, name: str, text: str) -> None:
        try:
            opener = owner_only if name == "train.log" else no_link
            with open(self.directory / name, "a", encoding="utf-8", opener=opener) as file:
                file.write(text + "\n")
        except OSError as error:
            what, fix = f"cannot be written: {error.strerror}", "make room on the disk; the same command resumes from the newest checkpoint"
            raise UserError(what, where=str(self.directory / name), fix=fix) from error

    def _drop_metrics_after(self, step: int) -> None:
        """Remove metrics of the steps after a checkpoint, because a run that resumes from it repeats these steps."""
        path = self.directory / "metrics.jsonl"
        if path.exists():
            kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
            path.write_text("".join(line + "\n" for line in kept if step > 0), encoding="utf-8")


def _json(values: dict[str, Any], **options: Any) -> str:
    """Return values as JSON, which has no NaN and no infinity: they are null."""
    return json.dumps(_without_nan(values), allow_nan=False, **options)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(child) for key, child in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _called(function: Callable[..., Any], doing: str, *arguments: Any) -> Any:
    """Call a function of a logger. It cannot end the process without a word, and a line is printed if it takes long."""
    from verl.user_files import ends_are_errors, noted_if_slow

    with ends_are_errors(), noted_if_slow(doing):
        return function(*arguments)


def _described(error: BaseException, module: ModuleType) -> str:
    """Return an error and its place in a plugin's own file."""
    from verl.user_files import place_of

    text = str(error).strip()
    return f"{type(error).__name__}{': ' if text else ''}{text} ({place_of(error, module)})"


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # a run that was killed while writing it leaves an incomplete last line
        return float("inf")
