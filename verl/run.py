"""A training run: its directory, messages, metrics, loggers and panel, and how it stops early."""

import io
import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console

from verl import dist
from verl.config.load import to_yaml
from verl.config.shared import RunConfig
from verl.durable import append_text, real_folder, replace_text
from verl.errors import RankError, Stopped, UserError
from verl.progress import open_console

if TYPE_CHECKING:
    from verl.directory import Claimed
    from verl.run_view import RunView

OUT_OF_TIME = 1  # a reason to stop; others are numbers of signals, and one more
SECONDS_BETWEEN_LINES = 10.0  # of one kind, on the terminal


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
    return [_values(line) for line in lines]


def _values(line: str) -> dict[str, float]:
    return {name: math.nan if value is None else value for name, value in json.loads(line).items()}


class Run:
    """A training run, as a context manager. Only rank 0 prints, logs and writes.

    Attributes:
        directory: directory of checkpoints, metrics and logs (trainer.default_local_dir).
        config, settings: the config, as nested dicts of plain values and as given.
        origin: why the directory is not the one that trainer.default_local_dir names; empty if it is.
        notes: what to say after the first line of the run.
        total_steps: optimizer steps of the whole run; 0 until it is known.
        step, start_step: optimizer steps that are done and logged, and those that were done when the run began.
        checkpoint: the newest checkpoint, or the one that the run resumes from; None if there is none yet.
    Raises:
        UserError: no such logger.
    """

    def __init__(self, config: RunConfig):
        from verl.run_loggers import RunLoggers  # once in a run

        self.config: dict[str, Any] = asdict(config)
        self.project_name, self.experiment_name = config.trainer.project_name, config.trainer.experiment_name
        self.directory = Path(config.trainer.default_local_dir).expanduser()
        self.origin, self.notes = "", list[str]()
        self.total_steps = self.step = self.start_step = 0
        self.checkpoint: Path | None = None
        self.settings = config
        self._console = open_console()
        self._loggers = RunLoggers(config.trainer.logger, self.say)
        self._deadline: Any = None  # a verl.deadline.Deadline, with trainer.max_seconds
        self._reason = 0  # why the run stops, the same on all ranks: 0, OUT_OF_TIME, or a signal's number and one more
        self._view: RunView | None = None
        self._since = time.monotonic()
        self._printed: dict[str, float] = {}  # when a line of a kind was printed last
        self._claim: Claimed | None = None
        self._unwritten: dict[str, str] = {}  # lines that a file could not take yet, by its name
        self._told: set[str] = set()  # names of files whose failure has been told

    def __enter__(self) -> "Run":
        from verl.directory import claimed  # once in a run

        self._claim = claimed(self.settings)
        self.directory, self.origin, self.notes = self._claim.directory, self._claim.why, self._claim.notes
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        try:
            self._tell(error)
            if error is None:
                self.enter("finishing the loggers")
            self._finish()
            if error is None and self.start_step < self.step:
                self._say_ending()
        except Stopped as stopped:  # every step is done
            self._tell(stopped)
            raise
        finally:
            if self._claim is not None:
                # What ends it before a step is the user's to mend, and stands on the terminal; after a rank's death, train.log has more.
                is_vain = isinstance(error, UserError) and not isinstance(error, RankError) and self.step == self.start_step
                self._claim.release(is_vain=is_vain)

    def _tell(self, error: BaseException | None) -> None:
        """Print that a signal has left the run in a phase that may be left at any time."""
        if isinstance(error, Stopped) and not error.is_told:
            self._stop_view()
            error.checkpoint, error.is_told = self.checkpoint, True
            self.say(str(error).replace("the same call", "the same command"))

    def _finish(self) -> None:
        """Stop the panel and finish the loggers."""
        self._stop_view()
        self._loggers.finish()

    def _stop_view(self) -> None:
        if self._view is not None:
            self._view.stop()

    def _say_ending(self) -> None:
        """Print what came of the run, and the commands that go on from there."""
        if dist.is_main():
            from verl.ending import ending  # once in a run

            try:
                text = ending(self, self._metrics(), time.monotonic() - self._since)
            except Exception as error:  # such as a file that somebody has changed meanwhile: the run is done, and its work is saved
                text = f"done: {self.step:,} of {self.total_steps:,} steps; its metrics cannot be read: {type(error).__name__}: {error}"
            self.say(text)

    def owned(self) -> Path:
        """Return the directory, after a check that no other run has taken it over. Every rank calls it before a checkpoint is written.

        The metrics until now are then on disk, so that each committed step has its line. Raises UserError: another run has it now.
        """
        if self._claim is not None:
            dist.together(self._claim.check)
        return self.directory

    def start_logging(self, start_step: int, total_steps: int) -> None:
        """Write config.yaml, and open the loggers and the panel.

        Args:
            start_step: optimizer steps done by the run that this one resumes; 0 for a new run.
            total_steps: optimizer steps of the whole run.
        Raises:
            UserError: on all ranks: a logger cannot be started.
        """
        self.total_steps, self.step, self.start_step = total_steps, start_step, start_step
        if dist.is_main():
            from verl.directory import begin_files  # once in a run

            trainer = replace(self.settings.trainer, default_local_dir=str(self.directory))
            begin_files(self.directory, to_yaml(replace(self.settings, trainer=trainer)), start_step, self.say)
        dist.together(lambda: self._loggers.start(self) if dist.is_main() else None)
        if not dist.is_main():
            return
        from verl.run_view import RunView  # once in a run

        self._view = RunView(self, self._console, start_step)
        self._view.start()

    def say(self, text: str) -> None:
        """Print a message to the terminal and to train.log."""
        if dist.is_main():
            from verl.redaction import redact_text

            text = redact_text(text)
            self._print(text)
            self.append("train.log", text)

    def show(self, write: Callable[[Console], None]) -> None:
        """Print colored output: `write` is called with a console for the terminal, and with a plain one for train.log."""
        if dist.is_main():
            write(self._console)
            text = io.StringIO()
            write(open_console(file=text, width=200))
            self.append("train.log", text.getvalue().removesuffix("\n"))

    def line(self, text: str, kind: str = "step", *, is_last: bool = False) -> None:
        """Write a line that comes again and again to train.log. Of each kind, the first is printed, the last, and one in ten seconds.

        Args:
            kind: such as "step" or "saved". Lines of steps are not printed where a panel shows the step.
            is_last: whether it is the last one of the kind in the run.
        """
        if dist.is_main():
            from verl.redaction import redact_text

            text, now = redact_text(text), time.monotonic()
            is_shown = kind == "step" and self._view is not None and self._view.is_drawn
            if not is_shown and (is_last or now - self._printed.get(kind, -math.inf) >= SECONDS_BETWEEN_LINES):
                self._printed[kind] = now
                self._print(text)
            self.append("train.log", text)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Write a step's metrics to metrics.jsonl, the loggers and the panel.

        Args:
            step: number of optimizer steps done.
            metrics: values by name.
        """
        self.step = step
        if not dist.is_main():
            return
        self.append("metrics.jsonl", _json({"step": step, **metrics}))
        self._loggers.log(step, metrics)
        if self._view is not None:
            self._view.log(step, metrics)

    def waiting(self, text: str | None, *, line_is_due: bool = False) -> None:
        """Show what the run waits for on the panel, and write a line about it if one is due. None: the wait is over."""
        if self._view is not None:
            self._view.waiting(text)
        if text is not None and line_is_due:
            self.line(text, "waiting")

    def enter(self, phase: str, step: int = 0, *, limited: bool = False) -> None:
        """Say what the run does from now on, for the errors of other ranks and the lines of signals; see `verl.signals.enter`."""
        from verl import signals

        signals.enter(phase, step, limited=limited)
        if self._deadline is not None:
            self._deadline.enter(phase, step)

    @contextmanager
    def stepping(self, weights: int) -> Iterator[None]:
        """In this context, which trains, signals are noted, and `should_stop` tells of them.

        Args:
            weights: number of trained weights, which tells the size of a checkpoint.
        """
        from verl import signals

        if self.settings.trainer.max_seconds is not None:
            from verl.deadline import Deadline, started

            self._deadline = Deadline(self.settings.trainer.max_seconds, started(), weights * 16)
        with signals.held(f"stopping after this step, {'without' if self.settings.trainer.save_freq == 'never' else 'with'} a checkpoint"):
            yield

    def stopping(self) -> bool:
        """Return whether a signal asked this process to stop."""
        from verl import signals

        return signals.received() is not None

    def keep_state(self, state: dict[str, Any]) -> None:
        """Write trainer_state.json: the progress and last metrics of the run, for users and scripts. Training needs none of it."""
        if dist.is_main():
            self.replace("trainer_state.json", _json(state, indent=2) + "\n")

    def replace(self, name: str, text: str) -> None:
        """Replace a file of the run that training does not read. If the disk fails, this is told once for each folder."""
        path = self.directory / name
        try:
            if path.parent != self.directory:
                real_folder(path.parent)
            replace_text(path, text)
        except OSError as error:
            self._warn(name, error)

    def should_stop(self) -> bool:
        """Return whether a signal asked any rank to stop, or the time is up; the result is the same on every rank."""
        from verl import signals

        number, is_late = signals.received(), self._deadline is not None and self._deadline.is_near()
        self._reason = dist.most(OUT_OF_TIME + number if number is not None else OUT_OF_TIME * is_late)
        return self._reason > 0

    def leave(self, step: int) -> NoReturn:
        """Stop the run after a step as `should_stop` told, and print the checkpoint to resume from. Every rank calls it.

        Args:
            step: number of optimizer steps done.
        Raises:
            Stopped: always.
        """
        how = "nothing was saved" if self.checkpoint is None else f"the same command resumes from {self.checkpoint}"
        number = signal.Signals(self._reason - OUT_OF_TIME) if self._reason > OUT_OF_TIME else None
        by = f"trainer.max_seconds={self.settings.trainer.max_seconds:g}" if number is None else number.name
        self._stop_view()  # so that it stands above the line
        self.say(f"stopped by {by} after step {step}; {how}")
        if self.checkpoint is not None and dist.is_main():
            from verl.ending import commands  # once in a run

            self.say(commands(self, is_stopped=True))
        self._finish()
        dist.barrier()  # torchrun ends all processes as soon as one exits, and rank 0 may still be finishing its loggers
        stopped = Stopped(number, self.checkpoint)
        stopped.is_told = True
        raise stopped

    def result(self) -> "TrainResult":
        """Return the result of the run, the same on every rank. Every rank calls it."""
        metrics = self._metrics() if dist.is_main() else []
        return TrainResult(self.checkpoint, self.directory, dist.from_main(metrics))

    def _metrics(self) -> list[dict[str, float]]:
        """Return the metrics of all steps, also those that the file could not take."""
        return [*read_metrics(self.directory), *map(_values, self._unwritten.get("metrics.jsonl", "").splitlines())]

    def _print(self, text: str) -> None:
        try:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        except (OSError, SystemExit) as error:  # a full disk; rich exits where nobody reads a pipe any more
            from verl.disk import silence_output

            self.append("train.log", silence_output(error))

    def append(self, name: str, text: str) -> None:
        """Append a line to a file. If the disk fails, this is told once, and the line is written with the next one that can be."""
        lines = f"{self._unwritten.pop(name, '')}{text}\n"
        try:
            append_text(self.directory / name, lines, private=name == "train.log")
        except OSError as error:
            self._unwritten[name] = lines
            self._warn(name, error)

    def _warn(self, name: str, error: OSError) -> None:
        """Warn that a file cannot be written, once for each file of the run's directory and each folder in it; the run continues."""
        if (kind := name.partition("/")[0]) not in self._told:
            self._told.add(kind)
            from verl.disk import unwritten

            self.say(unwritten(error, self.directory / name))


def _json(values: dict[str, Any], **options: Any) -> str:
    """Return values as JSON, which has no NaN and no infinity: they are null."""
    return json.dumps(_without_nan(values), allow_nan=False, **options)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(child) for key, child in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
