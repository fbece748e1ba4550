"""A request for a chat completion, in OpenAI's format: what the endpoint can do, and what it refuses.

Whatever would change the answer and cannot be done is refused in the format of that API, and never left out in silence.
"""

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]

# Values that change nothing, by parameter. Any other value is refused. `null` is the same as no value.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "top_p": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "parallel_tool_calls": (True,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "store": (False,),
}
# They change no answer.
FREE = ("user", "metadata", "safety_identifier", "prompt_cache_key")
READ = (
    "model",
    "messages",
    "tools",
    "tool_choice",
    "temperature",
    "max_tokens",
    "max_completion_tokens",
    "stop",
    "stream",
    "stream_options",
)
MESSAGE_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content")
MOST_STOPS = 4
LONE = re.compile("[\ud800-\udfff]")  # half of a pair, which no text of UTF-8 has


class RefusedError(Exception):
    """A request that is answered with an error.

    Attributes:
        status: HTTP status.
        param: the parameter that is to blame.
        code: OpenAI's code of the error, such as "context_length_exceeded".
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400):
        super().__init__(message)
        self.message, self.param, self.code, self.status = message, param, code, status

    def body(self) -> dict[str, Any]:
        """Return the error as OpenAI's API writes it."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Terms:
    """What an endpoint samples by.

    Attributes:
        model: name of the model.
        temperature: of a request that names none.
        is_fixed: whether a request must not name another temperature, because its tokens are trained.
    """

    model: str
    temperature: float
    is_fixed: bool = True


@dataclass(frozen=True)
class ChatRequest:
    """A request that can be answered.

    Attributes:
        messages: without keys that hold nothing; each content is a text.
        tools: their JSON schemas, or None.
        max_tokens: maximum tokens of the answer; None: as many as there is room for.
        stop: texts at which the answer ends.
        stream: whether the answer is sent as events.
        with_usage: whether the last event has the number of tokens.
    """

    messages: list[Message]
    temperature: float
    tools: list[dict[str, Any]] | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stream: bool = False
    with_usage: bool = False
    tools_key: str = field(default="null")


def read_request(body: object, terms: Terms) -> ChatRequest:
    """Read the JSON body of a request. Raises RefusedError: it is invalid, or asks for what the endpoint cannot do."""
    if not isinstance(body, dict):
        raise RefusedError("the body is no JSON object")
    check_texts(body)
    given = {key: value for key, value in body.items() if value is not None}
    if given.get("model") != terms.model:
        what = f"there is no model {given.get('model')!r}; the model is {terms.model!r}, as the environment variable OPENAI_MODEL says"
        raise RefusedError(what, param="model", code="model_not_found", status=404)
    tools = _tools(given)
    _check_others(given, tools)
    options = _object(given, "stream_options")
    if unknown := options.keys() - {"include_usage"}:
        raise RefusedError(f"unknown option {sorted(unknown)[0]!r}", param="stream_options")
    return ChatRequest(
        _messages(given),
        _temperature(given, terms),
        tools,
        _max_tokens(given),
        _stop(given),
        _flag(given, "stream"),
        _flag(options, "include_usage"),
        json.dumps(tools, sort_keys=True),
    )


def check_texts(value: object, where: str | None = None) -> None:
    """Check the texts in a JSON value, names of keys too. Raises RefusedError: one cannot be encoded as UTF-8, so no tokenizer reads it."""
    waiting = [(where, value)]
    while waiting:
        where, value = waiting.pop()
        names: list[str] = [value] if isinstance(value, str) else list(value) if isinstance(value, dict) else []
        if lone := next(filter(None, map(LONE.search, names)), None):
            what = f"a text cannot be encoded as UTF-8: its character {lone.start()} is a lone surrogate, {lone[0]!a}"
            raise RefusedError(what, param=where)
        if isinstance(value, dict):
            waiting += [(key if where is None else f"{where}.{key}", item) for key, item in value.items()]
        elif isinstance(value, list):
            waiting += [(f"{where or ''}[{number}]", item) for number, item in enumerate(value)]


def _check_others(given: Mapping[str, Any], tools: object) -> None:
    for key, value in given.items():
        if key in (*READ, *FREE):
            continue
        if key not in NEUTRAL:
            raise RefusedError(f"the endpoint does not know {key!r}, and does not leave it out in silence", param=key)
        if not any(value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in NEUTRAL[key]):
            allowed = " or ".join(json.dumps(neutral) for neutral in NEUTRAL[key])
            raise RefusedError(f"{key}={json.dumps(value)} is not supported; leave it out, or give {allowed}", param=key)
    choice = given.get("tool_choice", "auto")
    if choice != "auto" and not (choice == "none" and tools is None):
        what = f"tool_choice={json.dumps(choice)} is not supported: the model says what it samples; leave it out, or give 'auto'"
        raise RefusedError(what, param="tool_choice")


def _messages(given: Mapping[str, Any]) -> list[Message]:
    messages = given.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RefusedError("messages is no list of messages", param="messages")
    found = [_message(message, f"messages[{number}]") for number, message in enumerate(messages)]
    if found[-1]["role"] == "assistant":
        what = "the last message is the assistant's: the endpoint does not go on with a message that it has not sampled"
        raise RefusedError(what, param="messages")
    return found


def _message(message: object, where: str) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise RefusedError("a message is an object with a role", param=where)
    found = {key: value for key, value in message.items() if value not in (None, [], {})}
    for key in found:
        if key not in MESSAGE_KEYS:
            raise RefusedError(f"the endpoint does not know {key!r} in a message", param=f"{where}.{key}")
    content = found.get("content", "")
    if isinstance(content, list):
        for part in content:
            if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
                raise RefusedError("a part of a content is no text", param=f"{where}.content")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise RefusedError("a content is a text, or a list of texts", param=f"{where}.content")
    _check_calls(found.get("tool_calls", []), f"{where}.tool_calls")
    return {**found, "content": content}


def _check_calls(calls: object, where: str) -> None:
    """Check the calls of a message, and the texts that their arguments are the JSON of. Raises RefusedError: one is invalid."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) and isinstance(call.get("function"), dict) for call in calls):
        raise RefusedError('tool_calls is no list of {"type": "function", "function": …}', param=where)
    for number, call in enumerate(calls):
        arguments = call["function"].get("arguments")
        if isinstance(arguments, str):
            with suppress(ValueError, RecursionError):  # what is no JSON is a text
                arguments = json.loads(arguments)
        check_texts(arguments, f"{where}[{number}].function.arguments")


def _tools(given: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    tools = given.get("tools")
    if tools in (None, []):
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) and tool.get("type") == "function" for tool in tools):
        raise RefusedError('tools is no list of {"type": "function", "function": …}', param="tools")
    return tools


def _temperature(given: Mapping[str, Any], terms: Terms) -> float:
    if "temperature" not in given:
        return terms.temperature
    value = given["temperature"]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 2:
        raise RefusedError("temperature is a number from 0 to 2", param="temperature")
    if terms.is_fixed and float(value) != terms.temperature:
        what = (
            f"temperature={value} is not that of the run, {terms.temperature:g}, at which log-probabilities are trained "
            "(rollout.temperature); leave it out"
        )
        raise RefusedError(what, param="temperature")
    return float(value)


def _max_tokens(given: Mapping[str, Any]) -> int | None:
    limits = []
    for key in ("max_tokens", "max_completion_tokens"):
        if key in given:
            value = given[key]
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise RefusedError(f"{key} is a whole number from 1", param=key)
            limits.append(value)
    return min(limits, default=None)


def _stop(given: Mapping[str, Any]) -> tuple[str, ...]:
    stop = given.get("stop", [])
    found = [stop] if isinstance(stop, str) else stop
    if not isinstance(found, list) or len(found) > MOST_STOPS or not all(isinstance(text, str) and text for text in found):
        raise RefusedError(f"stop is a text, or a list of up to {MOST_STOPS} texts", param="stop")
    return tuple(found)


def _flag(given: Mapping[str, Any], key: str) -> bool:
    value = given.get(key, False)
    if not isinstance(value, bool):
        raise RefusedError(f"{key} is true or false", param=key)
    return value


def _object(given: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = given.get(key, {})
    if not isinstance(value, dict):
        raise RefusedError(f"{key} is an object", param=key)
    return value
