"""Calls of tools in what a model has said, as its chat template writes them.

Qwen, Hermes          <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>
Qwen3-Coder, Qwen3.5  <tool_call><function=add><parameter=a>1</parameter></function></tool_call>
Llama 3               {"name": "add", "parameters": {"a": 1}}, and nothing else
"""

import json
import re
from typing import Any

from verl.data.chat import Message

OPEN, CLOSE = "<tool_call>", "</tool_call>"
THOUGHT_END = "</think>"
FUNCTION = re.compile(r"\s*<function=([^>\n]+)>(.*)</function>\s*", re.DOTALL)
PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)


class _WrongCallError(ValueError):
    """A call that cannot be read."""


def read_turn(text: str, template: str, turn: int) -> Message:
    """Return a turn of the model as a message of the chat. A call that cannot be read is told in its `parse_error`, and never raised.

    Args:
        text: the turn, without its stop token.
        template: the chat template, by which the form of a call is known. Of one with another form, a turn is only text.
        turn: number of the turn in the episode, for the names of its calls.
    """
    message: Message = {"role": "assistant", "content": text}
    try:
        before, calls = _calls(text, template)
    except _WrongCallError as error:
        return {**message, "parse_error": str(error)}
    if not calls:
        return message
    named = [{"id": f"call_{turn}_{place}", "type": "function", "function": call} for place, call in enumerate(calls)]
    return {**message, "content": before, "tool_calls": named}


def _calls(text: str, template: str) -> tuple[str, list[dict[str, Any]]]:
    """Return the text before the calls, and the calls."""
    if OPEN in template:
        return _between_tags(text)
    if '"parameters"' in template and "<|eot_id|>" in template:
        return _whole(text)
    return text, []


def _between_tags(text: str) -> tuple[str, list[dict[str, Any]]]:
    thought = text.rfind(THOUGHT_END)
    begin = text.find(OPEN, 0 if thought < 0 else thought)
    if begin < 0:
        return text, []
    calls, rest = [], text[begin:]
    while rest.startswith(OPEN):
        inside, is_closed, rest = rest.removeprefix(OPEN).partition(CLOSE)
        if not is_closed:
            raise _WrongCallError(f"{OPEN} without {CLOSE}")
        calls.append(_xml_call(inside) if FUNCTION.fullmatch(inside) else _json_call(inside, "arguments"))
        rest = rest.lstrip()
    if rest:
        raise _WrongCallError(f"text after {CLOSE}")
    return text[:begin].rstrip(), calls


def _whole(text: str) -> tuple[str, list[dict[str, Any]]]:
    inside = text.strip().removeprefix("<|python_tag|>")
    if not re.match(r'\{\s*"(name|type)"', inside):
        return text, []
    return "", [_json_call(inside, "parameters")]


def _json_call(text: str, arguments: str) -> dict[str, Any]:
    try:
        call = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise _WrongCallError(f"the call is not JSON: {error}") from error
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise _WrongCallError(f'the call has no "name": write {{"name": …, "{arguments}": {{…}}}}')
    given = call.get(arguments, {})
    if isinstance(given, str):  # some models quote them
        try:
            given = json.loads(given, parse_constant=_refuse)
        except (ValueError, RecursionError) as error:
            raise _WrongCallError(f"{arguments} is not JSON: {error}") from error
    if not isinstance(given, dict):
        raise _WrongCallError(f"{arguments} is no object")
    return {"name": call["name"], "arguments": given}


def _xml_call(text: str) -> dict[str, Any]:
    found = FUNCTION.fullmatch(text)
    assert found is not None
    return {"name": found[1].strip(), "arguments": {name.strip(): _value(value) for name, value in PARAMETER.findall(found[2])}}


def _value(text: str) -> Any:
    """Return a parameter as JSON says it; else as text. The template writes texts without quotes."""
    try:
        found = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):  # of which _WrongCallError is one
        return text
    return text if isinstance(found, str) else found


def _refuse(constant: str) -> Any:
    raise _WrongCallError(f"{constant} is not JSON")
