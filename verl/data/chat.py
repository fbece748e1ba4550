"""What a chat may look like: messages, each with a role and a content, and the tools that it may call."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from verl.data.formats import describe
from verl.errors import UserError

Message = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")
OTHER_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant", "developer": "system", "function": "tool"}


@dataclass(frozen=True)
class Chat:
    """A chat as templates expect it.

    Attributes:
        messages: without keys that are null; the arguments of tool calls are objects.
        tools: JSON schemas, or None.
    """

    messages: list[Message]
    tools: list[dict[Any, Any]] | None = None

    def answers(self) -> Iterator[tuple[int, Message]]:
        """The assistant's messages, each with its number."""
        return ((number, message) for number, message in enumerate(self.messages) if message["role"] == "assistant")

    def up_to(self, number: int) -> "Chat":
        """The chat before a message."""
        return Chat(self.messages[:number], self.tools)


def checked(messages: object, tools: object = None) -> Chat:
    """A chat of the data.

    Args:
        messages: a list of messages, or its JSON.
        tools: None, a list of JSON schemas, or its JSON.
    Raises:
        UserError: what is not right, and in which message.
    """
    found = _parsed(messages, "messages")
    if not isinstance(found, list) or not found:
        what = "an empty list" if found == [] else describe(found)
        raise UserError(f"found {what}, expected a list of messages", where="messages", fix='write [{"role": "user", "content": …}, …]')
    chat = Chat([_message(message, number) for number, message in enumerate(found)], _tools(tools))
    if chat.messages[0]["role"] == "assistant":
        raise UserError("the chat begins with the assistant", where="messages[0]", fix="begin with a system or user message")
    return chat


def unanswered(messages: object, where: str) -> tuple[list[Message], str | None]:
    """A chat that waits for the assistant, and what the assistant said in the data, if that is there; no more of it is checked.

    Args:
        messages: as for `checked`.
        where: place of the row.
    Raises:
        UserError: there is nothing to answer.
    """
    try:
        found: Any = json.loads(messages) if isinstance(messages, str) else messages
    except (ValueError, RecursionError) as error:
        raise UserError(f"found text that is not JSON: {error}", where=where, fix="write the chat as JSON, not as text") from None
    answer = None
    if isinstance(found, list) and found and isinstance(found[-1], dict) and found[-1].get("role") == "assistant":
        *found, said = found
        answer = said.get("content")
    last = found[-1] if isinstance(found, list) and found else None
    if not isinstance(last, dict) or not isinstance(last.get("content"), str):
        raise UserError("the chat has no message that could be answered", where=where, fix="end it with a message of the user")
    return list(found), answer


def _parsed(value: object, where: str) -> object:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise UserError(f"found text that is not JSON: {error}", where=where, fix="write it as JSON, not as text") from None


def _message(message: object, number: int) -> Message:
    where = f"messages[{number}]"
    role = _role(message, where)
    assert isinstance(message, dict)
    if role == "system" and number:
        raise UserError("a system message that is not the first", where=where, fix="put it at the beginning, or join it with the first")
    present = {key: value for key, value in message.items() if value is not None}
    if role == "assistant" and "tool_calls" in present:
        present["tool_calls"] = _tool_calls(present["tool_calls"], f"{where}.tool_calls")
    _check_content(present, f"{where}.content")
    return present


def _role(message: object, where: str) -> str:
    if not isinstance(message, dict):
        raise UserError(f"found {describe(message)}, expected an object", where=where, fix='write {"role": …, "content": …}')
    role = message.get("role")
    if isinstance(role, str) and role in ROLES:
        return role
    fix = f"one of {', '.join(ROLES)}"
    if role is None:
        fix = "write role for from, and content for value" if {"from", "value"} <= set(message) else fix
        raise UserError(f"no key 'role'; found {', '.join(map(repr, message)) or 'none'}", where=where, fix=fix)
    meant = OTHER_ROLES.get(role) if isinstance(role, str) else None
    raise UserError(f"the role is {describe(role)}", where=f"{where}.role", fix=f"write {meant!r}" if meant else fix)


def _check_content(message: Message, where: str) -> None:
    content, is_answer = message.get("content"), message["role"] == "assistant"
    if content is not None and not isinstance(content, str):
        raise UserError(f"found {describe(content)}, expected text", where=where, fix="write it as one text, in quotes")
    if is_answer and message.get("tool_calls"):
        return
    if content is None:
        raise UserError("is missing or null", where=where, fix="fill it in, or remove the row")
    if is_answer and not content.strip():
        raise UserError("the assistant's text is empty", where=where, fix="fill it in, or remove the row")


def _tool_calls(calls: object, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise UserError(f"found {describe(calls)}, expected a list of objects", where=where, fix='write [{"name": …, "arguments": …}]')
    return [_tool_call(call, f"{where}[{number}]") for number, call in enumerate(calls)]


def _tool_call(call: dict[str, Any], where: str) -> dict[str, Any]:
    """The call with its arguments as an object: some formats write them as the JSON of one, templates expect the object."""
    if isinstance(call.get("function"), dict):
        return {**call, "function": _tool_call(call["function"], f"{where}.function")}
    name, arguments = call.get("name"), _parsed(call.get("arguments", {}), f"{where}.arguments")
    if not isinstance(name, str) or not name:
        raise UserError(f"found {describe(name)}, expected text", where=f"{where}.name", fix="name the function that is called")
    if not isinstance(arguments, dict):
        raise UserError(f"found {describe(arguments)}, expected an object", where=f"{where}.arguments", fix='write {"name": value}')
    return {**call, "arguments": arguments}


def _tools(tools: object) -> list[dict[Any, Any]] | None:
    found = _parsed(tools, "tools")
    if found is None or found == []:
        return None
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        what = f"found {describe(found)}, expected a list of JSON schemas"
        raise UserError(what, where="tools", fix="write a list of objects, or its JSON")
    return found
