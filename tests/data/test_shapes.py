"""Shapes of rows that people have: recognised from the columns if the config names none, and only if there is one way to read them."""

import json
from pathlib import Path
from typing import Any

import families
import pyarrow as pa  # type: ignore[import-untyped]
import pytest
from pyarrow import parquet
from transformers import PreTrainedTokenizerFast

from verl.config.commands import EvalConfig
from verl.config.ppo import PromptConfig
from verl.config.sft import DataConfig
from verl.data.chat import ChatInput
from verl.data.documents import Documents, load_documents
from verl.data.prompts import load_prompts
from verl.data.row import Row
from verl.data.shapes import read_question
from verl.data.tables import Columns
from verl.errors import UserError

Values = dict[str, Any]


def write(path: Path, rows: list[Values]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def load(tmp_path: Path, files: str, tokenizer: PreTrainedTokenizerFast | None = None, **keys: Any) -> Documents:
    config = DataConfig(train_files=files, cache_dir=str(tmp_path / "cache"), **keys)
    return load_documents(config, Columns.of(config), files, tokenizer or families.chatml())


USER, ASSISTANT = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "four"}
CHAT = [USER, ASSISTANT]
SHAREGPT = [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "four"}]
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {}}}
CALLING = [USER, {"role": "assistant", "tool_calls": [{"name": "look_up", "arguments": {}}]}, {"role": "tool", "content": "4"}, ASSISTANT]
UPSTREAM = {
    "data_source": "openai/gsm8k",
    "prompt": [USER],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "4"},
    "extra_info": {"split": "train", "index": 0, "question": "2+2?", "answer": "2+2=4\n#### 4"},
}


def example(values: Values, **keys: Any) -> ChatInput:
    found = Columns.of(DataConfig(train_files="x", **keys)).read(Row("x.jsonl:1", values))[0]
    assert isinstance(found, ChatInput)
    return found


def contents(messages: Any) -> list[tuple[str, str]]:
    return [(message.get("role", message.get("from")), message.get("content", message.get("value"))) for message in messages]


@pytest.mark.parametrize(
    ("values", "messages", "note"),
    [
        ({"question": "2+2?", "answer": "four"}, CHAT, ""),
        ({"question": "2+2?", "answer": "four", "prompt": "x", "messages": CHAT}, CHAT, ""),
        ({"messages": CHAT}, CHAT, "read as rows with the chat in 'messages'"),
        ({"messages": json.dumps(CHAT), "id": 3}, json.dumps(CHAT), "read as rows with the chat in 'messages'"),
        ({"conversations": SHAREGPT}, SHAREGPT, "read as ShareGPT rows with the chat in 'conversations'"),
        (
            {"conversations": SHAREGPT, "system": "Be short."},
            [{"role": "system", "content": "Be short."}, *SHAREGPT],
            "read as ShareGPT rows with the chat in 'conversations'",
        ),
        (
            {"instruction": "Add.", "input": "2+2", "output": "four", "text": "Below is …"},
            [{"role": "user", "content": "Add.\n\n2+2"}, ASSISTANT],
            "read as Alpaca rows with the question in 'instruction' and 'input', the answer in 'output'",
        ),
        (
            {"instruction": "2+2?", "input": "", "output": "four"},
            CHAT,
            "read as Alpaca rows with the question in 'instruction', the answer in 'output'",
        ),
        (
            {"instruction": "2+2?", "input": "", "output": "four", "history": [["hi", "hello"]]},
            [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}, *CHAT],
            "read as Alpaca rows with the question in 'instruction', the answer in 'output'",
        ),
        (
            {"instruction": "2+2?", "context": "Maths.", "response": "four", "category": "qa"},
            [{"role": "user", "content": "2+2?\n\nMaths."}, ASSISTANT],
            "read as rows with the question in 'instruction' and 'context', the answer in 'response'",
        ),
        ({"prompt": "2+2?", "completion": "four"}, CHAT, "read as TRL rows with the question in 'prompt', the answer in 'completion'"),
        (
            {"prompt": [USER], "completion": [ASSISTANT]},
            CHAT,
            "read as TRL rows with the question in 'prompt', the answer in 'completion'",
        ),
        ({"prompt": "2+2?", "response": "four"}, CHAT, "read as rows with the question in 'prompt', the answer in 'response'"),
        ({"input": "2+2?", "output": "four"}, CHAT, "read as rows with the question in 'input', the answer in 'output'"),
        ({"query": "2+2?", "response": "four"}, CHAT, "read as rows with the question in 'query', the answer in 'response'"),
        (
            {"problem": "2+2?", "solution": "four", "answer": "4"},
            CHAT,
            "read as rows with the question in 'problem', the answer in 'solution'",
        ),
        (
            {"system_prompt": "Be short.", "question": "2+2?", "response": "four"},
            [{"role": "system", "content": "Be short."}, *CHAT],
            "read as rows with the question in 'question', the answer in 'response'",
        ),
        (
            UPSTREAM,
            [USER, {"role": "assistant", "content": "2+2=4\n#### 4"}],
            "read as upstream verl rows with the question in 'extra_info.question', the answer in 'extra_info.answer'",
        ),
    ],
)
def test_a_shape_is_recognised_and_named(values: Values, messages: Any, note: str) -> None:
    found = example(values)
    assert found.messages == messages if isinstance(messages, str) else contents(found.messages) == contents(messages)
    assert found.notes == ((note,) if note else ())


@pytest.mark.parametrize(
    ("values", "keys"),
    [
        ({"messages": CHAT, "problem": "2+2?", "solution": "4"}, "data.messages_key=messages; or data.prompt_key=problem"),
        ({"prompt": "2+2?", "response": "four", "completion": "4"}, "data.prompt_key=prompt data.response_key=response; or"),
        ({"messages": CHAT, "conversations": SHAREGPT}, "data.messages_key=messages; or data.messages_key=conversations"),
        ({"query": "2+2?", "instruction": "Add.", "output": "4"}, "data.prompt_key=instruction data.response_key=output; or"),
    ],
)
def test_columns_that_can_be_read_in_two_ways_are_refused(values: Values, keys: str) -> None:
    with pytest.raises(UserError, match="not clear which columns to read") as caught:
        example(values)
    assert keys in str(caught.value.fix) and all(name in caught.value.what for name in values)
    assert contents(example({"messages": CHAT, "problem": "x", "solution": "y"}, messages_key="messages").messages) == contents(CHAT)


def noted(values: Values, **keys: Any) -> set[str]:
    row = Row("x.jsonl:1", values)
    Columns.of(DataConfig(train_files="x", **keys)).read(row)
    return set(row.notes)


@pytest.mark.parametrize(
    ("values", "keys"),
    [
        ({"question": "2+2?", "answer": "four", "system": "Be short."}, {}),
        ({"question": "2+2?", "response": "four", "system_prompt": "Be short."}, {"response_key": "response"}),
        ({"messages": CHAT, "system": "Be short."}, {"messages_key": "messages"}),
        ({"prompt": [USER], "completion": [ASSISTANT], "system": "Be short."}, {}),
    ],
    ids=["the default columns", "named columns", "a named chat", "messages"],
)
def test_a_system_prompt_in_a_column_of_its_own_is_read_and_said(values: Values, keys: Values) -> None:
    assert contents(example(values, **keys).messages) == [("system", "Be short."), *contents(CHAT)]
    assert any(note.startswith("the system prompt is in column") for note in noted(values, **keys))
    if not keys:
        assert read_question(Row("x.jsonl:1", values), EvalConfig(), None).messages[0]["content"] == "Be short."


def test_a_column_named_system_is_no_system_prompt_if_the_config_names_it_or_the_chat_has_another() -> None:
    values = {"system": "2+2?", "answer": "four"}
    assert contents(example(values, prompt_key="system").messages) == contents(CHAT) and not noted(values, prompt_key="system")
    own = [{"role": "system", "content": "Be long."}, *CHAT]
    assert contents(example({"messages": own, "system": "Be short."}).messages) == contents(own)
    assert noted({"messages": own, "system": "Be short."}) == {
        "column 'system' is not read, because the chat has a system prompt of its own"
    }


@pytest.mark.parametrize("name", ["tools", "functions"])
def test_tools_and_variables_beside_a_question_are_used(name: str) -> None:
    values = {"question": "2+2?", "answer": "four", name: [TOOL], "chat_template_kwargs": {"enable_thinking": False}}
    found = example(values)
    assert found.tools == [TOOL] and found.template_kwargs == {"enable_thinking": False}


def test_a_column_tools_without_schemas_is_named_and_two_with_schemas_are_refused() -> None:
    values = {"question": "2+2?", "answer": "four", "tools": "calculator"}
    assert "column 'tools' is not read, because it has no schemas of tools" in example(values).notes
    with pytest.raises(UserError, match="not clear which column has the schemas"):
        example({**values, "tools": [TOOL], "functions": [TOOL]})


def test_columns_that_nobody_knows_are_an_error_that_lists_them() -> None:
    with pytest.raises(UserError, match=r"column 'question' is missing \(found: body, title\)"):
        example({"body": "2+2?", "title": "four"})
    with pytest.raises(UserError, match="column 'problem' is missing"):
        example({"prompt": "2+2?", "completion": "four"}, prompt_key="problem")


def test_prompt_and_completion_may_be_messages_and_only_the_completion_is_trained() -> None:
    chat = [USER, {"role": "assistant", "content": "hm"}, {"role": "user", "content": "well?"}]
    for values in ({"prompt": chat, "completion": [ASSISTANT]}, {"prompt": json.dumps(chat), "completion": "four"}):
        found = example(values, prompt_key="prompt", response_key="completion")
        assert contents(found.messages) == contents([*chat, ASSISTANT]) and found.context_turns == 1
        assert found.notes == ()


# Tools


@pytest.mark.parametrize("name", ["tools", "functions"])
@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), [TOOL["function"]]])
def test_tools_of_a_row_are_used_if_they_are_schemas(name: str, tools: Any) -> None:
    found = example({"messages": CALLING, name: tools})
    assert found.tools == (json.loads(tools) if isinstance(tools, str) else tools)
    assert found.notes[1] == f"the tools are in column {name!r}"


def test_tools_that_are_not_clear_are_refused_where_the_chat_calls_them() -> None:
    for row in ({"tools": ["look_up"]}, {"tools": [TOOL], "functions": [TOOL]}):
        with pytest.raises(UserError, match="not clear which column") as caught:
            example({"messages": CALLING, **row})
        assert "data.tools_key" in str(caught.value.fix)
    assert example({"messages": CHAT, "tools": ["hammer"]}).tools is None
    assert example({"messages": CALLING, "tools": []}).tools is None


# Evaluation and reinforcement learning


@pytest.mark.parametrize(
    ("values", "text", "reference"),
    [
        ({"question": "2+2?", "answer": "4"}, "2+2?", "4"),
        ({"problem": "2+2?", "solution": "2+2=4", "answer": "4"}, "2+2?", "4"),
        ({"prompt": "2+2?", "completion": "4"}, "2+2?", "4"),
        ({"instruction": "Add.", "input": "2+2", "output": "4"}, "Add.\n\n2+2", "4"),
        ({"messages": CHAT}, "2+2?", "four"),
        ({"conversations": SHAREGPT}, "2+2?", "four"),
        ({"messages": [USER], "answer": "4"}, "2+2?", "4"),
        ({"prompt": [USER], "answer": "4"}, "2+2?", "4"),
        (UPSTREAM, "2+2?", "4"),
    ],
)
def test_a_question_and_its_reference_are_recognised(values: Values, text: str, reference: str) -> None:
    row = Row("x.jsonl:1", values)
    for config in (PromptConfig(), EvalConfig()):
        asked = read_question(row, config, None)
        assert (asked.text, asked.reference) == (text, reference)
        assert asked.messages[-1]["role"] == "user"


def test_a_question_without_an_answer_is_recognised_if_none_is_needed() -> None:
    asked = read_question(Row("x.jsonl:1", {"prompt": "2+2?"}), PromptConfig(response_key=None), None)
    assert (asked.text, asked.reference) == ("2+2?", None)


def test_the_reference_may_be_in_the_messages_of_an_answer() -> None:
    found = read_question(Row("x.jsonl:1", {"prompt": [USER], "completion": [ASSISTANT]}), EvalConfig(), None)
    assert contents(found.messages) == [("user", "2+2?")] and found.reference == "four"


def test_a_system_prompt_for_a_chat_is_refused() -> None:
    with pytest.raises(UserError, match="is a chat"):
        read_question(Row("x.jsonl:1", {"messages": CHAT}), EvalConfig(), "Be short.")


def test_prompts_of_a_run_say_how_rows_were_recognised(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [UPSTREAM, UPSTREAM])
    config = PromptConfig(train_files=path)
    prompts = load_prompts(config, path, families.chatml())
    assert "read as upstream verl rows with the question in 'prompt', the answer in 'reward_model.ground_truth': 2 rows" in str(prompts)
    assert prompts.prompts[0].row["reference"] == "4"


# What a run says


def test_the_report_counts_what_was_recognised_and_left_out(tmp_path: Path) -> None:
    rows: list[Values] = [
        {"messages": [*CHAT, USER, {**ASSISTANT, "weight": 0}, USER, ASSISTANT]},
        {"messages": [USER, {**ASSISTANT, "mood": "glad"}]},
        {"instruction": "2+2?", "input": "", "output": "four"},
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    for _ in range(2):  # rendered, and from the cache
        lines = str(load(tmp_path, path).report).splitlines()
        assert lines[1:] == [
            f"read as rows with the chat in 'messages': 2 rows, the first {path}:1",
            f"assistant turns are context because their mark says so (weight, train, loss, …): 1 row, the first {path}:1",
            f"key 'mood' of messages is not printed by the chat template: 1 row, the first {path}:2",
            f"read as Alpaca rows with the question in 'instruction', the answer in 'output': 1 row, the first {path}:3",
        ]


def test_rendered_text_is_read_as_its_tokens(tmp_path: Path) -> None:
    tokenizer = families.chatml()
    text = "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\nsat<|im_end|>\n"
    path = write(tmp_path / "rows.jsonl", [{"text": text}])
    with pytest.raises(UserError, match="already applied"):
        load(tmp_path, path, tokenizer, text_key="text")
    ids, mask = load(tmp_path, path, tokenizer, text_key="text", text_is_rendered=True).document(0)
    assert ids.tolist() == tokenizer(text).input_ids and mask.all()
    other = write(tmp_path / "other.jsonl", [{"text": "<start_of_turn>user\nthe cat<end_of_turn>\n"}])
    with pytest.raises(UserError, match="not a control token of this tokenizer"):
        load(tmp_path, other, tokenizer, text_key="text", text_is_rendered=True)
    with pytest.raises(UserError, match="text that is trained whole"):
        load(tmp_path, write(tmp_path / "chat.jsonl", [{"question": "a", "answer": "b"}]), tokenizer, text_is_rendered=True)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2+2?", "completion": "5", "label": False},
        {"prompt": "2+2?", "completion": "4", "label": True},
        {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
        {"question": "2+2?", "chosen": [USER, ASSISTANT], "rejected": [USER, ASSISTANT]},
    ],
)
def test_bad_answers_are_not_trained_unnoticed(row: Values, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"labelled good or bad|a pair of answers"):
        load(tmp_path, write(tmp_path / "rows.jsonl", [row]))
    if "completion" in row:
        load(tmp_path, write(tmp_path / "rows.jsonl", [row]), prompt_key="prompt", response_key="completion")


@pytest.mark.parametrize("message", [USER, SHAREGPT[0], {**USER, "name": "Ann"}])
@pytest.mark.parametrize("keys", [{}, {"messages_key": "messages"}])
def test_a_row_that_is_one_message_is_named(message: Values, keys: Values) -> None:
    with pytest.raises(UserError, match="the row is one message of a chat, expected a whole chat") as caught:
        example(message, **keys)
    assert '{"messages": [' in str(caught.value)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (f"{json.dumps(CHAT)}\n{json.dumps(CHAT)}\n", "a second array begins here"),
        (json.dumps([CHAT, CHAT]), "expected an object with named columns"),
        (json.dumps([SHAREGPT]), "expected an object with named columns"),
    ],
)
def test_a_chat_without_a_name_of_its_column_is_answered_with_an_object(tmp_path: Path, text: str, what: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=what) as caught:
        load(tmp_path, str(tmp_path / "a.json"))
    assert '{"messages": […]}' in str(caught.value)


ROWS: list[Values] = [{"question": "2+2?", "answer": "four"}, {"messages": CHAT}]


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"loss": 0.0}, {"masked": True}, {"loss_mask": "0"}])
def test_a_row_whose_mark_asks_not_to_train_it_is_refused(row: Values, mark: Values) -> None:
    with pytest.raises(UserError, match=f"column '{next(iter(mark))}' is .*: it asks not to train the row") as caught:
        example({**row, **mark})
    assert "remove the row" in str(caught.value)


@pytest.mark.parametrize("row", ROWS)
def test_marks_of_parts_of_a_row_are_refused(row: Values) -> None:
    with pytest.raises(UserError, match="column 'loss_mask' is a list") as caught:
        example({**row, "loss_mask": [0, 0, 0, 1]})
    assert 'write "weight": 0 into the messages' in str(caught.value)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("beside", [{"images": ["cat.png"]}, {"image": {"bytes": "…"}}, {"videos": [{"url": "…"}]}, {"audio": "a.wav"}])
def test_a_row_with_pictures_is_refused_and_one_with_an_empty_column_is_not(row: Values, beside: Values) -> None:
    with pytest.raises(UserError, match=f"column '{next(iter(beside))}' has .*; only text is trained and asked") as caught:
        example({**row, **beside})
    assert caught.value.where and "remove the row" in str(caught.value)
    nothing: list[Any] = [None, "", []]
    for empty in nothing:
        assert example({**row, next(iter(beside)): empty}).messages == example(row).messages


def test_a_question_with_a_picture_is_refused() -> None:
    part = {"type": "image_url", "image_url": {"url": "cat.png"}}
    with pytest.raises(UserError, match="column 'images' has a list"):
        read_question(Row("x.jsonl:1", {"question": "What is it?", "images": ["cat.png"]}), EvalConfig(), None)
    with pytest.raises(UserError, match="found a part of type 'image_url'; only text is trained"):
        read_question(Row("x.jsonl:1", {"messages": [{"role": "user", "content": [part]}]}), EvalConfig(), None)


@pytest.mark.parametrize("row", ROWS)
def test_marks_and_thoughts_that_are_not_read_are_named(row: Values, tmp_path: Path) -> None:
    beside = {"weight": 0.5, "train": 1, "thinking": "Add.", "cot": None, "reasoning_content": ""}
    notes = load(tmp_path, write(tmp_path / "rows.jsonl", [{**row, **beside}])).report.notes
    named = [note.partition(":")[0] for note in notes if "is not read" in note]
    assert named == ["column 'thinking' is not read, so the thoughts in it are not trained", "column 'weight' is not read"]


def test_a_column_of_thoughts_that_is_trained_is_not_named(tmp_path: Path) -> None:
    files = write(tmp_path / "rows.jsonl", [{"question": "2+2?", "reasoning": "Add.", "answer": "four"}])
    assert not [note for note in load(tmp_path, files, response_key="reasoning").report.notes if "is not read" in note]


def test_a_mark_beside_a_text_or_in_a_parquet_file_is_not_ignored(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="asks not to train the row"):
        load(tmp_path, write(tmp_path / "text.jsonl", [{"text": "one", "weight": 0}]), text_key="text")
    parquet.write_table(pa.Table.from_pylist([{**ROWS[0], "weight": 0}]), tmp_path / "rows.parquet")
    with pytest.raises(UserError, match="asks not to train the row"):
        load(tmp_path, str(tmp_path / "rows.parquet"))


def test_upstream_rows_without_their_texts_name_both_ways_to_use_them() -> None:
    row = {name: value for name, value in UPSTREAM.items() if name != "extra_info"}
    with pytest.raises(UserError, match=r"extra_info\.question and extra_info\.answer, which are missing") as caught:
        example(row)
    assert "data.prompt_key=prompt data.response_key=reward_model.ground_truth; or use verl ppo" in str(caught.value)
    found = example(row, prompt_key="prompt", response_key="reward_model.ground_truth")
    assert contents(found.messages) == [("user", "2+2?"), ("assistant", "4")]
