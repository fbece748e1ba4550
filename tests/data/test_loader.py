"""Row order, packing and batches, without a model."""

import random
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from tiny import RandomDocuments

from verl.data.loader import AHEAD, Loader, Packing, Step, describe_steps, describe_untrained, row_order
from verl.data.pack import collate, pack, pad_groups

WORLD_SIZES = (1, 2, 4, 8)


def rows_of(step: Step) -> list[int]:
    return [int(i) for batch in step.micro_batches for i in batch.sample_ids_S if i >= 0]


def rows_of_step(loader: Loader, number: int) -> set[int]:
    return {int(i) for batch in loader.step(number).micro_batches for i in batch.sample_ids_S if i >= 0}


def loaders(world_size: int, **options: object) -> list[Loader]:
    documents = RandomDocuments(50)
    settings = {"packing": Packing(2, 80), "rows_per_step": 12, "seed": 3, **options}
    return [Loader(documents, rank=rank, world_size=world_size, **settings) for rank in range(world_size)]  # type: ignore[arg-type]


@pytest.mark.parametrize("packing", [Packing(2, 80), Packing(2, None)])
def test_each_step_sees_the_same_rows_at_any_world_size(packing: Packing) -> None:
    one = loaders(1, packing=packing)[0]
    for number in range(2 * one.steps_per_epoch):
        expected = rows_of_step(one, number)
        for world_size in WORLD_SIZES:
            seen = [row for loader in loaders(world_size, packing=packing) for row in sorted(rows_of_step(loader, number))]
            assert sorted(seen) == sorted(expected)


def test_a_sampler_per_rank_would_see_other_rows() -> None:
    """The negative control of the test above: each rank takes its own shuffle, as a DistributedSampler per rank does."""
    per_rank = [{int(i) for i in row_order(50, seed=rank, epoch=0)[:6]} for rank in range(2)]
    assert set.union(*per_rank) != rows_of_step(loaders(1)[0], 0)


def test_an_epoch_takes_every_row_once_and_the_next_in_another_order() -> None:
    loader = loaders(1)[0]
    epochs = [[sorted(rows_of_step(loader, e * loader.steps_per_epoch + s)) for s in range(loader.steps_per_epoch)] for e in range(2)]
    for epoch in epochs:
        assert sorted(row for step in epoch for row in step) == list(range(50))
    assert epochs[0] != epochs[1]


def test_a_run_that_resumes_within_a_later_epoch_takes_the_rows_of_that_epoch() -> None:
    epoch = loaders(1)[0].steps_per_epoch
    log = [rows_of(step) for step in loaders(1)[0].steps(0, 3 * epoch)]
    middle = 2 * epoch + 2
    assert [rows_of(step) for step in loaders(1)[0].steps(middle, 3 * epoch)] == log[middle:]
    assert log[2:epoch] != log[middle:], "the order of the first epoch once more would not be seen"


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_three_interruptions_of_an_epoch_lose_and_repeat_no_row(world_size: int) -> None:
    """Each time, steps that were prepared ahead have not been trained."""

    def trained(*spans: tuple[int, int]) -> list[int]:
        rows = []
        for loader in loaders(world_size):
            for start, stop in spans:
                steps: Any = loader.steps(start, loader.steps_per_epoch)
                rows += [row for step in islice(steps, stop - start) for row in rows_of(step)]
                steps.close()
        return sorted(rows)

    assert trained((0, 1), (1, 2), (2, 4), (4, 5)) == list(range(50))
    assert trained((0, 1), (1 + AHEAD, 5)) != list(range(50)), "going on behind what was prepared would not be seen"
    assert trained((0, 2), (1, 5)) != list(range(50)), "a repeated step would not be seen"


def test_preparing_steps_draws_no_random_numbers_that_training_draws_too() -> None:
    """So that a resumed run, which does not prepare the steps before, has the dropout of the uninterrupted one."""

    def states() -> list[object]:
        return [torch.get_rng_state().tolist(), repr(np.random.get_state()), random.getstate()]

    before = states()
    list(loaders(1)[0].steps(0, 7))
    assert states() == before
    torch.randperm(50)  # as a sampler does
    assert states() != before


def test_row_order_depends_on_seed_and_epoch_alone() -> None:
    assert row_order(100, 1, 0).tolist() == row_order(100, 1, 0).tolist()
    assert row_order(100, 1, 0).tolist() != row_order(100, 1, 1).tolist()
    assert row_order(100, 1, 0).tolist() != row_order(100, 2, 0).tolist()


def test_row_order_does_not_change_between_versions() -> None:
    """A checkpoint of an older version goes on with the same rows only as long as this holds."""
    assert row_order(10, seed=1, epoch=0).tolist() == [8, 4, 7, 0, 1, 2, 5, 9, 6, 3]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_ranks_take_as_many_micro_batches_and_none_is_over_the_budget(world_size: int) -> None:
    steps = [loader.step(4) for loader in loaders(world_size)]
    assert len({len(step.micro_batches) for step in steps}) == 1
    for step in steps:
        assert all(len(batch.input_ids_T) <= 80 for batch in step.micro_batches)


def test_steps_prepared_ahead_are_the_steps_asked_for() -> None:
    loader = loaders(1)[0]
    ahead = list(loader.steps(2, 9))
    assert [step.number for step in ahead] == list(range(2, 9))
    for step in ahead:
        assert {int(i) for batch in step.micro_batches for i in batch.sample_ids_S} == rows_of_step(loader, step.number)


def test_the_rows_of_a_plan_add_up() -> None:
    assert describe_steps(20, 4) == "4 rows"
    assert describe_steps(10, 4) == "4 rows, the last of an epoch of 2 (10 = 2 × 4 + 2)"
    assert describe_steps(3, 16) == "3 rows, all that there are (16 would fit)"
    assert describe_steps(1, 2, "pairs") == "1 pair, all that there are (2 would fit)"
    assert describe_untrained(10, 4, 6) == ""
    assert describe_untrained(10, 4, 5) == "the run ends within epoch 2: 2 of its 10 rows are not trained"
    assert describe_untrained(10, 4, 1) == "the run ends within epoch 1: 6 of its 10 rows are not trained"


@pytest.mark.parametrize("rows", [1, 3])
def test_fewer_rows_than_processes_are_each_trained_once(rows: int) -> None:
    ranks = [Loader(RandomDocuments(rows), Packing(2, 80), 16, 3, rank=rank, world_size=4) for rank in range(4)]
    assert sorted(int(i) for loader in ranks for batch in loader.step(0).micro_batches for i in batch.sample_ids_S if i >= 0) == list(
        range(rows)
    )
    assert {len(loader.step(0).micro_batches) for loader in ranks} == {1}


def test_packing_fills_bins_evenly() -> None:
    lengths = [50, 30, 20, 60, 40, 10, 25, 25]
    bins = pack(lengths, token_budget=100, multiple_of=2)
    assert sorted(i for group in bins for i in group) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in group) for group in bins]
    assert len(bins) % 2 == 0 and max(loads) <= 100 and max(loads) - min(loads) <= 20


def test_padding_groups_hold_at_most_the_rows() -> None:
    groups = pad_groups([5, 9, 3, 7, 1], rows=2, multiple_of=2)
    assert len(groups) == 4 and max(map(len, groups)) <= 2 and sorted(i for g in groups for i in g) == [0, 1, 2, 3, 4]


def test_a_batch_says_what_is_predicted_where() -> None:
    first = (np.array([5, 6, 7], dtype=np.int32), np.array([True, False, True]))
    second = (np.array([8, 9], dtype=np.int32), np.array([False, True]))
    batch = collate([first, second], [40, 41])
    assert batch.input_ids_T.tolist() == [5, 6, 7, 8, 9]
    assert batch.position_ids_T.tolist() == [0, 1, 2, 0, 1]
    assert batch.cu_seqlens.tolist() == [0, 3, 5] and batch.cu_seqlens.dtype == torch.int32 and batch.max_seqlen == 3
    assert batch.target_T.tolist() == [6, 7, 0, 9, 0]
    # The first token has no predecessor to be predicted from; nothing is predicted across documents.
    assert batch.loss_mask_T.tolist() == [False, True, False, True, False]
    assert batch.trained_M.tolist() == [1, 3]
    assert batch.sample_ids_S.tolist() == [40, 41]


def test_padding_adds_untrained_tokens_behind_each_document() -> None:
    first = (np.array([5, 6, 7], dtype=np.int32), np.array([False, True, True]))
    second = (np.array([8, 9], dtype=np.int32), np.array([False, True]))
    batch = collate([first, second], [0, 1], pad=True)
    assert batch.cu_seqlens.tolist() == [0, 3, 6] and batch.loss_mask_T.tolist() == [True, True, False, True, False, False]


def test_an_end_token_with_the_id_of_the_padding_is_trained() -> None:
    """The id is 0, which fills padded rows, too."""
    first = (np.array([5, 6, 0], dtype=np.int32), np.array([False, True, True]))
    second = (np.array([7, 0], dtype=np.int32), np.array([False, True]))
    batch = collate([first, second], [0, 1], pad=True)
    assert batch.target_T[batch.trained_M].tolist() == [6, 0, 0]
    assert batch.target_T[batch.loss_mask_T & (batch.target_T != 0)].tolist() == [6], "a mask by id would not be seen"
