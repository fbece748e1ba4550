"""Pairs of answers, in each form that preference data has, to two documents a row."""

import json
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest

from verl.config import PairsConfig
from verl.data.documents import NOTHING_TRAINED, SAME_ANSWERS, Documents, load_documents
from verl.data.loader import Packing, micro_batches
from verl.data.render import Renderer
from verl.errors import UserError

ASKED = {"role": "user", "content": "What is 2 + 3?"}
RIGHT, WRONG = {"role": "assistant", "content": "It is 5."}, {"role": "assistant", "content": "It is 6, I am sure."}
FORMS = {
    "texts": {"prompt": ASKED["content"], "chosen": RIGHT["content"], "rejected": WRONG["content"]},
    "text and messages": {"prompt": ASKED["content"], "chosen": [RIGHT], "rejected": [WRONG]},
    "messages and text": {"prompt": [ASKED], "chosen": RIGHT["content"], "rejected": WRONG["content"]},
    "messages": {"prompt": [ASKED], "chosen": [RIGHT], "rejected": [WRONG]},
    "whole chats": {"chosen": [ASKED, RIGHT], "rejected": [ASKED, WRONG]},
    "whole chats as text": {
        "chosen": "\n\nHuman: What is 2 + 3?\n\nAssistant: It is 5.",
        "rejected": "\n\nHuman: What is 2 + 3?\n\nAssistant: It is 6, I am sure.",
    },
    "whole chats beside the prompt": {"prompt": "What is 2 + 3?", "chosen": [ASKED, RIGHT], "rejected": [ASKED, WRONG]},
}


def load(tmp_path: Path, rows: list[dict[str, Any]], **keys: Any) -> Documents:
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = PairsConfig(train_files=str(file), cache_dir=str(tmp_path / "cache"), **keys)
    return load_documents(config, config.train_files, families.chatml())


def trained(documents: Documents, index: int) -> str:
    ids, mask = documents.document(index)
    return families.chatml().decode(ids[mask].tolist())


@pytest.mark.parametrize("row", FORMS.values(), ids=FORMS)
def test_every_form_gives_the_chosen_chat_and_the_rejected_one(row: dict, tmp_path: Path) -> None:
    pairs = load(tmp_path, [row])
    assert len(pairs) == 1 and len(pairs.lengths_N) == 2
    for index, answer in enumerate((RIGHT, WRONG)):
        expected = Renderer(families.chatml()).chat([ASKED, answer])
        ids, mask = pairs.document(index)
        assert ids.tolist() == expected.input_ids and mask.tolist() == expected.loss_mask
        assert trained(pairs, index) == f"{answer['content']}<|im_end|>"


def test_turns_that_both_chats_have_are_context(tmp_path: Path) -> None:
    before = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello to you"}, ASKED]
    pairs = load(tmp_path, [{"chosen": [*before, RIGHT], "rejected": [*before, WRONG, ASKED, WRONG]}])
    assert trained(pairs, 0) == "It is 5.<|im_end|>"
    assert trained(pairs, 1) == "It is 6, I am sure.<|im_end|>" * 2


def test_a_chat_as_text_may_have_several_turns_with_paragraphs_in_them(tmp_path: Path) -> None:
    text = "\n\nHuman: Hello\n\nAssistant: Hello to you.\n\nAsk me.\n\nHuman: What is 2 + 3?\n\nAssistant: "
    pairs = load(tmp_path, [{"chosen": text + RIGHT["content"], "rejected": text + WRONG["content"]}])
    said = families.chatml().decode(pairs.document(0)[0].tolist())
    assert "assistant\nHello to you.\n\nAsk me.<|im_end|>" in said and "user\nWhat is 2 + 3?<|im_end|>" in said
    assert [trained(pairs, index) for index in (0, 1)] == [f"{answer['content']}<|im_end|>" for answer in (RIGHT, WRONG)]


def test_beside_a_prompt_an_answer_is_no_chat_whatever_it_says(tmp_path: Path) -> None:
    pairs = load(tmp_path, [{**FORMS["texts"], "chosen": "Human: 5"}])
    assert trained(pairs, 0) == "Human: 5<|im_end|>"


def test_pairs_stay_together_in_a_micro_batch_chosen_first(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}?", "chosen": "yes " * (i + 1), "rejected": f"no {i}"} for i in range(9)]
    pairs = load(tmp_path, rows)
    batches = micro_batches(pairs, np.arange(9)[::-1], Packing(1, 120))
    numbers = [batch.sample_ids_S.reshape(-1, 2) for batch in batches]
    assert len(batches) > 1 and all((pair[:, 0] % 2 == 0).all() and (pair[:, 1] == pair[:, 0] + 1).all() for pair in numbers)
    assert sorted(np.concatenate(numbers)[:, 0] // 2) == list(range(9))


def test_values_of_documents_go_with_them_into_the_batch(tmp_path: Path) -> None:
    from dataclasses import replace

    pairs = load(tmp_path, [FORMS["texts"], FORMS["whole chats"]])
    values = [np.full(tokens, index, dtype=np.float32) for index, tokens in enumerate(pairs.trained_N)]
    (batch,) = micro_batches(replace(pairs, values={"ref_logprob_M": values}), np.array([1, 0]), Packing(1, 1000))
    assert batch.ref_logprob_M is not None and batch.sample_ids_S.tolist() == [2, 3, 0, 1]
    assert batch.ref_logprob_M.tolist() == np.repeat([2, 3, 0, 1], pairs.trained_N[[2, 3, 0, 1]]).tolist()


def test_equal_answers_and_answers_that_are_cut_off_are_left_out_and_counted(tmp_path: Path) -> None:
    same, long = {**FORMS["texts"], "rejected": RIGHT["content"]}, {**FORMS["texts"], "prompt": "why? " * 50}
    pairs = load(tmp_path, [same, FORMS["texts"], long], max_length=40, truncation="right")
    assert len(pairs) == 1 and pairs.place(1) == f"{tmp_path}/pairs.jsonl:2"
    assert pairs.report.read == 3 and pairs.report.dropped == {SAME_ANSWERS: 1, NOTHING_TRAINED: 1}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": "?", "chosen": "a", "rejected": "b"}, r"jsonl:1: no column 'prompt'(.|\n)*data.prompt_key"),
        ({"chosen": "It is 5.", "rejected": "It is 6."}, r"no column 'prompt'"),
        ({"chosen": "Human: a?\n\nAssistant: b", "rejected": "Human: c?\n\nAssistant: b"}, "do not begin with the same message"),
        ({"chosen": "Human: a?\n\nAssistant:", "rejected": "Human: a?\n\nAssistant: b"}, r"jsonl:1: chosen: messages\[1\]"),
        ({"prompt": "?", "chosen": "a"}, r"no column 'rejected'(.|\n)*data.rejected_key"),
        ({"prompt": "?", "chosen": 5, "rejected": "b"}, "column 'chosen' is a number"),
        ({"prompt": "?", "chosen": "", "rejected": "b"}, "column 'chosen' is empty"),
        ({"chosen": [ASKED, RIGHT], "rejected": [{**ASKED, "content": "?"}, WRONG]}, "do not begin with the same message"),
        ({"chosen": [ASKED, RIGHT], "rejected": [ASKED, {"role": "robot", "content": "b"}]}, r"jsonl:1: rejected: messages\[1\]"),
        ({"chosen": [ASKED], "rejected": [ASKED, WRONG]}, "jsonl:1: chosen: messages: no assistant's turn"),
    ],
)
def test_a_row_that_is_no_pair_is_an_error_at_its_place(row: dict, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        load(tmp_path, [row])


def test_a_pair_with_a_long_answer_is_an_error_that_counts_rows(tmp_path: Path) -> None:
    rows = [FORMS["texts"], {**FORMS["texts"], "chosen": "five " * 90, "rejected": "six " * 90}]
    with pytest.raises(UserError, match=r"1 of 2 rows are longer than data.max_length=60"):
        load(tmp_path, rows, max_length=60)
