"""The forms of messages that data sets have: roles, marks, parts, calls."""

from typing import Any

import families
import pytest

from verl.data.chat import ChatInput, checked
from verl.data.render import Rendered, Renderer
from verl.errors import UserError

Messages = list[dict[str, Any]]

ASKED: Messages = [{"role": "user", "content": "2+2?"}]


def trained(messages: Messages, **given: Any) -> str:
    tokenizer = families.qwen3()
    (rendered,) = Renderer(tokenizer).chats([ChatInput(messages, **given)])
    if isinstance(rendered, UserError):
        raise rendered
    return str(tokenizer.decode([i for i, is_trained in zip(rendered.input_ids, rendered.loss_mask, strict=True) if is_trained]))


def answers(first: dict[str, object], second: dict[str, object]) -> Messages:
    answer = {"role": "assistant", "content": "wrongly 5"}
    return [*ASKED, {**answer, **first}, {"role": "user", "content": "sure?"}, {**answer, "content": "four", **second}]


# Marks

FOUR = "<think>\n\n</think>\n\nfour<|im_end|>"


@pytest.mark.parametrize(
    "mark",
    [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"loss": False}, {"trainable": 0}, {"masked": True}, {"weight": 0, "train": False}],
)
def test_a_turn_whose_mark_says_so_is_context(mark: dict[str, object]) -> None:
    assert trained(answers(mark, {})) == FOUR
    assert trained(answers(mark, {"weight": 1})) == FOUR
    assert trained(answers({}, {})) == f"wrongly 5<|im_end|>{FOUR}"  # the wrong way


@pytest.mark.parametrize("mark", [{"weight": 1}, {"train": True}, {"loss": 1.0}, {"masked": False}, {"weight": None}])
def test_a_turn_whose_mark_says_so_is_trained(mark: dict[str, object]) -> None:
    assert trained(answers(mark, mark)) == f"wrongly 5<|im_end|>{FOUR}"


@pytest.mark.parametrize(
    ("mark", "what"),
    [
        ({"weight": 0.5}, "a number (0.5), expected 0 or 1"),
        ({"loss": "no"}, "expected 0 or 1"),
        ({"weight": 0, "train": True}, "disagree"),
        ({"mask": 1}, "not clear"),
        ({"train_detail": []}, "not clear"),
        ({"loss_scale": 0.5}, "an unknown mark"),
        ({"step_loss_mask": 0}, "an unknown mark"),
        ({"is_masked": True}, "an unknown mark"),
    ],
)
def test_a_mark_that_cannot_be_obeyed_is_refused(mark: dict[str, object], what: str) -> None:
    with pytest.raises(UserError) as caught:
        trained(answers(mark, {}))
    assert what in caught.value.what and str(caught.value.where).startswith("messages[1]") and caught.value.fix


@pytest.mark.parametrize("key", [{"weights_file": "a.bin"}, {"training_data": "web"}, {"is_training": "yes"}])
def test_a_key_with_a_text_is_no_mark(key: dict[str, object]) -> None:
    assert "wrongly 5" in trained(answers(key, {})) and "four" in trained(answers(key, {}))


def test_numbers_in_messages_are_text_and_counted() -> None:
    sharegpt: Messages = [{"from": "human", "value": 3}, {"from": "gpt", "value": 4.5}]
    chats: list[Messages] = [[{"role": "user", "content": "3"}, {"role": "assistant", "content": 4.5}], sharegpt]
    for chat in chats:
        assert trained(chat).endswith("4.5<|im_end|>") and "numbers in messages taken as text" in checked(chat).notes
    with pytest.raises(UserError, match="a boolean"):
        checked([*ASKED, {"role": "assistant", "content": True}])


def test_a_chat_without_a_turn_to_train_is_refused() -> None:
    with pytest.raises(UserError, match="no turn is trained: the marks"):
        trained(answers({"weight": 0}, {"weight": 0}))
    with pytest.raises(UserError, match="no turn is trained: the marks"):
        trained(answers({}, {"weight": 0}), train_turns="last")


def test_only_the_last_turn_is_trained_if_asked() -> None:
    assert trained(answers({}, {}), train_turns="last") == FOUR


def test_a_mark_on_the_question_is_named() -> None:
    notes = checked([{**ASKED[0], "train": True}, {"role": "assistant", "content": "four"}]).notes
    assert notes == ("a mark asks to train a message that is not the assistant's, which is never trained",)
    assert checked([{**ASKED[0], "train": False}, {"role": "assistant", "content": "four"}]).notes == ()


# Roles


@pytest.mark.parametrize(
    ("human", "model"), [("human", "gpt"), ("human", "assistant"), ("user", "bot"), ("User", "Assistant"), ("human", "chatgpt")]
)
def test_names_of_roles_are_understood(human: str, model: str) -> None:
    expected = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "four"}]
    assert checked([{"from": human, "value": "2+2?"}, {"from": model, "value": "four"}]).messages == expected
    assert checked([{"role": human, "content": "2+2?"}, {"role": model, "content": "four"}]).messages == expected


def test_calls_and_results_of_sharegpt_are_calls_and_results() -> None:
    chat = checked(
        [
            {"from": "human", "value": "weather?"},
            {"from": "function_call", "value": '{"name": "look_up", "arguments": {"place": "Rome"}}'},
            {"from": "observation", "value": "sun"},
            {"from": "gpt", "value": "sunny"},
        ]
    )
    assert [message["role"] for message in chat.messages] == ["user", "assistant", "tool", "assistant"]
    assert chat.messages[1]["tool_calls"] == [{"name": "look_up", "arguments": {"place": "Rome"}}]


def test_another_role_is_left_to_the_template_and_named() -> None:
    chat = checked([{"role": "critic", "content": "Hm."}, *ASKED])
    assert chat.messages[0]["role"] == "critic"
    assert chat.notes == ("role 'critic', which is given to the chat template as it is",)
    assert checked([{"role": "developer", "content": "Be short."}, *ASKED]).notes == ()


def test_a_second_system_message_is_left_to_the_template() -> None:
    system = {"role": "system", "content": "Be short."}
    assert trained([system, *ASKED, {**system, "content": "Be long."}, {"role": "assistant", "content": "four"}]) == FOUR


# Contents


@pytest.mark.parametrize(
    "parts",
    [
        [{"type": "text", "text": "four"}],
        [{"type": "text", "text": "fo"}, {"type": "text", "text": "ur"}],
        [{"type": "output_text", "text": "four"}],
        [{"text": "four"}],
        ["fo", "ur"],
    ],
)
def test_parts_of_text_are_joined(parts: list[object]) -> None:
    assert trained([{"role": "user", "content": [{"type": "text", "text": "2+2?"}]}, {"role": "assistant", "content": parts}]) == FOUR


def test_a_part_with_a_thought_is_the_thought_of_the_turn() -> None:
    parts = [{"type": "thinking", "thinking": "add them"}, {"type": "text", "text": "four"}]
    assert checked([*ASKED, {"role": "assistant", "content": parts}]).messages[1] == {
        "role": "assistant",
        "content": "four",
        "reasoning_content": "add them",
    }


@pytest.mark.parametrize("kind", ["image", "image_url", "input_audio", "tool_use"])
def test_a_part_that_is_no_text_is_refused_by_its_name(kind: str) -> None:
    with pytest.raises(UserError, match=f"type '{kind}'") as caught:
        trained([{"role": "user", "content": [{"type": "text", "text": "What is it?"}, {"type": kind, kind: {}}]}])
    assert caught.value.where == "messages[0].content[1]"


def test_half_a_surrogate_pair_in_json_text_is_refused() -> None:
    for text in ("\\ud800", "\\u0000"):
        with pytest.raises(UserError, match=r"surrogate|NUL"):
            checked('[{"role": "user", "content": "' + text + '"}, {"role": "assistant", "content": "four"}]')


def test_the_older_function_call_is_a_call() -> None:
    call = {"name": "look_up", "arguments": '{"place": "Rome"}'}
    chat = checked(
        [*ASKED, {"role": "assistant", "content": None, "function_call": call}, {"role": "function", "name": "f", "content": "sun"}]
    )
    assert chat.messages[1]["tool_calls"] == [{"type": "function", "function": {"name": "look_up", "arguments": {"place": "Rome"}}}]
    assert chat.messages[2]["role"] == "tool"


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ([1], "expected names with values"),
        ({"enable thinking": 1}, "expected names with values"),
        ("{", "not JSON"),
        ({"messages": []}, "is set by verl"),
    ],
)
def test_variables_of_a_row_that_are_not_right_are_refused(value: object, what: str) -> None:
    with pytest.raises(UserError) as caught:
        checked([*ASKED, {"role": "assistant", "content": "four"}], None, value)
    assert what in caught.value.what


# Text to which a template is applied already


@pytest.mark.parametrize("end", ["<|im_end|>", "<|im_end|>\n", "<|eot_id|>", "<|endoftext|>", "</s>", "<|end|>"])
def test_an_answer_that_ends_with_a_control_token_is_refused(end: str) -> None:
    with pytest.raises(UserError, match="ends with a control token") as caught:
        trained([*ASKED, {"role": "assistant", "content": f"four{end}"}])
    assert caught.value.where == "messages[1]"


@pytest.mark.parametrize(
    "begin",
    [
        "<|im_start|>user\n2+2?",
        "<s>[INST] 2+2? [/INST]",
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n2+2?",
        "<bos><start_of_turn>user\n2+2?",
    ],
)
def test_a_text_that_begins_as_a_rendered_chat_is_refused(begin: str) -> None:
    renderer = Renderer(families.qwen3())
    with pytest.raises(UserError, match="already applied") as caught:
        renderer.chat([{"role": "user", "content": begin}, {"role": "assistant", "content": "four"}])
    assert caught.value.where == "messages[0]"
    with pytest.raises(UserError, match="already applied"):
        renderer.prompt([{"role": "user", "content": begin}])
    with pytest.raises(UserError, match="already applied") as caught:
        renderer.text(begin)
    assert "data.text_is_rendered=true" in str(caught.value.fix)


def test_a_deleted_word_in_html_is_no_control_token() -> None:
    assert "<s>five</s><|im_end|>" in trained([*ASKED, {"role": "assistant", "content": "four <s>five</s>"}])


@pytest.mark.parametrize(
    ("role", "content"),
    [
        ("user", "2+2?<|im_end|>\n<|im_start|>assistant\n"),
        ("user", "2+2? <|assistant|>"),
        ("system", "<|im_start|>system\nBe short.<|im_end|>"),
        ("assistant", "<|im_start|>assistant\nfour"),
    ],
)
def test_a_message_with_the_header_of_a_turn_at_its_end_or_beginning_is_refused(role: str, content: str) -> None:
    with pytest.raises(UserError, match="already applied"):
        trained([{"role": role, "content": content}, *ASKED, {"role": "assistant", "content": "four"}])


def test_a_chat_of_sharegpt_has_the_tokens_of_the_same_messages() -> None:
    renderer = Renderer(families.qwen3())
    (rendered,) = renderer.chats([ChatInput([{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "four"}])])
    assert isinstance(rendered, Rendered)
    assert rendered == renderer.chat([*ASKED, {"role": "assistant", "content": "four"}])


@pytest.mark.parametrize(
    ("message", "what", "fix"),
    [
        ({"text": "four"}, r"is missing or null \(found: role, text\)", "fill it in"),
        ({"content": {"type": "text", "text": "four"}}, "found an object", "write it as a list of parts"),
    ],
)
def test_an_answer_without_a_text_where_it_belongs_is_answered_with_what_was_found(message: dict[str, object], what: str, fix: str) -> None:
    with pytest.raises(UserError, match=what) as caught:
        trained([{"role": "user", "content": "2+2?"}, {"role": "assistant", **message}])
    assert caught.value.where == "messages[1].content" and fix in (caught.value.fix or "")
