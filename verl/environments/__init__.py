"""Environments that a model acts in over several turns (`environment.name`), one per file.

An environment is a module with a class `Environment`. One object of it plays one episode, which becomes one answer of a step:

    from dataclasses import dataclass

    from verl.environments import Start, Step


    @dataclass
    class Settings:
        # Largest number to guess. It is the key environment.largest, beside environment.name.
        largest: int = 100


    class Environment:
        def __init__(self, settings):  # without the argument if the module has no Settings
            self._largest = settings.largest

        def reset(self, row, seed):
            self._secret = row["secret"]
            return Start([{"role": "user", "content": f"Guess my number, from 1 to {self._largest}."}])

        async def step(self, message):
            guess = message["content"].strip()
            if guess == str(self._secret):
                return Step(reward=1.0, done=True)
            hint = "higher" if guess.isdigit() and int(guess) < self._secret else "lower"
            return Step([{"role": "user", "content": hint}], reward=-0.1)

        def close(self):
            pass

Each of the three methods may be `async` or not. `reset` and `step` may also return plain dicts with the same keys. The methods of an object
are called one after the other, each within `environment.step_seconds`.

`row` is the data row, with `reference` if `data.response_key` names a right answer. `seed` depends on the run's seed and on the number of
the prompt, and is the same for all answers to it, so that they meet the same world; draw random numbers from it alone. `message` is the
model's turn as a message of the chat:

    {"role": "assistant", "content": "…"}           the text of the turn, without its stop token
    … "tool_calls": [{"id": "call_1_0", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
                                                    if the model called tools in the chat template's format; content has the text before
    … "parse_error": "…"                            if it tried to, and the call cannot be read; content has the whole text

A user's own environment runs in processes of its own, one episode at a time in each, and so does a module of verl whose function
`needs_limit(settings)` is true. Other modules of verl run in the trainer and must not block. What raises, hangs or ends its process ends
the episode, see `environment.on_error`; only a UserError ends the run: the environment cannot be used at all. If the module has a function
`check_installed()`, it is called first, and raises a UserError for a package that is missing. A function `prepare(settings)` is called once
in the process that the episodes run in, or that theirs are forked from, before the first of them: load there what they share.
"""

import inspect
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Protocol

from verl import plugin
from verl.errors import UserError

Message = dict[str, Any]
METHODS = {"reset": "def reset(self, row, seed)", "step": "def step(self, message)", "close": "def close(self)"}


@dataclass(frozen=True)
class Start:
    """How an episode begins.

    Attributes:
        messages: the chat that the model answers first; empty: that of the data row.
        tools: JSON schemas of the tools, for the chat template: {"type": "function", "function": {"name": …, "parameters": …}}.
    """

    messages: list[Message] = field(default_factory=list)
    tools: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Step:
    """What the environment answers to a turn of the model.

    Attributes:
        messages: what the model reads next: messages of roles such as `user` and `tool`, never `assistant`. Not used if `done`.
        reward: of this turn. An episode's reward is the sum.
        done: whether the episode ends here. It also ends after a turn without messages.
        metrics: numbers for the log by name, such as {"solved": 1.0}; of an episode, the last value of each counts, and 0 without any. The
            log has the mean over the episodes of a step as `episode/NAME`, and of a validation as `val/NAME`.
    """

    messages: list[Message] = field(default_factory=list)
    reward: float = 0.0
    done: bool = False
    metrics: dict[str, float] = field(default_factory=dict)


class Environment(Protocol):
    """One episode, see the module's docstring. Each method may also be a plain function, without `async`."""

    def reset(self, row: dict[str, Any], seed: int) -> Start | Mapping[str, Any] | Awaitable[Start | Mapping[str, Any]]:
        """Begin the episode."""
        ...

    def step(self, message: Message) -> Step | Mapping[str, Any] | Awaitable[Step | Mapping[str, Any]]:
        """Answer to a turn of the model."""
        ...

    def close(self) -> Awaitable[None] | None:
        """Free what the episode holds. It is called once, also after an error, but not if the process was ended."""
        ...


def load_environment(name: str) -> ModuleType:
    """Load an environment's module: a name in this folder, a dotted module, or path/to/file.py.

    Raises:
        UserError: there is none, it has no class `Environment`, the class lacks a method or takes other arguments, or a package is missing.
    """
    module = plugin.load("verl.environments", name, needs=("Environment",))
    _check_class(module)
    check: Any = getattr(module, "check_installed", None)
    if check is not None:
        check()
    return module


def _check_class(module: ModuleType) -> None:
    """Raise UserError if the class of a module has not all methods, or cannot be called with the settings."""
    kind: Any = module.Environment
    where, arguments = str(module.__file__), ("settings",) if hasattr(module, "Settings") else ()
    missing = [name for name in METHODS if isinstance(kind, type) and not callable(getattr(kind, name, None))]
    if missing:
        what = f"its class Environment has no method {' and no '.join(missing)}"
        raise UserError(what, where=where, fix=f"write {', '.join(METHODS[name] for name in missing)}")
    try:
        inspect.signature(kind).bind(*arguments)
    except ValueError:  # a class of an extension module that does not tell
        return
    except TypeError as error:
        what = f"Environment cannot be called as Environment({', '.join(arguments)}): {error}"
        raise UserError(what, where=where, fix=f"write def __init__({', '.join(('self', *arguments))})") from error
