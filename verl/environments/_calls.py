"""What environments with one tool share: its JSON schema, its calls in a turn, and replies to them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from verl.environments import Message


@dataclass(frozen=True)
class Call:
    """A call of the tool.

    Attributes:
        text: its argument; None: it cannot be read, and `error` says why.
        identity: that the reply refers to; None: the call is in the text of the turn.
    """

    text: str | None
    error: str = ""
    identity: str | None = None

    def reply(self, text: str) -> Message:
        """Return the reply to this call as a message of the chat."""
        return {"role": "tool", "content": text, **({} if self.identity is None else {"tool_call_id": self.identity})}


def schema(name: str, description: str, argument: str, meaning: str) -> dict[str, Any]:
    """Return the JSON schema of a tool that takes one text."""
    parameters = {"type": "object", "properties": {argument: {"type": "string", "description": meaning}}, "required": [argument]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def calls_in(message: Message, name: str, argument: str, in_text: Callable[[str], str | None]) -> list[Call]:
    """Return the calls of the tool in a turn of the model; none: it has given its answer.

    Args:
        name: of the tool, and of its argument.
        in_text: returns the argument of a call that is written as text, by a model whose chat template has no calls; None: it has none.
    """
    if "parse_error" in message:
        return [Call(None, f"error: {message['parse_error']}")]
    if calls := message.get("tool_calls"):
        return [_read(one["function"], name, argument, one["id"]) for one in calls]
    text = in_text(message["content"])
    return [] if text is None else [Call(text)]


def _read(call: dict[str, Any], name: str, argument: str, identity: str) -> Call:
    text = call["arguments"].get(argument)
    if call["name"] == name and isinstance(text, str):
        return Call(text, identity=identity)
    return Call(None, f'error: the only tool is {name}, with {{"{argument}": "…"}}', identity)
