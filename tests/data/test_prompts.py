"""Rows become prompts, in an order that a seed and an epoch decide alone."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tiny import write_problems_and_model

from verl.config.ppo import PromptConfig
from verl.data.loader import row_order
from verl.data.prompts import Prompts, describe_draws, load_prompts
from verl.data.render import Renderer
from verl.errors import UserError
from verl.models.load import load_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_problems_and_model(tmp_path_factory.mktemp("prompts"))


def load(folder: Path, rows: list[dict[str, Any]] | None = None, **changes: object) -> Prompts:
    path = folder / "train.jsonl"
    if rows is not None:
        path = folder / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = PromptConfig(train_files=str(path), **changes)  # type: ignore[arg-type]
    return load_prompts(config, config.train_files, load_tokenizer(str(folder / "model")))


def test_a_prompt_is_the_question_up_to_where_the_answer_begins(folder: Path) -> None:
    prompts = load(folder)
    first = prompts.prompts[0]
    row = json.loads((folder / "train.jsonl").read_text().splitlines()[0])
    assert (first.text, first.row["reference"]) == (row["question"], row["answer"])
    assert first.where == f"{folder / 'train.jsonl'}:1"
    decoded = load_tokenizer(str(folder / "model")).decode(first.token_ids)
    assert decoded == f"<|im_start|>user\n{row['question']}<|im_end|>\n<|im_start|>assistant\n"


def test_each_epoch_draws_every_prompt_once_and_goes_on_with_the_next(folder: Path) -> None:
    prompts = load(folder)
    n = len(prompts)
    drawn = [prompts.drawn(number, 7).where for number in range(2 * n)]
    assert sorted(drawn[:n]) == sorted(drawn[n:]) == sorted(prompt.where for prompt in prompts.prompts)
    assert drawn[n:] == [prompts.prompts[i].where for i in row_order(n, 7, 1)]
    assert drawn[:n] != drawn[n:]


@pytest.mark.parametrize(
    ("prompts", "per_step", "steps", "said"),
    [
        (8, 4, 2, "each of 8 prompts is asked once (2 steps × 4 = 8 = 1 × 8)"),
        (1, 1, 3, "the one prompt is asked 3 times (3 steps × 1 = 3 = 3 × 1)"),
        (10, 4, 2, "8 of 10 prompts are asked once, and 2 not at all (2 steps × 4 = 8)"),
        (10, 4, 7, "8 of 10 prompts are asked 3 times, the other 2 twice (7 steps × 4 = 28 = 2 × 10 + 8); a step that reaches the end of"),
        (3, 8, 1, "warning: a step draws more prompts (8) than there are (3), so each is asked 2 to 3 times in one step; 2 of 3 prompts"),
        (3, 6, 2, "warning: a step draws more prompts (6) than there are (3), so each is asked 2 times in one step; each of 3 prompts is"),
    ],
)
def test_how_often_each_prompt_is_asked_is_said_with_the_arithmetic(prompts: int, per_step: int, steps: int, said: str) -> None:
    assert describe_draws(prompts, per_step, steps).startswith(said)


@pytest.mark.parametrize(("rows", "per_step", "steps"), [(10, 4, 7), (3, 8, 1), (8, 4, 2), (5, 3, 1)])
def test_what_is_said_of_the_draws_is_what_is_drawn(rows: int, per_step: int, steps: int, folder: Path) -> None:
    prompts = load(folder, [{"question": f"What is {n}?", "answer": "5"} for n in range(rows)])
    times = Counter(prompts.drawn(number, seed=1).where for number in range(steps * per_step))
    fewest, more = divmod(steps * per_step, rows)
    assert sorted(times[prompt.where] for prompt in prompts.prompts) == [fewest] * (rows - more) + [fewest + 1] * more
    said = describe_draws(rows, per_step, steps)
    assert f"{more} of {rows} prompts are asked" in said if more else f"each of {rows} prompts is asked" in said


def test_a_trained_chat_waits_for_its_last_answer(folder: Path) -> None:
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "2+2?"}]
    (prompt,) = load(folder, [{"chat": [*chat, {"role": "assistant", "content": "4"}], "answer": "4"}], messages_key="chat").prompts
    assert prompt.text == "2+2?"
    assert prompt.token_ids == Renderer(load_tokenizer(str(folder / "model"))).prompt(chat)


def test_the_template_shows_the_tools_of_a_chat(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder / "model"))
    tokenizer.chat_template = "{% if tools %}{{ tools | tojson }}{% endif %}" + str(tokenizer.chat_template)
    chat, tools = [{"role": "user", "content": "2+2?"}], [{"name": "add", "description": "of two numbers"}]
    rows = [{"chat": chat, "tools": tools, "answer": "4"}, {"chat": chat, "tools": None, "answer": "4"}]
    (folder / "tools.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = PromptConfig(train_files=str(folder / "tools.jsonl"), messages_key="chat", tools_key="tools")
    with_tools, without = load_prompts(config, config.train_files, tokenizer).prompts
    assert with_tools.token_ids == Renderer(tokenizer).prompt(chat, tools)
    assert without.token_ids == Renderer(tokenizer).prompt(chat) != with_tools.token_ids


def test_a_system_prompt_stands_before_each_question(folder: Path) -> None:
    (prompt,) = load(folder, [{"question": "2+2?", "answer": "4"}], system_prompt="Count.").prompts
    assert prompt.messages[0] == {"role": "system", "content": "Count."}


@pytest.mark.parametrize(
    ("row", "changes", "found"),
    [
        ({"question": "", "answer": "4"}, {}, "column 'question' is empty"),
        ({"question": "2+2?"}, {}, "column 'answer' is missing"),
        ({"chat": '[{"role": "user"', "answer": "4"}, {"messages_key": "chat"}, "found text that is not JSON"),
        ({"chat": [{"role": "assistant", "content": "4"}], "answer": "4"}, {"messages_key": "chat"}, "no message to answer"),
        ({"chat": [{"role": 5, "content": "4"}], "answer": "4"}, {"messages_key": "chat"}, "unknown role: a number (5)"),
    ],
)
def test_a_wrong_row_is_named_with_its_place(folder: Path, row: dict[str, Any], changes: dict[str, Any], found: str) -> None:
    with pytest.raises(UserError) as caught:
        load(folder, [row], **changes)
    assert str(caught.value.where).startswith(f"{folder / 'rows.jsonl'}:1")
    assert found in caught.value.what


def test_rows_without_a_right_answer_are_fine_where_nobody_asks_for_it(folder: Path) -> None:
    (prompt,) = load(folder, [{"question": "2+2?"}], response_key=None).prompts
    assert "reference" not in prompt.row
    with pytest.raises(UserError) as caught:
        load(folder, [{"question": "2+2?"}])
    assert "or to null if no reward needs them" in str(caught.value.fix)


def test_a_prompt_that_is_too_long_ends_the_run_or_is_left_out_and_counted(folder: Path) -> None:
    rows = [{"question": "2 + 3 = ?", "answer": "5"}, {"question": "2 + 3 = ? " * 30, "answer": "5"}]
    with pytest.raises(UserError) as caught:
        load(folder, rows, max_prompt_length=64)
    assert "rows.jsonl:2" in str(caught.value) and caught.value.where == "data.train_files"
    prompts = load(folder, rows, max_prompt_length=64, overlong_prompts="drop")
    assert (len(prompts), prompts.dropped) == (1, 1) and "1 dropped" in str(prompts)
    with pytest.raises(UserError, match="1 of 1 prompts"):  # nothing would be left
        load(folder, rows[1:], max_prompt_length=64, overlong_prompts="drop")


def test_text_without_questions_is_refused(folder: Path) -> None:
    (folder / "book.txt").write_text("Once upon a time.\n")
    config = PromptConfig(train_files=str(folder / "book.txt"))
    with pytest.raises(UserError, match=r"book\.txt"):
        load_prompts(config, config.train_files, load_tokenizer(str(folder / "model")))


def test_prompts_of_a_mixture_are_drawn_by_their_shares(folder: Path) -> None:
    rows = [{"question": f"{name} {i}", "answer": "4"} for name in "ab" for i in range(6)]
    for name in "ab":
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows if row["question"][0] == name))
    files = [{"path": str(folder / "a.jsonl"), "rows": 4}, str(folder / "b.jsonl")]
    config = PromptConfig(train_files=files)
    prompts = load_prompts(config, files, load_tokenizer(str(folder / "model")))
    assert len(prompts) == 10 and len(prompts.prompts) == 12
    epochs = [[prompts.drawn(10 * epoch + number, 7).text for number in range(10)] for epoch in range(3)]
    for drawn in epochs:
        assert sum(text[0] == "a" for text in drawn) == 4 and len(set(drawn)) == 10
    assert {text for drawn in epochs for text in drawn} == {row["question"] for row in rows}
    assert "mixture: an epoch has 10 rows: 4 of 6 from" in str(prompts)
    assert (
        prompts.fingerprint
        != load_prompts(config, [str(folder / "a.jsonl"), str(folder / "b.jsonl")], load_tokenizer(str(folder / "model"))).fingerprint
    )


def test_what_a_reward_does_not_get_is_said_once(folder: Path) -> None:
    (folder / "rows.jsonl").write_text('{"question": "a", "answer": 4, "score": NaN}\n{"question": "b", "answer": 5, "score": 1}\n')
    config = PromptConfig(train_files=str(folder / "rows.jsonl"))
    prompts = load_prompts(config, config.train_files, load_tokenizer(str(folder / "model")))
    assert [prompt.row for prompt in prompts.prompts] == [
        {"question": "a", "answer": 4, "reference": "4"},
        {"question": "b", "answer": 5, "reference": "5", "score": 1},
    ]
    assert prompts.notes == [
        f"column 'answer': numbers taken as text: 2 rows, the first {folder}/rows.jsonl:1 (4)",
        f"column 'score' is left out of rows where it cannot be read: 1 row, the first {folder}/rows.jsonl:1 (NaN is not a JSON number)",
    ]


def test_the_answer_may_be_inside_an_object(folder: Path) -> None:
    row = {"question": "2+2?", "reward_model": {"style": "rule", "ground_truth": "4"}}
    (prompt,) = load(folder, [row], response_key="reward_model.ground_truth").prompts
    assert prompt.row == {**row, "reference": "4"}
