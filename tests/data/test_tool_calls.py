"""Calls of tools in what a model says, in the forms of chat templates."""

import json

import pytest
from families import llama3, qwen3

from verl.data.render import Renderer
from verl.data.tool_calls import read_turn

QWEN, LLAMA = "<tool_call>", '<|eot_id|> "parameters"'
CALL = {"name": "add", "arguments": {"a": 1, "b": [2, "x"]}}
WRITTEN = json.dumps(CALL)


def calls_of(text: str, template: str = QWEN) -> list[dict[str, object]]:
    message = read_turn(text, template, 3)
    assert "parse_error" not in message, message
    return [call["function"] for call in message.get("tool_calls", [])]


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (f"<tool_call>\n{WRITTEN}\n</tool_call>", ""),
        (f"I add.\n<tool_call>\n{WRITTEN}\n</tool_call>\n", "I add."),
        (f"<think>\nA <tool_call>?\n</think>\nI add.<tool_call>{WRITTEN}</tool_call>", "<think>\nA <tool_call>?\n</think>\nI add."),
    ],
)
def test_a_call_is_read_with_the_text_before_it(text: str, content: str) -> None:
    message = read_turn(text, QWEN, 3)
    assert message == {
        "role": "assistant",
        "content": content,
        "tool_calls": [{"id": "call_3_0", "type": "function", "function": CALL}],
    }


def test_several_calls_and_other_spellings_are_read() -> None:
    assert calls_of(f"<tool_call>{WRITTEN}</tool_call>\n<tool_call>{WRITTEN}</tool_call>") == [CALL, CALL]
    assert calls_of('<tool_call>{"name": "now"}</tool_call>') == [{"name": "now", "arguments": {}}]
    assert calls_of('<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>') == [{"name": "add", "arguments": {"a": 1}}]
    xml = (
        '<tool_call>\n<function=look_up>\n<parameter=place>\nthe "Röme"\n</parameter>\n'
        "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>"
    )
    assert calls_of(xml) == [{"name": "look_up", "arguments": {"place": 'the "Röme"', "days": 3}}]
    assert calls_of('{"name": "add", "parameters": {"a": 1}}', LLAMA) == [{"name": "add", "arguments": {"a": 1}}]


@pytest.mark.parametrize(
    ("text", "template"), [("plain", QWEN), (WRITTEN, QWEN), (f"<tool_call>{WRITTEN}</tool_call>", "no calls"), ("3 {x}", LLAMA)]
)
def test_other_text_is_text(text: str, template: str) -> None:
    assert read_turn(text, template, 0) == {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<tool_call>{", "without </tool_call>"),
        ("<tool_call>{]</tool_call>", "is not JSON"),
        ('<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>', "NaN is not JSON"),
        ("<tool_call>[1]</tool_call>", 'has no "name"'),
        ('<tool_call>{"name": 3}</tool_call>', 'has no "name"'),
        ('<tool_call>{"name": "f", "arguments": [1]}</tool_call>', "arguments is no object"),
        ('<tool_call>{"name": "f", "arguments": "x"}</tool_call>', "arguments is not JSON"),
        (f"<tool_call>{WRITTEN}</tool_call> and more", "text after </tool_call>"),
        (f"<tool_call>{'[' * 100_000}</tool_call>", "is not JSON"),
        (f'<tool_call>{{"name": "f", "arguments": {{"a": {"9" * 10_000}}}}}</tool_call>', "is not JSON"),
    ],
)
def test_a_call_that_cannot_be_read_is_told_and_not_raised(text: str, said: str) -> None:
    message = read_turn(text, QWEN, 0)
    assert said in message["parse_error"] and message["content"] == text and "tool_calls" not in message


def test_what_the_templates_write_is_what_is_read() -> None:
    chat = [
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": "I add.", "tool_calls": [{"type": "function", "function": CALL}]},
    ]
    tokenizer = qwen3()
    rendered = Renderer(tokenizer).chat(chat)
    ids = [token for token, trained in zip(rendered.input_ids, rendered.loss_mask, strict=True) if trained][:-1]
    text = str(tokenizer.decode(ids, skip_special_tokens=True))
    assert calls_of(text, str(tokenizer.chat_template)) == [CALL]
    assert read_turn(text, str(llama3().chat_template), 0) == {"role": "assistant", "content": text}
