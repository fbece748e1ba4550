"""Functions of users' code: their arguments, their results, and what is said if a call fails."""

import inspect
import json
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

from verl import user_files
from verl.errors import UserError

LARGEST = 3.4028234663852886e38  # of float32
LONGEST_TEXT = 500  # characters of an error's text that are shown

# Positional arguments of each function. A module with `Settings` gets its settings as one more.
ARGUMENTS = {
    "score": ("prompt", "response", "row"),
    "score_group": ("prompt", "responses", "row"),
    "extract_answer": ("text",),
    "reference_answer": ("reference",),
    "check_reference": ("reference",),
    "exact_match": ("response", "reference", "method"),
    "reply": ("response", "prompt", "row"),
    "run": ("row",),
}


@dataclass(frozen=True)
class Failure:
    """A call that gave no result.

    Attributes:
        what: what happened, such as "raised ValueError: no sixes".
        place: the last line of the user's own code that was running, as `file.py:LINE`.
        fix: what to do, if it is known.
    """

    what: str
    place: str | None = None
    fix: str | None = None

    def __str__(self) -> str:
        return f"{self.what} ({self.place})" if self.place else self.what


def packed(**message: object) -> bytes:
    """Return a message of a worker as JSON. The trainer does not unpickle what comes from a process that may run a model's answers."""
    return json.dumps(message, default=_plain).encode()


def unpacked(message: bytes) -> dict[str, Any]:
    """Read a message of a worker."""
    found: dict[str, Any] = json.loads(message)
    value = found.get("value")
    if isinstance(value, dict):
        found["value"] = (
            Failure(**value["failure"]) if "failure" in value else UserError(value["what"], where=value["where"], fix=value["fix"])
        )
    return found


def _plain(value: object) -> object:
    if isinstance(value, UserError):
        return {"what": value.what, "where": value.where, "fix": value.fix}
    assert isinstance(value, Failure)
    return {"failure": asdict(value)}


class WrongResultError(Exception):
    """A function gave something that it must not give."""


def result_of(function: str, value: object, arguments: tuple[Any, ...]) -> object:
    """Return a function's result as a plain value. Raises WrongResultError: it is of the wrong type."""
    if function == "score":
        return number(value)
    if function == "score_group":
        return numbers(value, len(arguments[1]))
    if function == "reply" and not (value is None or isinstance(value, str)):
        raise WrongResultError(f"returned {shown(value)}, expected text or None")
    if function == "exact_match":
        return bool(value)
    return None if value is None else str(value)


def number(value: object) -> float:
    """Return a number as a float. Whatever `float()` takes and is finite in float32 is a number, except text.

    Raises:
        WrongResultError: it is no such number.
    """
    try:
        found = float(value) if type(value) in (float, int, bool) else _converted(value)  # type: ignore[arg-type]
    except Exception as error:  # a class of the user's may raise anything
        raise WrongResultError(f"returned {shown(value)}, expected a finite number") from error
    if not abs(found) <= LARGEST:  # NaN compares false
        raise WrongResultError(f"returned {shown(value)}, expected a finite number")
    return found


def _converted(value: Any) -> float:
    if not (hasattr(type(value), "__float__") or hasattr(type(value), "__index__")):  # `float()` reads text too
        raise TypeError
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of NumPy, for an array of one number in one dimension
        warnings.filterwarnings("error", message="Casting complex values")
        return float(value)


def numbers(values: object, wanted: int) -> list[float]:
    """Return the numbers of a group's answers. Raises WrongResultError: they are not `wanted` numbers."""
    try:
        found = list(values) if not isinstance(values, str | bytes | dict) and isinstance(values, Iterable) else None
    except Exception:  # a tensor without dimensions is no iterable, though its class is
        found = None
    if found is None:
        raise WrongResultError(f"returned {shown(values)}, expected {wanted} numbers, one for each answer")
    if len(found) != wanted:
        raise WrongResultError(f"returned {len(found)} numbers for {wanted} answers")
    return [number(value) for value in found]


def shown(value: object) -> str:
    """Return a value and its type for an error: `'good' of type str`."""
    try:
        text = repr(value)
    except Exception:  # a class of the user's may raise anything
        text = "a value"
    return f"{text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + '…'} of type {type(value).__name__}"


def failure_of(error: BaseException, function: str, module: ModuleType) -> Failure | UserError:
    """Return the failure for an exception in a user's code, or a wrong result. A UserError means that the code cannot be used at all."""
    if function == "check_reference" and isinstance(error, UserError | ValueError):
        return Failure(getattr(error, "what", str(error)), fix=getattr(error, "fix", None))
    if isinstance(error, UserError):
        return error
    if isinstance(error, WrongResultError):
        return Failure(str(error))
    try:
        text = str(error)[:LONGEST_TEXT]
    except Exception:  # a class of the user's may raise anything
        text = ""
    return Failure(f"raised {type(error).__name__}{': ' if text else ''}{text}", user_files.place_of(error, module))


def late(seconds: float, place: str | None = None) -> Failure:
    """Return the failure of a call that has exceeded its time limit."""
    return Failure(f"did not return within {seconds:g} s (reward.timeout_seconds)", place)


def check_function(module: ModuleType, function: str, where: str) -> None:
    """Raise UserError if a function of a user's module cannot be called with its arguments.

    Args:
        where: the key and value that name the module.
    """
    names = (*ARGUMENTS[function], *(("settings",) if hasattr(module, "Settings") else ()))
    called: Callable[..., Any] = getattr(module, function)
    if not callable(called):
        raise UserError(f"{function} is no function", where=where, fix=f"write def {function}({', '.join(names)})")
    try:
        signature = inspect.signature(called)
    except ValueError:  # a function of an extension module that does not tell
        return
    try:
        signature.bind(*names)
    except TypeError as error:
        what = f"{function}{signature} cannot be called as {function}({', '.join(names)}): {error}"
        raise UserError(what, where=where, fix=f"write def {function}({', '.join(names)})") from error


def is_async(module: ModuleType, function: str) -> bool:
    """Return whether a function of a module is `async def`, also behind decorators that say so."""
    called = getattr(module, function)
    return any(inspect.iscoroutinefunction(f) for f in (called, inspect.unwrap(called), getattr(called, "__call__", None)))  # noqa: B004


class InProcess:
    """Calls of verl's own code, in this process."""

    def __init__(self, module: ModuleType, settings: object | None):
        self._module, self._more = module, (() if settings is None else (settings,))

    def run(self, function: str, arguments: Sequence[tuple[Any, ...]], *, until_failure: bool = False) -> list[Any]:
        """Call a function once for each tuple of arguments. Return the results; a Failure in place of each that failed.

        Raises:
            UserError: the code cannot be used at all, such as for a missing package.
        """
        return [self._called(function, values) for values in arguments]

    def run_batch(self, batch_function: str, function: str, columns: Sequence[Sequence[Any]]) -> list[Any]:
        """Call a function once for all answers. If it fails, call `function` for each answer, to find the one that is to blame.

        Args:
            columns: the arguments of the batch function, each with one value per answer.
        """
        try:
            return numbers(getattr(self._module, batch_function)(*columns, *self._more), len(columns[0]))
        except UserError:
            raise
        except Exception:
            return self.run(function, list(zip(*columns, strict=True)))

    def run_groups(self, groups_function: str, function: str, calls: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Call a function once for all groups of answers. If it fails, call `function` for each group, to find the one that is to blame.

        Args:
            calls: the arguments of `function` for each group; its second one are the group's answers.
        """
        try:
            found = getattr(self._module, groups_function)(*zip(*calls, strict=True), *self._more) if calls else []
            return [numbers(values, len(call[1])) for values, call in zip(found, calls, strict=True)]
        except UserError:
            raise
        except Exception:
            return self.run(function, calls)

    @staticmethod
    def checked(value: object) -> float | Failure:
        """Return a score as a number, or its Failure."""
        try:
            return number(value)
        except WrongResultError as error:
            return Failure(str(error))

    def _called(self, function: str, values: tuple[Any, ...]) -> object:
        try:
            return result_of(function, getattr(self._module, function)(*values, *self._more), values)
        except Exception as error:
            failure = failure_of(error, function, self._module)
            if isinstance(failure, UserError):
                raise failure from error
            return failure

    def close(self) -> None:
        """Do nothing: there is no process to end."""
