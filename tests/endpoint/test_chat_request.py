"""Requests in OpenAI's format: what is read, and what is refused, by name."""

import json
from typing import Any

import pytest

from verl.endpoint.request import RefusedError, Terms, read_request

TERMS = Terms("policy", 0.7)
BODY: dict[str, Any] = {"model": "policy", "messages": [{"role": "user", "content": "Hi."}]}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


def test_what_changes_no_answer_is_taken() -> None:
    neutral: dict[str, Any] = {
        "n": 1, "top_p": 1.0, "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "logprobs": False, "user": "me",
        "parallel_tool_calls": True, "response_format": {"type": "text"}, "store": False, "metadata": {"a": "b"}, "tool_choice": "auto",
        "temperature": 0.7, "seed": None, "stop": None, "tools": None, "stream": False,
    }  # fmt: skip
    found = read_request({**BODY, **neutral}, TERMS)
    assert (found.messages, found.temperature, found.tools, found.max_tokens, found.stop) == (BODY["messages"], 0.7, None, None, ())


def test_contents_of_parts_and_empty_keys_become_plain_messages() -> None:
    parts = [{"type": "text", "text": "Hi"}, {"type": "text", "text": " there."}]
    echo: dict[str, Any] = {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "tool_calls": [],
    }
    found = read_request({**BODY, "messages": [{"role": "user", "content": parts}, echo, BODY["messages"][0]]}, TERMS)
    assert found.messages == [{"role": "user", "content": "Hi there."}, {"role": "assistant", "content": ""}, BODY["messages"][0]]


def test_the_smaller_limit_of_tokens_counts() -> None:
    assert read_request({**BODY, "max_tokens": 9, "max_completion_tokens": 5}, TERMS).max_tokens == 5


def test_a_validation_may_name_any_temperature() -> None:
    terms = Terms("policy", 0.0, is_fixed=False)
    assert read_request(BODY, terms).temperature == 0.0
    assert read_request({**BODY, "temperature": 0.3}, terms).temperature == 0.3


@pytest.mark.parametrize(
    ("change", "param", "said"),
    [
        ({"temperature": 1.0}, "temperature", "is not that of the run, 0.7"),
        ({"temperature": "hot"}, "temperature", "a number from 0 to 2"),
        ({"n": 2}, "n", "n=2 is not supported"),
        ({"n": True}, "n", "n=true is not supported"),
        ({"top_p": 0.9}, "top_p", "leave it out, or give 1"),
        ({"seed": 3}, "seed", "does not know 'seed'"),
        ({"logprobs": True}, "logprobs", "is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "is not supported"),
        ({"tools": [TOOL], "tool_choice": "required"}, "tool_choice", "the model says what it samples"),
        ({"tools": [TOOL], "tool_choice": "none"}, "tool_choice", "is not supported"),
        ({"tools": [{"name": "add"}]}, "tools", "is no list of"),
        ({"functions": [{"name": "add"}]}, "functions", "does not know 'functions'"),
        ({"reasoning_effort": "low"}, "reasoning_effort", "does not know"),
        ({"max_tokens": 0}, "max_tokens", "a whole number from 1"),
        ({"stop": [""]}, "stop", "a text, or a list"),
        ({"stop": list("abcde")}, "stop", "up to 4"),
        ({"stream": "yes"}, "stream", "true or false"),
        ({"stream_options": {"chunks": 3}}, "stream_options", "unknown option 'chunks'"),
        ({"model": "gpt-5"}, "model", "OPENAI_MODEL"),
        ({"messages": []}, "messages", "no list of messages"),
        ({"messages": [{"content": "Hi."}]}, "messages[0]", "an object with a role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", "is no text"),
        ({"messages": [{"role": "user", "content": "Hi.", "mood": "good"}]}, "messages[0].mood", "does not know 'mood'"),
        ({"messages": [*BODY["messages"], {"role": "assistant", "content": "Yes"}]}, "messages", "has not sampled"),
    ],
)
def test_what_cannot_be_done_is_refused_and_not_left_out(change: dict[str, Any], param: str, said: str) -> None:
    with pytest.raises(RefusedError) as caught:
        read_request({**BODY, **change}, TERMS)
    error = caught.value.body()["error"]
    assert said in error["message"] and error["param"] == param and error["type"] == "invalid_request_error"


LONE = "Hi \ud800."
SAID: dict[str, Any] = {"role": "user", "content": "Hi."}


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": [{**SAID, "content": LONE}]}, "messages[0].content"),
        ({"messages": [{**SAID, "content": [{"type": "text", "text": LONE}]}]}, "messages[0].content[0].text"),
        ({"messages": [SAID, {**SAID, "name": LONE}]}, "messages[1].name"),
        ({"messages": [{**SAID, LONE: "x"}]}, "messages[0]"),
        ({"messages": [{**SAID, "role": LONE}]}, "messages[0].role"),
        ({"tools": [{**TOOL, "function": {"name": "add", "description": LONE}}]}, "tools[0].function.description"),
        ({"stop": LONE}, "stop"),
        ({"stop": ["a", LONE]}, "stop[1]"),
        ({LONE: 1}, None),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": '{"a": "\\ud800"}'}}]}, SAID]},
            "messages[0].tool_calls[0].function.arguments.a",
        ),
    ],
)
def test_a_text_that_no_utf_8_has_is_refused(change: dict[str, Any], param: str | None) -> None:
    with pytest.raises(RefusedError, match=r"cannot be encoded as UTF-8: its character [03] is a lone surrogate") as caught:
        read_request({**BODY, **change}, TERMS)
    assert (caught.value.param, caught.value.status) == (param, 400)
    json.dumps(caught.value.body(), ensure_ascii=False).encode()


@pytest.mark.parametrize("calls", [3, "add", [None], [{"type": "function"}]])
def test_calls_that_are_none_are_refused(calls: object) -> None:
    with pytest.raises(RefusedError, match="tool_calls is no list"):
        read_request({**BODY, "messages": [{"role": "assistant", "tool_calls": calls}, SAID]}, TERMS)


def test_a_body_that_is_no_object_is_refused() -> None:
    with pytest.raises(RefusedError, match="no JSON object"):
        read_request([BODY], TERMS)
