"""Answers that are each labelled good or bad, as in KTO."""

import json
from pathlib import Path
from typing import Any

import families
import pytest
from rich.console import Console

from verl.config.pairs import PairsConfig
from verl.data.labelled import LabelColumns, LabelledDocuments, load_labelled
from verl.data.render import Renderer
from verl.errors import UserError

ASKED, ANSWER = {"role": "user", "content": "What is 2 + 3?"}, {"role": "assistant", "content": "It is 5."}
FORMS: dict[str, dict[str, Any]] = {
    "texts": {"prompt": ASKED["content"], "completion": ANSWER["content"]},
    "messages": {"prompt": [ASKED], "completion": [ANSWER]},
    "text and messages": {"prompt": ASKED["content"], "completion": [ANSWER]},
    "a whole chat": {"completion": [ASKED, ANSWER]},
    "lists of one text": {"prompt": [ASKED["content"]], "completion": [ANSWER["content"]]},
    "one message": {"prompt": ASKED, "completion": ANSWER},
    "a chat that waits for the answer": {"conversations": [{"from": "human", "value": ASKED["content"]}], "completion": ANSWER},
    "a whole chat beside its prompt": {"prompt": ASKED["content"], "completion": json.dumps([ASKED, ANSWER])},
}


def load(
    tmp_path: Path, rows: list[dict[str, Any]], columns: LabelColumns | None = None, tokenizer: Any = None, **keys: Any
) -> LabelledDocuments:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = PairsConfig(cache_dir=str(tmp_path / "cache"), **keys)
    return load_labelled(config, columns or LabelColumns(), str(file), tokenizer or families.chatml(), max_samples=-1)


@pytest.mark.parametrize("row", FORMS.values(), ids=FORMS)
def test_every_form_gives_the_answer_with_its_prompt_as_context(row: dict[str, Any], tmp_path: Path) -> None:
    found = load(tmp_path, [{**row, "label": False}])
    ids, mask = found.documents.document(0)
    expected = Renderer(families.chatml()).chat([ASKED, ANSWER])
    assert (ids.tolist(), mask.tolist()) == (expected.input_ids, expected.loss_mask) and found.is_good_N.tolist() == [False]


def test_earlier_turns_of_a_chat_are_context(tmp_path: Path) -> None:
    before = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}, ASKED]
    for row in ({"completion": [*before, ANSWER]}, {"prompt": before, "completion": [ANSWER]}):
        ids, mask = load(tmp_path, [{**row, "label": True}]).documents.document(0)
        assert families.chatml().decode(ids[mask].tolist()) == "It is 5.<|im_end|>"


@pytest.mark.parametrize(
    ("label", "is_good"),
    [
        (True, True),
        (False, False),
        (1, True),
        (0.0, False),
        ("True", True),
        ("0", False),
        ("good", True),
        (" No", False),
        ("undesirable", False),
    ],
)
def test_a_label_is_true_or_false_in_each_way_to_write_it(label: object, is_good: bool, tmp_path: Path) -> None:
    assert load(tmp_path, [{**FORMS["texts"], "label": label}]).is_good_N.tolist() == [is_good]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"label": -1}, r"jsonl:1: column 'label' is a number \(-1\), expected true"),
        ({"label": "maybe"}, "column 'label' is text"),
        ({"label": None}, "column 'label' is null"),
        ({"label": [True]}, "column 'label' is a list"),
        ({"completion": [ASKED]}, r"completion: messages\[0\]: the chat ends with a message of the user"),
        ({"prompt": "What is 2 + 4?", "completion": [ASKED, ANSWER]}, "column 'prompt' says 'What is 2"),
        ({"prompt": None}, "column 'prompt' is null"),
        ({"completion": None, "label": True}, "column 'completion' is null"),
    ],
)
def test_a_row_without_a_label_or_an_answer_is_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        load(tmp_path, [{**FORMS["texts"], "label": True, **change}])


def test_labels_stay_with_their_answers_when_rows_are_dropped(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}? " * (40 if i % 3 == 0 else 1), "completion": f"{i}", "label": i % 2 == 0} for i in range(9)]
    for _ in ("tokenized", "from the cache"):
        found = load(tmp_path, rows, max_length=30, truncation="right")
        assert found.is_good_N.tolist() == [False, True, True, False, False, True]
        assert "3 dropped" in str(found) and "; 3 good and 3 bad answers" in str(found)


CALL = {"role": "assistant", "tool_calls": [{"name": "add", "arguments": {}}]}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}


def test_a_system_prompt_in_a_column_of_its_own_is_read_and_said(tmp_path: Path) -> None:
    for form in ("texts", "messages", "a whole chat"):
        found = load(tmp_path, [{**FORMS[form], "label": True, "system": "Be short."}])
        assert "the system prompt is in column 'system': 1 row" in str(found)
        ids, mask = found.documents.document(0)
        assert "Be short." in families.chatml().decode(ids) and families.chatml().decode(ids[mask]) == "It is 5.<|im_end|>"


def test_tools_are_shown_to_the_model_or_refused(tmp_path: Path) -> None:
    row = {**FORMS["texts"], "label": True, "tools": [TOOL]}
    with pytest.raises(UserError, match=r"jsonl:1: column 'tools' has tools, but data.tools_key is not set"):
        load(tmp_path, [row])
    tokenizer = families.qwen3()
    tokenizer.chat_template = "{% if tools %}{{ tools | tojson }}{% endif %}" + tokenizer.chat_template
    found = load(tmp_path, [row], LabelColumns(tools_key="tools"), tokenizer)
    assert '"name": "add"' in tokenizer.decode(found.documents.document(0)[0])


def test_all_turns_after_the_prompt_are_trained_whatever_form_the_prompt_has(tmp_path: Path) -> None:
    tokenizer = families.qwen3()
    answer = [CALL, {"role": "tool", "content": "5"}, ANSWER]
    for prompt in ([ASKED], [{"from": "human", "value": ASKED["content"]}], ASKED["content"]):
        ids, mask = load(tmp_path, [{"prompt": prompt, "completion": answer, "label": True}], None, tokenizer).documents.document(0)
        assert "<tool_call>" in tokenizer.decode(ids[mask]) and "It is 5." in tokenizer.decode(ids[mask])


def test_options_are_those_of_documents(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{i}?", "completion": "5", "label": i == 1}) + "\n" for i in range(5)))
    config = PairsConfig(cache_dir=str(tmp_path / "cache"))
    found = load_labelled(config, LabelColumns(), str(file), families.chatml(), max_samples=3, console=Console())
    assert found.is_good_N.tolist() == [False, True, False]
