"""Rows that give a label or a margin beside their text, and questions with the answers to other ones."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest

from verl.config.pairs import PairsConfig
from verl.data.documents import Documents, load_documents
from verl.data.loader import Loader, Packing, epoch_order
from verl.data.mismatched import mismatched, partners
from verl.data.numbered import NumberedRows, numbered, unpaired
from verl.data.preferences import Reads, columns_of, with_numbers
from verl.errors import UserError

PAIRS = [{"prompt": f"{i} + 1?", "chosen": f"{i + 1}", "rejected": f"{i + 2} or so"} for i in range(6)]


def load(tmp_path: Path, rows: list[dict[str, Any]], reads: Reads, **keys: Any) -> Documents:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = PairsConfig(str(file), cache_dir=str(tmp_path / "cache"), **keys)
    return with_numbers(load_documents(config, columns_of(config, reads), config.train_files, families.chatml()), config, reads, "train")


def text(document: tuple[np.ndarray, np.ndarray]) -> tuple[str, str]:
    """What is context of a document, and what is trained."""
    ids, mask = document
    return str(families.chatml().decode(ids[~mask])), str(families.chatml().decode(ids[mask]))


# Numbers


def test_a_pair_becomes_a_good_answer_and_a_bad_one(tmp_path: Path) -> None:
    found = load(tmp_path, PAIRS, "labels")
    assert isinstance(found, NumberedRows)
    assert len(found) == 12 and found.documents_per_row == 1 and found.number_R.tolist() == [1, 0] * 6
    assert [text(found.document(row))[1] for row in (2, 3)] == ["2<|im_end|>", "3 or so<|im_end|>"]


def test_the_same_answers_with_labels_are_the_same_rows(tmp_path: Path) -> None:
    sides = [(row, side) for row in PAIRS for side in ("chosen", "rejected")]
    rows = [{"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"} for row, side in sides]
    of_pairs, of_labels = (load(tmp_path, given, "labels") for given in (PAIRS, rows))
    assert of_pairs.fingerprint.ids == of_labels.fingerprint.ids and of_pairs.fingerprint.rows == of_labels.fingerprint.rows


def test_other_labels_are_other_rows(tmp_path: Path) -> None:
    """So that a run is not resumed with them unnoticed."""
    rows = [{"prompt": f"{i}?", "completion": f"{i}", "label": i % 2 == 0} for i in range(4)]
    before, after = (load(tmp_path, given, "labels").fingerprint for given in (rows, [{**rows[0], "label": False}, *rows[1:]]))
    assert before.ids == after.ids and before != after
    assert "except which of their tokens are trained" in str(before.difference(after))
    assert load(tmp_path, rows[::-1], "labels").fingerprint.any_order == before.any_order


def test_margins_stay_with_their_pairs_when_pairs_are_dropped(tmp_path: Path) -> None:
    rows = [{**row, "margin": number} for number, row in enumerate(PAIRS)]
    rows[2]["rejected"] = rows[2]["chosen"]
    found = load(tmp_path, rows, "margins", margin_key="margin")
    assert isinstance(found, NumberedRows) and found.number_R.tolist() == [0, 1, 3, 4, 5]
    (batch,) = Loader(found, Packing(1, 1000, 64), rows_per_step=5, seed=1).micro_batches(found, np.array([4, 0, 3]))
    with_margins = found.numbered(batch, np.array([4, 0, 3]))
    rows_of_batch = batch.sample_ids_S[: batch.documents].numpy() // 2
    assert with_margins.number_S.tolist() == [*found.number_R[rows_of_batch].tolist(), 0.0], "0 for filler"
    assert float(with_margins.mean_number) == 3.0
    assert not isinstance(load(tmp_path, rows, "margins"), NumberedRows), "without data.margin_key they are pairs"


@pytest.mark.parametrize(
    ("margin", "said"),
    [
        (None, "jsonl:1: column 'margin' is null"),
        ("much", "column 'margin' is text ('much'), expected a number: by how much"),
        (True, "column 'margin' is a boolean"),
        ([1], "column 'margin' is a list"),
        ("nan", "column 'margin' is text"),
        (-0.5, "column 'margin' is -0.5, so that the rejected answer would be the better one"),
    ],
)
def test_a_margin_that_is_none_is_refused(margin: object, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        load(tmp_path, [{**PAIRS[0], "margin": margin}, *PAIRS[1:]], "margins", margin_key="margin")
    assert said in str(error.value) and error.value.fix


def test_a_margin_may_be_text_as_in_csv_files(tmp_path: Path) -> None:
    found = load(tmp_path, [{**PAIRS[0], "margin": "1.5"}], "margins", margin_key="margin")
    assert isinstance(found, NumberedRows) and found.number_R.tolist() == [1.5]


def test_a_file_of_both_kinds_names_the_first_row_of_the_other(tmp_path: Path) -> None:
    labelled = {"prompt": "7?", "completion": "7", "label": True}
    with pytest.raises(UserError, match=r"jsonl:2: the row is a pair of answers .* and the first row is one answer with a label"):
        load(tmp_path, [labelled, PAIRS[0]], "labels")
    with pytest.raises(UserError, match=r"jsonl:2: the row is one answer with a label"):
        load(tmp_path, [PAIRS[0], labelled], "labels")


def test_the_choice_of_a_mixture_counts_pairs_and_trains_both_of_their_answers(tmp_path: Path) -> None:
    class EveryOther:
        rows = 3

        def order(self, seed: int, epoch: int) -> np.ndarray:
            return np.array([4, 0, 2])

    pairs = load(tmp_path, PAIRS, "pairs")
    object.__setattr__(pairs, "choice", EveryOther())
    order = epoch_order(unpaired(pairs), 0, 0)
    assert sorted(order.tolist()) == [0, 1, 4, 5, 8, 9] and unpaired(pairs).choice.rows == 6


def test_as_many_numbers_as_rows(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="5 numbers for 6 rows"):
        numbered(load(tmp_path, PAIRS, "pairs"), np.ones(5))


# Answers to other questions


@pytest.mark.parametrize("most", [1, 3, 10, 20])
def test_each_answer_is_given_once_and_never_to_its_own_question(most: int) -> None:
    question_N = np.random.default_rng(0).permutation(np.repeat([7, 9, *range(100, 120)], [most, 2, *[1] * 20])).astype(np.uint64)
    found = partners(question_N)
    assert Counter(found.tolist()) == Counter(range(len(question_N)))
    assert not (question_N[found] == question_N).any()


def test_where_most_rows_have_one_question_each_answer_is_still_given_once() -> None:
    question_N = np.array([5] * 8 + [6, 7], dtype=np.uint64)
    found = partners(question_N)
    assert sorted(found) == list(range(10)) and not (found == np.arange(10)).any()


def test_a_question_gets_the_answer_of_another_and_is_cut_off_at_the_limit(tmp_path: Path) -> None:
    long = [{**row, "chosen": row["chosen"] + " and more" * 9} for row in PAIRS[:2]]
    labelled = load(tmp_path, [*long, *PAIRS[2:]], "labels", max_length=80)
    assert isinstance(labelled, NumberedRows)
    found: Any = labelled.mismatched
    for row in range(len(labelled)):
        ids, mask = found.document(row)
        asked, answer = text(labelled.document(row))[0], text(labelled.document(found.answer_N[row]))[1]
        assert len(ids) == found.lengths_N[row] <= 80 and mask[1:].sum() == found.trained_N[row] > 0
        assert asked.startswith(text((ids, mask))[0][:20]) and answer.startswith(text((ids, mask))[1])
        assert asked.split("?")[0] != text(labelled.document(found.answer_N[row]))[0].split("?")[0]
    shorter = mismatched(labelled, 30, "data.train_files")
    assert shorter.lengths_N.max() == 30 and (shorter.trained_N > 0).all()
    assert [len(shorter.document(row)[0]) for row in range(len(labelled))] == shorter.lengths_N.tolist()


def test_rows_of_one_question_alone_are_refused(tmp_path: Path) -> None:
    rows = [{"prompt": "Why?", "completion": f"{i}", "label": i % 2 == 0} for i in range(4)]
    with pytest.raises(UserError, match=r"data.train_files: all rows have the same question"):
        load(tmp_path, rows, "labels")
