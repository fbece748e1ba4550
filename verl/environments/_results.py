"""What an environment returns, checked."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from verl.environments import Message, Start, Step
from verl.workers.calls import WrongResultError, number, shown

Kind = TypeVar("Kind", Start, Step)


def start_of(value: object) -> Start:
    """Return the result of `reset`. Raises WrongResultError: it is of the wrong type."""
    found = _read(value, Start)
    messages = _messages(found.messages)
    if messages and messages[-1]["role"] == "assistant":
        raise WrongResultError("returned messages that end with the assistant's, so that there is nothing to answer")
    if not isinstance(found.tools, list) or not all(isinstance(tool, dict) for tool in found.tools):
        raise WrongResultError(f"returned tools {shown(found.tools)}, expected a list of JSON schemas")
    return found


def step_of(value: object) -> Step:
    """Return the result of `step`. Raises WrongResultError: it is of the wrong type."""
    found = _read(value, Step)
    if any(message["role"] == "assistant" for message in _messages(found.messages)):
        raise WrongResultError("returned a message of the assistant, which only the model writes")
    metrics = found.metrics
    if not isinstance(metrics, Mapping) or not all(isinstance(name, str) for name in metrics):
        raise WrongResultError(f"returned metrics {shown(metrics)}, expected numbers by name")
    return Step(found.messages, number(found.reward), bool(found.done), {name: number(metrics[name]) for name in metrics})


def _read(value: object, kind: type[Kind]) -> Kind:
    if isinstance(value, kind):
        return value
    names = [field.name for field in fields(kind)]
    if not isinstance(value, Mapping):
        raise WrongResultError(f"returned {shown(value)}, expected a {kind.__name__} or an object with {', '.join(names)}")
    if unknown := [name for name in value if name not in names]:
        raise WrongResultError(f"returned an object with {unknown[0]!r}; a {kind.__name__} has {', '.join(names)}")
    return kind(**value)


def _messages(messages: Any) -> list[Message]:
    is_right = isinstance(messages, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) for message in messages
    )
    if not is_right:
        raise WrongResultError(f'returned messages {shown(messages)}, expected a list of {{"role": …, "content": …}}')
    found: list[Message] = messages
    return found
