"""Validation of chats: messages with a role and a content, and the tools that the assistant may call."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from verl.data.row import describe
from verl.errors import UserError

Message = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")
OTHER_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant", "developer": "system", "function": "tool"}


@dataclass(frozen=True)
class Chat:
    """A valid chat, in the form that chat templates expect.

    Attributes:
        messages: messages without null keys; the arguments of tool calls are objects.
        tools: JSON schemas of the tools, or None.
    """

    messages: list[Message]
    tools: list[dict[Any, Any]] | None = None

    def answers(self) -> Iterator[tuple[int, Message]]:
        """Yield the assistant's messages with their indices."""
        return ((number, message) for number, message in enumerate(self.messages) if message["role"] == "assistant")

    def up_to(self, number: int) -> "Chat":
        """Return the chat up to, but without, message `number`."""
        return Chat(self.messages[:number], self.tools)


def checked(messages: object, tools: object = None) -> Chat:
    """Validate a chat of the data.

    Args:
        messages: a list of messages, or its JSON.
        tools: None, a list of JSON schemas, or its JSON.
    Raises:
        UserError: a message or a tool is invalid; the error names it.
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
    """Split a chat into the messages to answer and the text of the assistant's last message, if the data has one.

    Only the last messages are validated.

    Args:
        messages: a list of messages, or its JSON.
        where: location of the row, for errors.
    Raises:
        UserError: the chat has no message to answer.
    """
    try:
        found: Any = json.loads(messages) if isinstance(messages, str) else messages
    except (ValueError, RecursionError) as error:
        raise UserError(f"found text that is not JSON: {error}", where=where, fix="write the chat as JSON") from None
    answer = None
    if isinstance(found, list) and found and isinstance(found[-1], dict) and found[-1].get("role") == "assistant":
        *found, said = found
        answer = said.get("content")
    last = found[-1] if isinstance(found, list) and found else None
    if not isinstance(last, dict) or not isinstance(last.get("content"), str):
        raise UserError("the chat has no message to answer", where=where, fix="end it with a user message")
    return list(found), answer


def _parsed(value: object, where: str) -> object:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise UserError(f"found text that is not JSON: {error}", where=where, fix="write it as JSON") from None


def _message(message: object, number: int) -> Message:
    where = f"messages[{number}]"
    role = _role(message, where)
    assert isinstance(message, dict)
    if role == "system" and number:
        raise UserError(
            "the system message is not the first message", where=where, fix="move it to the beginning, or merge it with the first"
        )
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
        fix = "rename 'from' to 'role' and 'value' to 'content'" if {"from", "value"} <= set(message) else fix
        raise UserError(f"key 'role' is missing (found: {', '.join(map(str, message)) or 'no keys'})", where=where, fix=fix)
    meant = OTHER_ROLES.get(role) if isinstance(role, str) else None
    raise UserError(f"unknown role: {describe(role)}", where=f"{where}.role", fix=f"write {meant!r}" if meant else fix)


def _check_content(message: Message, where: str) -> None:
    content, is_answer = message.get("content"), message["role"] == "assistant"
    if content is not None and not isinstance(content, str):
        raise UserError(f"found {describe(content)}, expected text", where=where, fix="write it as a quoted string")
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
    """Return the call with its arguments as an object: some formats write them as JSON text, but templates expect an object."""
    if isinstance(call.get("function"), dict):
        return {**call, "function": _tool_call(call["function"], f"{where}.function")}
    name, arguments = call.get("name"), _parsed(call.get("arguments", {}), f"{where}.arguments")
    if not isinstance(name, str) or not name:
        raise UserError(f"found {describe(name)}, expected text", where=f"{where}.name", fix="give the name of the function")
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
