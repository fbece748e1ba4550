"""Device memory of the native engine: sizes, and what moves between slots."""

from typing import Any

import numpy as np
import pytest
import torch

from verl.errors import UserError
from verl.rollout import Options
from verl.rollout.native import slots as module
from verl.rollout.native.attention import KVShape
from verl.rollout.native.scheduler import Compaction, Request
from verl.rollout.native.slots import Slots, SlotSize, bytes_per_position

SHAPES = [KVShape(2, 4, 4), KVShape(2, 4, 6)]


def slots_of(**options: Any) -> Slots:
    return Slots(SHAPES, 100, torch.float32, torch.device("cpu"), [0], Options(**options))


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


def test_a_moved_answer_goes_on_where_it_was() -> None:
    slots = slots_of()
    slots.make(SlotSize(3, 8, 4))
    slots.reset()
    numbers = np.linspace(0, 0.9, 4, dtype=np.float32)
    slots.state.begin([(0, Request(0, (5, 6), 4, numbers)), (2, Request(1, (7, 8, 9), 3, numbers + 0.05))])
    slots.layers[1].value[2] = torch.rand(2, 8, 6)
    slots.state.advance(torch.tensor([11, 12, 13]), torch.tensor([-0.5, -1.0, -1.5]))
    answer, values = slots.state.read([2]), slots.layers[1].value[2, :, :6].clone()
    slots.compact(Compaction([2], [1], 6, 2))
    assert slots.state.read([1]) == answer == [([13], [-1.5])]
    assert torch.equal(slots.layers[1].value[1, :, :6], values)
    assert slots.state.active_S.tolist() == [1, 1, 0] and slots.state.position_S.tolist() == [2, 3, 0]
    slots.state.advance(torch.tensor([0, 14]), torch.tensor([-0.5, -0.5]))
    assert slots.state.active_S.tolist() == [0, 1, 0], "0 is a stop token"
    slots.state.advance(torch.tensor([15, 15]), torch.tensor([-0.5, -0.5]))
    assert slots.state.active_S.tolist() == [0, 0, 0], "3 tokens are the longest answer"
    assert slots.state.read([0, 1]) == [([11, 0], [-0.5, -0.5]), ([13, 14, 15], [-1.5, -0.5, -0.5])]
