"""Mixtures of files: an epoch has each file's share, no row twice, and other rows than the epoch before."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import RandomDocuments

from verl.data.loader import Loader, Packing, row_order
from verl.data.mixture import Mixture, drawn, mixture_of
from verl.data.source import Entry, resolve_entries
from verl.errors import UserError

MIXTURE = Mixture(("a", "b", "c"), (30, 15, 5), (10, 15, 2))


def random_cases(number: int) -> list[tuple[int, int, int]]:
    """Rows of an entry, rows that an epoch takes, seed."""
    source = random.Random(7)
    cases = [(rows, source.randint(1, rows), source.randint(0, 99)) for rows in (source.randint(1, 40) for _ in range(number))]
    return [(1, 1, 0), (7, 7, 1), (10, 9, 2), (12, 5, 3), *cases]


@pytest.mark.parametrize(("rows", "taken", "seed"), random_cases(30))
def test_an_epoch_has_no_row_twice_and_every_row_comes_before_any_comes_again(rows: int, taken: int, seed: int) -> None:
    epochs = [drawn(rows, taken, seed, 0, epoch).tolist() for epoch in range(2 * rows // taken + 2)]
    for epoch in epochs:
        assert len(epoch) == len(set(epoch)) == taken and set(epoch) <= set(range(rows))
    all_of_them = [row for epoch in epochs for row in epoch]
    assert sorted(all_of_them[:rows]) == list(range(rows))
    assert sorted(all_of_them[rows : 2 * rows]) == list(range(rows))


def test_choosing_anew_in_each_epoch_would_leave_rows_out() -> None:
    """The negative control of the test above."""
    chosen = [row_order(12, 3, epoch)[:4].tolist() for epoch in range(3)]
    assert sorted(row for epoch in chosen for row in epoch) != list(range(12))


def test_an_epoch_has_the_share_of_each_file_in_one_order() -> None:
    for epoch in range(8):
        order = MIXTURE.order(3, epoch)
        counts = np.histogram(order, bins=[0, 30, 45, 50])[0]
        assert counts.tolist() == [10, 15, 2] and len(set(order.tolist())) == 27
        assert order.tolist() == Mixture(*(MIXTURE.names, MIXTURE.of_entry_E, MIXTURE.per_epoch_E)).order(3, epoch).tolist()
    assert set(MIXTURE.order(3, 0).tolist()) != set(MIXTURE.order(3, 1).tolist())
    assert MIXTURE.order(3, 0).tolist() != MIXTURE.order(4, 0).tolist()
    assert MIXTURE.order(3, 0).tolist() != sorted(MIXTURE.order(3, 0).tolist())


def test_the_order_of_a_mixture_does_not_change_between_versions() -> None:
    """A checkpoint of an older version goes on with the same rows only as long as this holds."""
    assert Mixture(("a", "b"), (6, 4), (3, 4)).order(1, 0).tolist() == [7, 4, 0, 6, 2, 9, 8]
    assert Mixture(("a", "b"), (6, 4), (3, 4)).order(1, 1).tolist() == [6, 5, 9, 1, 7, 3, 8]


@pytest.mark.parametrize("packing", [Packing(2, 80), Packing(2, None)])
def test_each_step_of_a_mixture_has_the_same_rows_at_any_world_size(packing: Packing) -> None:
    documents = RandomDocuments(50)
    documents.choice = MIXTURE

    def rows(number: int, world_size: int) -> list[int]:
        ranks = [Loader(documents, packing, 12, 3, rank, world_size) for rank in range(world_size)]
        return sorted(int(i) for loader in ranks for batch in loader.step(number).micro_batches for i in batch.sample_ids_S if i >= 0)

    assert Loader(documents, packing, 12, 3).steps_per_epoch == 3
    for number in range(7):
        expected = sorted(MIXTURE.order(3, number // 3)[number % 3 * 12 :][:12].tolist())
        assert [rows(number, size) for size in (1, 2, 4)] == [expected] * 3


def entry(name: str, **share: Any) -> Entry:
    return Entry(name, [Path(name)], **share)


def shares(entries: list[Entry], rows: list[int], kept: list[int] | None = None) -> tuple[int, ...]:
    mixture = mixture_of(entries, rows, np.arange(sum(rows)) if kept is None else np.array(kept), "data.train_files")
    assert mixture is not None
    return mixture.per_epoch_E


def test_weights_make_an_epoch_as_long_as_it_can_be() -> None:
    assert shares([entry("a", weight=2.0), entry("b")], [1000, 100]) == (200, 100)
    assert shares([entry("a", weight=2.0), entry("b")], [100, 1000]) == (100, 50)
    assert shares([entry("a", weight=0.1), entry("b", weight=0.3)], [10, 30]) == (10, 30)
    assert shares([entry("a", weight=1.0), entry("b", weight=1.0), entry("c", weight=0.5)], [7, 9, 5]) == (7, 7, 3)


def test_rows_are_those_of_an_epoch_and_all_where_none_are_given() -> None:
    assert shares([entry("a", rows=50), entry("b")], [1000, 100]) == (50, 100)
    assert shares([entry("a", rows=50)], [1000]) == (50,)
    files = [Entry("*.jsonl", [Path("a"), Path("b")], rows=5), entry("c")]
    assert shares(files, [3, 4, 2]) == (5, 2)


def test_files_without_shares_are_no_mixture() -> None:
    assert mixture_of([entry("a"), entry("b")], [3, 4], np.arange(7), "data.train_files") is None


def test_a_share_that_cannot_be_had_is_refused_with_the_arithmetic() -> None:
    with pytest.raises(UserError, match=r"a should give 50 rows an epoch, but has 4 \(6 read, 2 left out\)"):
        shares([entry("a", rows=50), entry("b")], [6, 2], kept=[0, 1, 2, 3, 6, 7])
    with pytest.raises(UserError, match=r"b would give no row: a has 10 rows for its weight 1000, which makes 0\.01 for the weight 1"):
        shares([entry("a", weight=1000.0), entry("b")], [10, 10])
    with pytest.raises(UserError, match="b should give some rows an epoch, but has 0"):
        shares([entry("a", rows=2), entry("b")], [6, 2], kept=[0, 1, 2])


@pytest.mark.parametrize(
    ("files", "what"),
    [
        ([{"path": "A", "weight": 1, "rows": 2}], "both a weight and a number of rows"),
        ([{"path": "A", "weight": 1}, {"path": "A", "rows": 2}], "some entries have a weight, others a number of rows"),
        ([{"path": "A", "wieght": 1}], "unknown key 'wieght'"),
        ([{"weight": 1}], "has no path"),
        ([{"question": "2+2?", "answer": "4"}], "rows in memory are not read"),
        *[([{"path": "A", "weight": weight}], "the weight of") for weight in (0, -1, True, "2", float("inf"))],
        *[([{"path": "A", "rows": rows}], "the rows of") for rows in (0, -1, True, "2", 2.5)],
    ],
)
def test_a_share_that_is_not_right_is_named(tmp_path: Path, files: list[dict[str, Any]], what: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n')
    given = [{name: str(tmp_path / "a.jsonl") if value == "A" else value for name, value in one.items()} for one in files]
    with pytest.raises(UserError, match=what) as caught:
        resolve_entries(given)
    assert caught.value.fix


def test_rows_to_evaluate_with_have_no_shares(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(UserError, match="all rows are used here"):
        resolve_entries([{"path": str(tmp_path / "a.jsonl"), "rows": 1}], "data.val_files")
