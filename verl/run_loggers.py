"""The loggers of a run. Whatever a logger does, it does not stop the run."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from types import ModuleType
from typing import Any, Protocol

from verl import plugin
from verl.errors import UserError
from verl.user_files import ends_are_errors, noted_if_slow, place_of


class Logger(Protocol):
    """A logger: the result of `start(run)` in a module of verl/loggers or in a user's own file."""

    def log(self, step: int, metrics: dict[str, float]) -> None: ...

    def finish(self) -> None: ...


class RunLoggers:
    """The loggers that a config names.

    Args:
        names: built-in names, dotted modules or paths of files.
        say: prints a message.
    Raises:
        UserError: no such logger.
    """

    def __init__(self, names: str | Sequence[str], say: Callable[[str], None]):
        self._say = say
        self._modules = {
            name: plugin.load("verl.loggers", name, needs=("start",)) for name in ([names] if isinstance(names, str) else names)
        }
        self._running: dict[str, Logger] = {}

    def start(self, run: object) -> None:
        """Start the loggers with a verl.run.Run. Raises UserError if one fails."""
        for name, module in self._modules.items():
            try:
                logger = _called(module.start, f"the logger {name} is being started", run)
            except UserError:
                raise
            except (Exception, SystemExit) as error:  # a user's file or a library may raise anything
                what = f"the logger fails to start: {_described(error, module)}"
                raise UserError(what, where=f"trainer.logger={name}", fix="correct it, or choose another logger") from error
            missing = [function for function in ("log", "finish") if not callable(getattr(logger, function, None))]
            if missing:
                what = f"start() returned {logger!r:.60}, which has no {missing[0]!r}"
                raise UserError(what, where=f"trainer.logger={name}", fix="return an object with log(step, metrics) and finish()")
            self._running[name] = logger

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Log a step. A logger that fails is told of once, and left out from then on."""
        for name, logger in list(self._running.items()):
            if not self._attempt("log", name, logger, step, dict(metrics)):
                del self._running[name]
                with suppress(Exception, SystemExit):  # it has been told already
                    _called(logger.finish, f"the logger {name} is busy in finish")

    def finish(self) -> None:
        """Finish the loggers; again if a signal has interrupted it."""
        while self._running:
            name = next(iter(self._running))
            self._attempt("finish", name, self._running.pop(name))

    def _attempt(self, function: str, name: str, logger: Logger, *arguments: Any) -> bool:
        """Call a logger. If it fails, print why, and return False."""
        try:
            _called(getattr(logger, function), f"the logger {name} is busy in {function}", *arguments)
        except (Exception, SystemExit) as error:  # a user's file or a library may raise anything
            what = f"the logger {name} failed in {function}: {_described(error, self._modules[name])}"
            self._say(f"warning: {what}; the run continues without it, and metrics.jsonl has every step")
            return False
        return True


def _called(function: Callable[..., Any], doing: str, *arguments: Any) -> Any:
    """Call a function of a logger. It cannot end the process without a word, and a line is printed if it takes long."""
    with ends_are_errors(), noted_if_slow(doing):
        return function(*arguments)


def _described(error: BaseException, module: ModuleType) -> str:
    """Return an error and its place in a plugin's own file."""
    text = str(error).strip()
    return f"{type(error).__name__}{': ' if text else ''}{text} ({place_of(error, module)})"
