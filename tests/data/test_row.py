"""Rows: columns by name and by path, values as text, and what is said about them."""

import json
from decimal import Decimal
from typing import Any

import pytest

from verl.data.row import Notes, Row, checked_row
from verl.errors import UserError

UPSTREAM = {
    "prompt": [{"role": "user", "content": "2 + 2?"}],
    "reward_model": {"style": "rule", "ground_truth": "4"},
    "extra_info": json.dumps({"answer": "2 + 2 = 4", "index": {"line": 7}}),
}


def error_of(row: Row, column: str) -> UserError:
    with pytest.raises(UserError) as caught:
        row.text(column, "data.response_key")
    return caught.value


@pytest.mark.parametrize(
    ("path", "text"),
    [("reward_model.ground_truth", "4"), ("extra_info.answer", "2 + 2 = 4"), ("extra_info.index.line", "7")],
)
def test_a_path_names_a_column_inside_an_object_or_inside_json_text(path: str, text: str) -> None:
    row = Row("a.jsonl:1", UPSTREAM)
    assert row.has(path) and row.text(path, "data.response_key") == text


def test_a_column_whose_name_has_the_dot_comes_first() -> None:
    row = Row("a.jsonl:1", {"a.b": "column", "a": {"b": "path", "b.c": "both"}, "a.x": {"y": "z"}})
    assert row.text("a.b", "data.prompt_key") == "column"
    assert row.text("a.b.c", "data.prompt_key") == "both"
    assert row.text("a.x.y", "data.prompt_key") == "z"


@pytest.mark.parametrize(
    ("column", "near"),
    [
        ("reward_model.groundtruth", "reward_model.ground_truth"),
        ("ground_truth", "reward_model.ground_truth"),
        ("extra_info.anser", "extra_info.answer"),
        ("reward_modl", "reward_model"),
    ],
)
def test_a_missing_path_is_answered_with_the_nearest_one(column: str, near: str) -> None:
    error = error_of(Row("a.jsonl:1", UPSTREAM), column)
    assert error.fix == f"did you mean data.response_key={near}?"
    assert not Row("a.jsonl:1", UPSTREAM).has(column)


def test_an_object_is_answered_with_a_path_into_it() -> None:
    assert error_of(Row("a.jsonl:1", UPSTREAM), "reward_model").fix == "name a column inside it, such as reward_model.style"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (42, "42"),
        (-7, "-7"),
        (0.1, "0.1"),
        (Decimal("4.50"), "4.50"),
        (Decimal("1E+3"), "1000"),
        (["42"], "42"),
        ([42], "42"),
        (10**20, "1" + "0" * 20),
    ],
)
def test_a_number_or_a_list_of_one_item_is_text_and_noted(value: Any, text: str) -> None:
    row = Row("a.jsonl:1", {"answer": value})
    assert row.text("answer", "data.response_key") == text
    assert list(row.notes.values()) == [text]


@pytest.mark.parametrize("value", [True, float("nan"), float("inf"), Decimal("NaN"), ["a", "b"], [["a"]], [], [None], {}, [True], "", " "])
def test_what_is_no_text_is_refused(value: Any) -> None:
    assert error_of(Row("a.jsonl:1", {"answer": value}), "answer").where == "a.jsonl:1"


def test_notes_count_rows_and_name_the_first() -> None:
    notes = Notes()
    for number in (1, 2):
        row = Row(f"a.jsonl:{number}", {"answer": number})
        row.text("answer", "data.response_key")
        notes.add_row(row)
    assert notes.lines() == ["column 'answer': numbers taken as text: 2 rows, the first a.jsonl:1 (1)"]


def test_a_row_without_faults_keeps_its_values_as_they_are() -> None:
    values = {"a": "x", "b": {"c": ["d", {"e": None}]}, "f": 1.5}
    assert checked_row("a.jsonl:1", values) == Row("a.jsonl:1", values)
