"""What an environment returns, checked."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

import numpy as np

from verl.environments import Message, Start, Step
from verl.workers.calls import WrongResultError, number, shown

Kind = TypeVar("Kind", Start, Step)

TOOL = '{"type": "function", "function": {"name": …, "description": …, "parameters": {…}}}'
TAKEN = ("reward", "environment")  # names that the run's own metrics have beside the environment's


def start_of(value: object) -> Start:
    """Return the result of `reset`. Raises WrongResultError: it is of the wrong type."""
    found = _read(value, Start)
    messages = _messages(found.messages)
    if messages and messages[-1]["role"] == "assistant":
        raise WrongResultError("returned messages that end with the assistant's, so that there is nothing to answer")
    if not isinstance(found.tools, list):
        raise WrongResultError(f"returned tools {shown(found.tools)}, expected a list of JSON schemas")
    for tool in found.tools:
        if not _is_tool(tool):
            raise WrongResultError(f"returned the tool {shown(tool)}, expected {TOOL}; description and parameters may be left out")
    return found


def _is_tool(tool: object) -> bool:
    """Return whether a chat template can show a tool."""
    function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
    if not isinstance(function, dict) or not isinstance(name := function.get("name"), str) or not name:
        return False
    return isinstance(function.get("parameters", {}), dict) and isinstance(function.get("description", ""), str)


def step_of(value: object) -> Step:
    """Return the result of `step`. Raises WrongResultError: it is of the wrong type."""
    found = _read(value, Step)
    if any(message["role"] == "assistant" for message in _messages(found.messages)):
        raise WrongResultError("returned a message of the assistant, which only the model writes")
    if not isinstance(found.done, bool | np.bool_):
        raise WrongResultError(f"returned done {shown(found.done)}, expected True or False")
    metrics = found.metrics
    if not isinstance(metrics, Mapping):
        raise WrongResultError(f"returned metrics {shown(metrics)}, expected numbers by name")
    for name in metrics:
        _check_name(name)
    return Step(found.messages, number(found.reward), bool(found.done), {name: number(metrics[name]) for name in metrics})


def is_taken(name: str) -> bool:
    """Return whether the run itself has a metric of this name, beside the environment's own."""
    return name in TAKEN or name.startswith("environment/")


def _check_name(name: object) -> None:
    """Check the name of a metric. Raises WrongResultError: the log cannot have it."""
    if not isinstance(name, str) or not name.strip() or name.splitlines() != [name]:
        raise WrongResultError(f"returned a metric with the name {shown(name)}, expected a text of one line that is not empty")
    if is_taken(name):
        raise WrongResultError(f"returned a metric with the name {name!r}, which is the run's own in val/{name}; give it another name")


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
