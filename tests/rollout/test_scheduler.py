"""What the scheduler of the native engine decides, without a model."""

from typing import Any

import numpy as np
import pytest

from verl.rollout.native import scheduler
from verl.rollout.native.scheduler import Admission, Prefill, Request, Scheduler

A, B, C = (1, 2, 3), (4, 5), (6, 7, 8, 9)
LIMIT = 20


def scheduler_of(*prompts: tuple[int, ...], slots: int, on_gpu: bool = False, limits: tuple[int, ...] = (), **options: Any) -> Scheduler:
    """One request for each prompt."""
    nothing = np.zeros(0, dtype=np.float32)
    each = zip(prompts, limits or [LIMIT] * len(prompts), strict=True)
    return Scheduler([Request(i, prompt, limit, nothing) for i, (prompt, limit) in enumerate(each)], slots, on_gpu=on_gpu, **options)


def admitted(queue: Scheduler) -> Admission:
    admission = queue.admit()
    assert admission is not None
    return admission


def seats(admission: Admission) -> list[tuple[int, int]]:
    return [(slot, request.number) for slot, request in admission.seated]


def finish(queue: Scheduler, *slots: int) -> list[int]:
    """End the answers in these slots; their numbers."""
    active = [slot not in slots for slot in range(queue.rows)]
    assert queue.ended(active) == list(slots)
    return [queue.finish(slot).number for slot in slots]


def test_requests_take_the_slots_in_their_order_and_the_rest_waits() -> None:
    queue = scheduler_of(A, B, C, slots=2)
    assert seats(admitted(queue)) == [(0, 0), (1, 1)]
    assert queue.admit() is None and queue.has_work
    assert finish(queue, 1) == [1]
    assert seats(admitted(queue)) == [(1, 2)]
    assert finish(queue, 0, 1) == [0, 2]
    assert queue.admit() is None and not queue.has_work


@pytest.mark.parametrize(("on_gpu", "waits"), [(False, False), (True, True)])
def test_on_a_gpu_requests_wait_until_an_eighth_of_the_slots_is_free(on_gpu: bool, waits: bool) -> None:
    queue = scheduler_of(*[A] * 32, slots=16, on_gpu=on_gpu)
    admitted(queue)
    finish(queue, 3)
    assert (queue.admit() is None) == waits
    if waits:
        finish(queue, 5)
        assert [slot for slot, _ in admitted(queue).seated] == [3, 5]


def test_on_a_gpu_the_last_requests_do_not_wait_for_more_slots_than_they_need() -> None:
    queue = scheduler_of(*[A] * 17, slots=16, on_gpu=True)
    admitted(queue)
    finish(queue, 3)
    assert seats(admitted(queue)) == [(3, 16)]


def test_on_a_gpu_requests_do_not_wait_where_nothing_runs() -> None:
    queue = scheduler_of(*[A] * 20, slots=16, on_gpu=True)
    admitted(queue)
    finish(queue, *range(16))
    assert len(admitted(queue).seated) == 4


def test_a_prompt_of_several_answers_is_prefilled_once_into_all_their_slots() -> None:
    admission = admitted(scheduler_of(A, B, A, A, slots=4))
    assert admission.prefills == [[Prefill(A, [0, 2, 3]), Prefill(B, [1])]]
    assert admission.copies == []


def test_a_prompt_that_a_slot_holds_is_copied_from_it_and_not_prefilled() -> None:
    queue = scheduler_of(A, B, A, C, slots=2)
    admitted(queue)
    finish(queue, 1)
    admission = admitted(queue)
    assert seats(admission) == [(1, 2)]
    assert (admission.copies, admission.copied_positions, admission.prefills) == ([(0, 1)], len(A), [])
    finish(queue, 0)
    assert admitted(queue).prefills == [[Prefill(C, [0])]]


def test_a_request_takes_the_free_slot_that_holds_its_prompt_and_needs_nothing_there() -> None:
    queue = scheduler_of(A, B, C, B, slots=2)
    admitted(queue)
    finish(queue, 0, 1)
    admission = admitted(queue)
    assert seats(admission) == [(1, 3), (0, 2)]
    assert admission.copies == [] and admission.prefills == [[Prefill(C, [0])]]


def test_a_prompt_that_another_one_has_replaced_is_held_no_longer() -> None:
    queue = scheduler_of(A, B, A, slots=1)
    for prompt in (A, B, A):
        admission = admitted(queue)
        assert admission.prefills == [[Prefill(prompt, [0])]] and admission.copies == []
        finish(queue, 0)


def test_where_a_state_goes_on_with_its_answer_only_requests_that_start_together_share_a_prompt() -> None:
    queue = scheduler_of(A, B, A, A, A, slots=3, keeps_prompts=False)
    assert admitted(queue).prefills == [[Prefill(A, [0, 2]), Prefill(B, [1])]]
    finish(queue, 1, 2)
    admission = admitted(queue)
    assert seats(admission) == [(1, 3), (2, 4)]
    assert admission.copies == [] and admission.prefills == [[Prefill(A, [1, 2])]]


def test_after_new_weights_no_prompt_is_held() -> None:
    queue = scheduler_of(A, A, A, slots=2)
    admitted(queue)
    finish(queue, 1)
    queue.forget_prompts()
    admission = admitted(queue)
    assert admission.prefills == [[Prefill(A, [1])]] and admission.copies == []


def test_a_prompt_of_one_token_needs_no_prefill() -> None:
    admission = admitted(scheduler_of((7,), B, slots=2))
    assert admission.prefills == [[Prefill(B, [1])]] and admission.copies == []


def test_prompts_are_prefilled_in_batches_of_so_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "PREFILL_TOKENS", 7)
    long = tuple(range(20))
    admission = admitted(scheduler_of(A, C, B, long, (5, 5), (6, 6), slots=6))
    assert [[prefill.prompt for prefill in batch] for batch in admission.prefills] == [[A, C], [B], [long], [(5, 5), (6, 6)]]


def test_no_step_is_taken_that_no_answer_can_need() -> None:
    queue = scheduler_of(A, B, slots=2, limits=(5, 11))
    admitted(queue)
    assert [queue.advance(8), queue.advance(8)] == [8, 3]


def test_the_last_answers_move_into_free_slots_once_nothing_waits() -> None:
    queue = scheduler_of(A, B, C, A, B, slots=4, limits=(20, 20, 30, 20, 20))
    admitted(queue)
    finish(queue, 0)
    assert queue.compact() is None, "the free slot is for the request that waits"
    admitted(queue)
    finish(queue, 0, 1)
    compaction = queue.compact()
    assert compaction is not None
    assert (compaction.sources, compaction.targets, compaction.used) == ([2, 3], [0, 1], 2)
    assert compaction.positions == len(C) + 30
    assert queue.rows == 2 and finish(queue, 0, 1) == [2, 3]


def test_free_slots_at_the_end_are_cut_off_without_a_move() -> None:
    queue = scheduler_of(A, B, C, slots=3)
    admitted(queue)
    finish(queue, 1, 2)
    assert queue.compact() is None and queue.rows == 1


def test_more_free_slots_than_answers_left_are_no_trouble() -> None:
    queue = scheduler_of(A, B, C, A, B, slots=5)
    admitted(queue)
    finish(queue, 0, 1, 3)
    compaction = queue.compact()
    assert compaction is not None
    assert (compaction.sources, compaction.targets, compaction.used) == ([2, 4], [0, 1], 2)
    assert finish(queue, 0, 1) == [2, 4]


def test_on_a_gpu_answers_move_only_where_a_smaller_graph_serves() -> None:
    queue = scheduler_of(*[A] * 16, slots=16, on_gpu=True)
    admitted(queue)
    finish(queue, *range(7))
    assert queue.compact() is None, "9 answers need the graph of 16 rows"
    finish(queue, 7)
    compaction = queue.compact()
    assert compaction is not None
    assert compaction.targets == list(range(8)) and compaction.sources == list(range(8, 16))
    assert queue.rows == 8


@pytest.mark.parametrize(("used", "rows"), [(1, 4), (4, 4), (5, 8), (8, 8), (9, 12), (12, 12)])
def test_on_a_gpu_rows_are_a_power_of_two_or_all_slots(used: int, rows: int) -> None:
    queue = scheduler_of(*[A] * used, slots=12, on_gpu=True)
    admitted(queue)
    assert queue.rows == rows
