"""Device memory of the native engine: sizes, and what moves between slots."""

from typing import Any

import numpy as np
import pytest
import torch

from verl.errors import UserError
from verl.rollout import Options
from verl.rollout.native import slots as module
from verl.rollout.native.attention import KVShape, LayerCache, RecurrentShape, StateCache, StateShape
from verl.rollout.native.scheduler import Compaction, Request
from verl.rollout.native.slots import Slots, SlotSize, bytes_of_states, bytes_per_position

SHAPES = [KVShape(2, 4, 4), KVShape(2, 4, 6)]
CONVOLUTION, RULE = StateShape((5, 3), torch.bfloat16), StateShape((2, 4, 6), torch.float32)
RECURRENT: list[KVShape | RecurrentShape] = [RecurrentShape(CONVOLUTION, RULE), *SHAPES, RecurrentShape(CONVOLUTION, None)]


def slots_of(shapes: list[Any] = SHAPES, **options: Any) -> Slots:
    return Slots(shapes, 100, torch.float32, torch.device("cpu"), [0], Options(**options))


def test_slots_that_serve_are_kept_and_others_grow() -> None:
    slots = slots_of()
    assert slots.size_for(5, 30, 10) == SlotSize(5, 30, 10)
    slots.make(SlotSize(5, 30, 10))
    assert slots.size_for(4, 20, 10) == slots.size == SlotSize(5, 30, 10)
    assert slots.size_for(8, 20, 10) == SlotSize(8, 30, 10)
    assert slots.size_for(2, 40, 12) == SlotSize(5, 40, 12)
    slots.free()
    assert slots.size_for(2, 40, 12) == SlotSize(2, 40, 12)


def test_options_bound_the_slots() -> None:
    assert slots_of(max_sequences=3, max_positions=64).size_for(1000, 30, 10) == SlotSize(3, 64, 10)
    assert slots_of().size_for(1000, 30, 10) == SlotSize(module.MAX_SLOTS["cpu"], 30, 10)


def test_no_larger_slots_are_tried_than_those_that_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    slots = slots_of()
    monkeypatch.setattr(Slots, "_slots_that_fit", lambda self, positions: 3)
    slots.make(SlotSize(8, 30, 10))
    assert slots.size == SlotSize(3, 30, 10) == slots.size_for(8, 30, 10)


def test_without_memory_for_them_there_are_no_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_out(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    slots = slots_of()
    monkeypatch.setattr(module.State, "empty", run_out)
    with pytest.raises(UserError, match="8 responses at a time do not fit"):
        slots.make(SlotSize(8, 30, 10))
    assert slots.size is None and slots.layers == []


def test_the_bytes_of_a_slot_are_those_of_its_tensors() -> None:
    slots = slots_of()
    slots.make(SlotSize(3, 7, 10))
    held = sum(tensor.nbytes for layer in slots.layers for tensor in layer)
    assert held == 3 * 7 * bytes_per_position(SHAPES, torch.float32)


def test_the_bytes_of_a_slot_count_its_recurrent_state() -> None:
    slots = slots_of(RECURRENT)
    slots.make(SlotSize(3, 7, 10))
    held = sum(tensor.nbytes for layer in slots.layers for tensor in layer if tensor is not None)
    assert bytes_of_states(RECURRENT) == 2 * 5 * 3 * 2 + 2 * 4 * 6 * 4
    assert held == 3 * (7 * bytes_per_position(RECURRENT, torch.float32) + bytes_of_states(RECURRENT))


@pytest.mark.parametrize(("shapes", "expected"), [(SHAPES, 7), (RECURRENT, 6)])
def test_fewer_slots_fit_where_they_hold_a_recurrent_state(shapes: list[Any], expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    slots = slots_of(shapes)
    slots._device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (15_000, 0))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    assert slots._slots_that_fit(7) == expected


def test_recurrent_states_are_cleared_copied_and_moved_whole() -> None:
    slots = slots_of(RECURRENT)
    slots.make(SlotSize(3, 7, 4))
    slots.reset()
    first, last = slots.layers[0], slots.layers[3]
    assert isinstance(first, StateCache) and isinstance(last, StateCache)
    assert first.convolution is not None and first.rule is not None and last.convolution is not None and last.rule is None
    states = (first.convolution, first.rule, last.convolution)
    for state_S in states:
        state_S.copy_(torch.arange(1, 4).view(3, *[1] * (state_S.ndim - 1)).expand_as(state_S))
    slots.copy([(2, 0)], 1)
    assert [state_S.flatten(1).unique(dim=1).tolist() for state_S in states] == [[[3], [2], [3]]] * 3
    slots.clear_states([0])
    slots.compact(Compaction([2], [1], 6, 2))
    assert [state_S.flatten(1).unique(dim=1).tolist() for state_S in states] == [[[0], [3], [3]]] * 3
    first.rule.fill_(float("nan"))
    slots.clear_states([1])
    assert first.rule.isnan().flatten(1).any(1).tolist() == [True, False, True]


def test_a_moved_answer_goes_on_where_it_was() -> None:
    slots = slots_of()
    slots.make(SlotSize(3, 8, 4))
    slots.reset()
    numbers = np.linspace(0, 0.9, 4, dtype=np.float32)
    slots.state.begin([(0, Request(0, (5, 6), 4, numbers)), (2, Request(1, (7, 8, 9), 3, numbers + 0.05))])
    layer = slots.layers[1]
    assert isinstance(layer, LayerCache)
    layer.value[2] = torch.rand(2, 8, 6)
    slots.state.advance(torch.tensor([11, 12, 13]), torch.tensor([-0.5, -1.0, -1.5]))
    answer, values = slots.state.read([2]), layer.value[2, :, :6].clone()
    slots.compact(Compaction([2], [1], 6, 2))
    assert slots.state.read([1]) == answer == [([13], [-1.5])]
    assert torch.equal(layer.value[1, :, :6], values)
    assert slots.state.active_S.tolist() == [1, 1, 0] and slots.state.position_S.tolist() == [2, 3, 0]
    slots.state.advance(torch.tensor([0, 14]), torch.tensor([-0.5, -0.5]))
    assert slots.state.active_S.tolist() == [0, 1, 0], "0 is a stop token"
    slots.state.advance(torch.tensor([15, 15]), torch.tensor([-0.5, -0.5]))
    assert slots.state.active_S.tolist() == [0, 0, 0], "3 tokens are the longest answer"
    assert slots.state.read([0, 1]) == [([11, 0], [-0.5, -0.5]), ([13, 14, 15], [-1.5, -0.5, -0.5])]
