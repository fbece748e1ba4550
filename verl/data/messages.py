"""The forms of a message that data sets have, brought into one form: a role, a text, and the calls of tools.

A message is {"role": …, "content": …}, or ShareGPT's {"from": …, "value": …}. A content may be a list of text parts. Calls of tools are
those of OpenAI, also the older `function_call`, and those of ShareGPT. Marks such as `weight` say whether a turn is trained. All other
keys are kept for the chat template.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from verl.data.row import MARKS, describe, number_text
from verl.errors import UserError

Message = dict[str, Any]

# Other names of the roles that chat templates know. Any other role is left to the template.
ROLES = {
    **dict.fromkeys(("human",), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "model", "ai"), "assistant"),
    **dict.fromkeys(("function", "observation", "function_response", "tool_response"), "tool"),
    **{name: name for name in ("system", "user", "assistant", "tool", "developer")},
}
ROLE = re.compile(r"[\w.-]+")  # no brackets, so that a role cannot be a control token
CALLS = ("function_call", "tool_call")  # ShareGPT's roles of a call, whose value is JSON
UNCLEAR_MARKS = ("mask", "train_detail", "training_detail")
LIKE_A_MARK = re.compile(r"(?:.*_)?(?:loss|train|trained|trainable|training|masks?|masked|weight)(?:_.*)?")  # a key such as loss_scale
TEXT_PARTS = ("text", "input_text", "output_text")
THOUGHT_PARTS = ("thinking", "reasoning")
PART_TEXTS = ("text", "thinking", "summary")  # keys of a part's text
EXAMPLE = 'write [{"role": "user", "content": …}, …]'
RESERVED = {"messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token"}


def read_messages(value: object) -> tuple[list[Message], frozenset[int], tuple[str, ...]]:
    """Read the messages of a chat.

    Args:
        value: a list of messages, or its JSON.
    Returns:
        the messages; the indices of the assistant's messages that are marked as not trained; and what the report says about the chat.
    Raises:
        UserError: a message is invalid.
    """
    found = _parsed(value, "messages")
    if not isinstance(found, list) or not found:
        what = "an empty list" if found == [] else describe(found)
        raise UserError(f"found {what}, expected a list of messages", where="messages", fix=EXAMPLE)
    messages = [_message(message, f"messages[{number}]") for number, message in enumerate(found)]
    marks = [_take_marks(message, f"messages[{number}]") for number, message in enumerate(messages)]
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    notes = [f"role {m['role']!r}, which is given to the chat template as it is" for m in messages if m["role"] not in ROLES.values()]
    if any(mark and number not in answers for number, mark in enumerate(marks)):
        notes.append("a mark asks to train a message that is not the assistant's, which is never trained")
    if any(number_text(message.get("content", message.get("value"))) is not None for message in found):
        notes.append("numbers in messages taken as text")
    untrained = frozenset(number for number in answers if marks[number] is False)
    if untrained:
        notes.append("assistant turns are context because their mark says so (weight, train, loss, …)")
    return messages, untrained, tuple(dict.fromkeys(notes))


def read_tools(value: object) -> list[dict[Any, Any]] | None:
    """Read the schemas of tools, a list or its JSON. Raises UserError if they are something else."""
    found = _parsed(value, "tools")
    if found is None or found == []:
        return None
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        what = f"found {describe(found)}, expected a list of JSON schemas"
        raise UserError(what, where="tools", fix="write a list of objects, or its JSON")
    return found


def read_template_kwargs(value: object) -> dict[str, Any]:
    """Read the variables of a chat template, a mapping or its JSON. Raises UserError if they are something else."""
    found = _parsed(value, "chat_template_kwargs")
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(name, str) and name.isidentifier() for name in found):
        fix = 'write an object, such as {"enable_thinking": false}'
        raise UserError(f"found {describe(found)}, expected names with values", where="chat_template_kwargs", fix=fix)
    if reserved := RESERVED & found.keys():
        what = f"{sorted(reserved)[0]!r} is set by verl"
        raise UserError(what, where="chat_template_kwargs", fix="remove it")
    return {name: item for name, item in found.items() if item is not None}


def _parsed(value: object, where: str) -> object:
    if not isinstance(value, str):
        return value
    from verl.data.formats.json import json_in_text  # most rows have lists, not JSON text

    found: object = json_in_text(value, where)
    if found is None and value.strip() != "null":
        raise UserError("found text that is not JSON", where=where, fix="write it as JSON")
    return found


def _message(message: object, where: str) -> Message:
    if not isinstance(message, dict):
        raise UserError(f"found {describe(message)}, expected an object", where=where, fix='write {"role": …, "content": …}')
    present = {key: value for key, value in message.items() if value is not None}
    if "role" not in present and {"from", "value"} <= present.keys():
        present = _from_sharegpt(present, where)
    present["role"] = _role(present, where)
    if present["role"] == "assistant":
        present = _with_calls(present, where)
    elif present.pop("tool_calls", None) or present.pop("function_call", None):
        raise UserError("only the assistant calls tools", where=where, fix="correct the role, or remove the calls")
    if isinstance(present.get("content"), list):
        present = _with_joined_parts(present, f"{where}.content")
    if (text := number_text(present.get("content"))) is not None:
        present["content"] = text
    _check_content(present, f"{where}.content")
    return {"content": "", **present} if present.get("refusal") else present


def _from_sharegpt(message: Message, where: str) -> Message:
    speaker, value = message["from"], message["value"]
    rest = {key: item for key, item in message.items() if key not in ("from", "value")}
    if speaker not in CALLS:
        return {"role": speaker, "content": value, **rest}
    calls = _parsed(value, f"{where}.value")
    return {"role": "assistant", "tool_calls": calls if isinstance(calls, list) else [calls], **rest}


def _role(message: Message, where: str) -> str:
    role = message.get("role")
    if isinstance(role, str) and ROLE.fullmatch(role):
        return ROLES.get(role) or ROLES.get(role.lower(), role)
    if role is None:
        found = f"key 'role' is missing (found: {', '.join(map(str, message)) or 'no keys'})"
        raise UserError(found, where=where, fix='write {"role": …, "content": …}, or {"from": …, "value": …}')
    raise UserError(f"unknown role: {describe(role)}", where=f"{where}.role", fix="one of system, user, assistant, tool")


def _check_content(message: Message, where: str) -> None:
    content, is_answer = message.get("content"), message["role"] == "assistant"
    if isinstance(content, dict):
        raise UserError(f"found {describe(content)}, expected text", where=where, fix='write it as a list of parts: [{"type": "text", …}]')
    if content is not None and not isinstance(content, str):
        raise UserError(f"found {describe(content)}, expected text", where=where, fix="write it as a quoted string")
    if is_answer and (message.get("tool_calls") or message.get("refusal")):
        return
    if content is None:
        found = f" (found: {', '.join(map(str, message))})" if "content" not in message else ""
        raise UserError(f"is missing or null{found}", where=where, fix="fill it in, or remove the row")
    if is_answer and not content.strip():
        raise UserError("the assistant's text is empty", where=where, fix="fill it in, or remove the row")


# Marks


def _take_marks(message: Message, where: str) -> bool | None:
    """Remove the marks from a message. Return whether they ask to train it; None if it has none.

    Raises:
        UserError: a mark is neither 0 nor 1, its meaning is not known, or two marks disagree.
    """
    for name in UNCLEAR_MARKS:
        if name in message:
            fix = 'write "weight": 0 for a turn that is context, and 1 for a turn that is trained'
            raise UserError("it is not clear which part is to be trained", where=f"{where}.{name}", fix=fix)
    unknown = [name for name in message if name not in MARKS and LIKE_A_MARK.fullmatch(str(name))]
    for name in unknown if message["role"] == "assistant" else ():
        if isinstance(message[name], (bool, int, float)):
            fix = 'write "weight": 0 for a turn that is context, and 1 for a turn that is trained, or remove the key'
            raise UserError("an unknown mark; it is not clear whether the turn is to be trained", where=f"{where}.{name}", fix=fix)
    wanted = {_is_trained(name, message.pop(name), where) for name in MARKS if name in message}
    if len(wanted) > 1:
        raise UserError("the marks of the message disagree", where=where, fix="keep one of them")
    return next(iter(wanted), None)


def _is_trained(name: str, value: object, where: str) -> bool:
    if not isinstance(value, (bool, int, float)) or value not in (0, 1):
        what = f"found {describe(value)}, expected 0 or 1, false or true"
        raise UserError(what, where=f"{where}.{name}", fix="a turn is trained or it is context; other weights are not supported")
    return bool(value) is MARKS[name]


# Parts of a content


def _with_joined_parts(message: Message, where: str) -> Message:
    """Return the message with its text parts joined, and with its thoughts as `reasoning_content`."""
    joined = {**message, "content": ""}
    for number, part in enumerate(message["content"]):
        key, text = _part(part, f"{where}[{number}]")
        if not isinstance(joined.get(key, ""), str):
            raise UserError(f"the message has {key!r} too: {describe(joined[key])}", where=where, fix="keep one of them")
        joined[key] = joined.get(key, "") + text
    return joined


def _part(part: object, where: str) -> tuple[str, str]:
    """Return the key of a message that a part belongs to, and the part's text."""
    if isinstance(part, str):
        return "content", part
    kind = part.get("type", "text") if isinstance(part, dict) else None
    if not isinstance(part, dict) or not isinstance(kind, str):
        raise UserError(f"found {describe(part)}, expected a part of text", where=where, fix='write {"type": "text", "text": …}')
    key = "content" if kind in TEXT_PARTS else "reasoning_content" if kind in THOUGHT_PARTS else "refusal" if kind == "refusal" else None
    if key is None:
        raise UserError(f"found a part of type {kind!r}; only text is trained", where=where, fix="remove the row")
    text = part.get("text") if kind in TEXT_PARTS or part.get(kind) is None else part[kind]
    if not isinstance(text, str):
        raise UserError(f"found {describe(text)}, expected text", where=f"{where}.text", fix="write it as a quoted string")
    return key, text


# Calls of tools


def _with_calls(message: Message, where: str) -> Message:
    """Return the assistant's message with its calls in `tool_calls`; an empty list of calls is removed."""
    if "function_call" in message:
        if message.get("tool_calls"):
            raise UserError("function_call and tool_calls are both set", where=where, fix="keep tool_calls")
        rest = {key: value for key, value in message.items() if key != "function_call"}
        message = {**rest, "tool_calls": [{"type": "function", "function": message["function_call"]}]}
    if "tool_calls" not in message:
        return message
    calls = _tool_calls(message["tool_calls"], f"{where}.tool_calls")
    return {**message, "tool_calls": calls} if calls else {key: value for key, value in message.items() if key != "tool_calls"}


def _tool_calls(calls: object, where: str) -> list[dict[str, Any]]:
    calls = _parsed(calls, where)
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise UserError(f"found {describe(calls)}, expected a list of objects", where=where, fix='write [{"name": …, "arguments": …}]')
    return [_tool_call(call, f"{where}[{number}]") for number, call in enumerate(calls)]


def _tool_call(call: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the call with its arguments as an object: some formats write them as JSON text, but templates expect an object."""
    if "function" in call:
        if not isinstance(call["function"], dict):
            found = f"found {describe(call['function'])}, expected an object"
            raise UserError(found, where=f"{where}.function", fix='write {"name": …, "arguments": …}')
        return {**call, "function": _tool_call(call["function"], f"{where}.function")}
    name, arguments = call.get("name"), _parsed(call.get("arguments", {}) or {}, f"{where}.arguments")
    if not isinstance(name, str) or not name:
        raise UserError(f"found {describe(name)}, expected text", where=f"{where}.name", fix="give the name of the function")
    if not isinstance(arguments, dict):
        raise UserError(f"found {describe(arguments)}, expected an object", where=f"{where}.arguments", fix='write {"name": value}')
    return {**call, "arguments": arguments}


def with_arguments_as_text(messages: list[Message]) -> list[Message]:
    """Return the messages with the arguments of calls as JSON text, and null for a content that is missing, as OpenAI's API has them."""
    return [
        {"content": None, **message, "tool_calls": [_with_text_arguments(call) for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for message in messages
    ]


def _with_text_arguments(call: dict[str, Any]) -> dict[str, Any]:
    if "function" in call:
        return {"type": "function", **call, "function": _with_text_arguments(call["function"])}
    return {**call, "arguments": json.dumps(call["arguments"], ensure_ascii=False)}


# What the assistant says

THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")  # transformers treats them as one
SPOKEN_KEYS = (*THOUGHT_KEYS, "refusal", "audio")
# Other names of a thought, such as `thoughts`, `cot`, `reasoning_details` and `thinking_blocks`. Chat templates rarely print them.
LIKE_A_THOUGHT = re.compile(
    r"(?:\w+_)?(?:reasoning|thinking|thoughts?|cot|chain_of_thoughts?|rationales?|scratchpad)"
    r"(?:_(?:content|text|details|process|trace|steps|summary|blocks))?",
    re.IGNORECASE,
)
LINKS = ("role", "content", "tool_calls", "tool_call_id", "id")  # keys that hold nothing else that is said
INLINE_THOUGHT = re.compile(r"\s*(?:<think>)?(.*?)</think>(.*)", re.DOTALL)


def split_thought(content: str) -> tuple[str, str]:
    """Split a content into its thought, which ends with `</think>`, and the rest. The thought is empty if there is none."""
    found = INLINE_THOUGHT.fullmatch(content) if "</think>" in content else None
    return (found[1], found[2]) if found else ("", content)


def thought_of(message: Message) -> str:
    """Return the assistant's thought, from its own key or from the content."""
    return next((str(message[key]) for key in THOUGHT_KEYS if message.get(key)), "") or split_thought(message.get("content") or "")[0]


def texts_of(message: Message) -> Iterator[tuple[str, str]]:
    """Yield each text that the assistant says outside its calls, with its key. An inline thought has the key `<think>`."""
    thought, content = split_thought(message.get("content") or "")
    yield "<think>", thought
    said = ["".join(thought.split())]  # some servers give one thought under several names
    for key in spoken_keys(message):
        text = _said(message[key])
        if "".join(text.split()) not in said:
            yield key, text
        said.append("".join(text.split()))
    yield "content", content


def spoken_keys(message: Message) -> list[str]:
    """Return the keys besides the content that hold a text of the assistant, thoughts first."""
    others = [key for key in message if key not in SPOKEN_KEYS and LIKE_A_THOUGHT.fullmatch(str(key))]
    return [key for key in (*THOUGHT_KEYS, *others, *SPOKEN_KEYS[len(THOUGHT_KEYS) :]) if message.get(key) and message[key] is not True]


def _said(value: object) -> str:
    """Return the text of a value: of a list of parts, as servers write thoughts, that of the parts together."""
    texts = [_part_text(part) for part in (value if isinstance(value, list) else [value])]
    known = [text for text in texts if text is not None]
    return "".join(known) if len(known) == len(texts) else repr(value)


def _part_text(part: object) -> str | None:
    """Return the text of a part, itself or under one of PART_TEXTS; None if it has none."""
    found = [part, *(part.get(key) for key in PART_TEXTS)] if isinstance(part, dict) else [part]
    return next((text for text in found if isinstance(text, str)), None)
