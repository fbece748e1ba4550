"""Templates that do not end a chat's last answer get an end: the token with which the next message begins, or the end-of-text token."""

from itertools import groupby
from typing import Any

import families
import pytest
from transformers import PreTrainedTokenizerFast

from verl.data.chat import ChatInput
from verl.data.render import Rendered, Renderer
from verl.data.template_end import add_end, added_end
from verl.errors import UserError

# After the documentation of zai-org/glm-4-9b-chat-hf, and of chatglm3.
GLM4 = (
    "[gMASK]<sop>{% if tools %}{{ '<|system|>\\n' + tools | tojson }}{% endif %}"
    "{% for item in messages %}{% if item.content %}"
    "<|{{ 'observation' if item.role == 'tool' else item.role }}|>{{ item.metadata }}\n{{ item.content }}"
    "{% endif %}{% for call in item.tool_calls or [] %}<|assistant|>{{ call.function.name }}\n{{ call.function.arguments | tojson }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}\n"
)
WITH_LINE_ENDS = (
    "{% for message in messages %}{{ '<|' + message.role + '|>\\n' + message.content + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
WITHOUT_TOKENS = (
    "{% for message in messages %}"
    "{{ ('### Question:\\n' if message.role == 'user' else '### Answer:\\n') + message.content + '\\n\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '### Answer:\\n' }}{% endif %}"
)


ONE = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "four"}]
TWO = [*ONE, {"role": "user", "content": "sure?"}, {"role": "assistant", "content": "yes"}]
CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"place": "Rome"}}}
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {}}}
CALLED = [ONE[0], {"role": "assistant", "tool_calls": [CALL]}]
TOOLS = [*CALLED, {"role": "tool", "content": "sun"}, {"role": "assistant", "content": "sunny"}]


def glm(template: str = GLM4) -> PreTrainedTokenizerFast:
    tokenizer = families.glm(template)
    add_end(tokenizer)
    return tokenizer


def trained(tokenizer: PreTrainedTokenizerFast, rendered: Rendered) -> list[str]:
    """The text of each unbroken run of trained tokens."""
    runs = groupby(zip(rendered.input_ids, rendered.loss_mask, strict=True), key=lambda token: token[1])
    return [str(tokenizer.decode([number for number, _ in run])) for is_trained, run in runs if is_trained]


def spans(tokenizer: PreTrainedTokenizerFast, messages: Any, tools: Any = None, **keys: Any) -> list[str]:
    (rendered,) = Renderer(tokenizer).chats([ChatInput(messages, tools, **keys)])
    assert isinstance(rendered, Rendered), rendered
    prompt = Renderer(tokenizer).prompt(messages[:-1], tools)
    assert rendered.input_ids[: len(prompt)] == prompt and rendered.loss_mask[len(prompt) - 1 : len(prompt) + 1] == [False, True]
    return trained(tokenizer, rendered)


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (GLM4, ONE, ["\nfour<|user|>"]),
        (GLM4, TWO, ["\nfour<|user|>", "\nyes<|user|>"]),
        (GLM4, [{"role": "system", "content": "Be short."}, *TWO], ["\nfour<|user|>", "\nyes<|user|>"]),
        (GLM4, TOOLS, ['look_up\n{"place": "Rome"}<|observation|>', "\nsunny<|user|>"]),
        (GLM4, CALLED, ['look_up\n{"place": "Rome"}<|observation|>']),
        (WITH_LINE_ENDS, TWO, ["four\n<|user|>", "yes\n<|user|>"]),
        (WITHOUT_TOKENS, ONE, ["four\n\n<|endoftext|>"]),
    ],
)
def test_a_turn_ends_where_the_next_message_begins(template: str, messages: Any, expected: list[str]) -> None:
    tools = [TOOL] if any("tool_calls" in message for message in messages) else None
    assert spans(glm(template), messages, tools) == expected


def test_the_stop_token_is_what_generation_stops_at() -> None:
    tokenizer = glm()
    (stop,) = Renderer(tokenizer).stop_ids
    assert tokenizer.convert_ids_to_tokens(stop) == "<|user|>"


def test_the_prompt_stays_and_transformers_writes_the_end_too() -> None:
    plain, tokenizer = families.glm(GLM4), glm()
    for messages in (TWO, TWO[:3], ONE):
        shown: list[Any] = [made.apply_chat_template(messages, tokenize=False) for made in (plain, tokenizer)]
        assert shown[1] == shown[0] + ("<|user|>" if messages[-1]["role"] == "assistant" else "")
        asked = [made.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) for made in (plain, tokenizer)]
        assert asked[0] == asked[1]
    assert added_end(plain) is None and added_end(tokenizer) == "<|user|>"
    once = tokenizer.chat_template
    add_end(tokenizer)
    assert tokenizer.chat_template == once


@pytest.mark.parametrize("family", ["chatml", "qwen3", "llama3", "gemma", "mistral", "llama2", "phi3", "channels"])
def test_a_template_that_ends_its_turns_stays_as_it_is(family: str) -> None:
    tokenizer = getattr(families, family)()
    before = tokenizer.chat_template
    add_end(tokenizer)
    assert tokenizer.chat_template == before


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{% for message in",
        "{{ raise_exception('no') }}",
        families.CHATML.replace("<|im_end|>", "</end>"),
        families.CHATML.replace("message.content", "message.content | upper"),
    ],
)
def test_a_template_that_ends_its_turns_with_text_or_cannot_be_used_stays_as_it_is(template: str | None) -> None:
    tokenizer = families.chatml(template)
    add_end(tokenizer)
    assert tokenizer.chat_template == template


def test_a_turn_that_has_no_end_in_the_middle_is_refused() -> None:
    tokenizer = glm(WITHOUT_TOKENS)
    with pytest.raises(UserError, match="changes or omits the assistant's text"):
        Renderer(tokenizer).chat(TWO)
    (last,) = Renderer(tokenizer).chats([ChatInput(TWO, train_turns="last")])
    assert isinstance(last, Rendered) and trained(tokenizer, last) == ["yes\n\n<|endoftext|>"]
