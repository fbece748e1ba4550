"""Device memory for generation. A slot holds one sequence: in every layer a KV cache or a recurrent state, and an entry in the
decode state.

Dimensions: S slots, L positions of a slot, K key-value heads, D head size, G maximum response length, Z stop tokens, R subset of the slots.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from verl.rollout import Options
from verl.rollout._model import out_of_memory
from verl.rollout.native.attention import KVShape, LayerCache, RecurrentShape, StateCache, StateShape
from verl.rollout.native.scheduler import Compaction, Request

MAX_SLOTS = {"cuda": 2048, "cpu": 64}  # with more slots, the time of a step grows in proportion to their number
SHARE_OF_FREE = 0.8  # share of a GPU's free memory for KV caches and logits
WORTH_FREEING = 0.1  # share of a GPU's memory; KV caches that take more are freed during training
ROUND = 64  # on a GPU, positions are rounded up to a multiple of this, so that slightly longer prompts need no new slots


@dataclass
class State:
    """Decode state: one entry per slot.

    Attributes:
        token_S: newest token, the input of the next step, int64.
        position_S: position of that token, int64.
        generated_S: number of tokens of the response so far, int32.
        limit_S: maximum tokens of the response, int32.
        active_S: 1 until the response has ended, then 0, int32.
        answer_SG: tokens of the response, int32.
        logprob_SG: log-probabilities of these tokens, float32.
        uniform_SG: random numbers in [0, 1) for sampling, float32.
        stop_Z: tokens that end a response, int32.
    """

    token_S: Tensor
    position_S: Tensor
    generated_S: Tensor
    limit_S: Tensor
    active_S: Tensor
    answer_SG: Tensor
    logprob_SG: Tensor
    uniform_SG: Tensor
    stop_Z: Tensor

    @classmethod
    def empty(cls, slots: int, longest_answer: int, stop_ids: Sequence[int], device: torch.device) -> "State":
        """Allocate the state of inactive slots."""

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        return cls(
            token_S=zeros(slots, dtype=torch.int64),
            position_S=zeros(slots, dtype=torch.int64),
            generated_S=zeros(slots),
            limit_S=zeros(slots),
            active_S=zeros(slots),
            answer_SG=zeros(slots, longest_answer),
            logprob_SG=zeros(slots, longest_answer, dtype=torch.float32),
            uniform_SG=zeros(slots, longest_answer, dtype=torch.float32),
            stop_Z=torch.tensor(list(stop_ids), dtype=torch.int32, device=device),
        )

    def begin(self, seated: Sequence[tuple[int, Request]]) -> None:
        """Start a response in the slot of each request. The last token of the prompt is the input of the first decode step."""
        slots, requests = zip(*seated, strict=True)
        device, uniform_RG = self.token_S.device, np.stack([request.uniform_G for request in requests])
        slot_R = to_device(slots, device)
        self.token_S[slot_R] = to_device([request.prompt[-1] for request in requests], device)
        self.position_S[slot_R] = to_device([len(request.prompt) - 1 for request in requests], device)
        self.limit_S[slot_R] = to_device([request.max_new_tokens for request in requests], device).int()
        self.generated_S[slot_R] = 0
        self.active_S[slot_R] = 1
        self.uniform_SG[slot_R, : uniform_RG.shape[1]] = to_device(uniform_RG, device)

    def advance(self, token_B: Tensor, logprob_B: Tensor | None) -> None:
        """Append a token to the responses in the first B slots. Responses that have ended do not change."""
        rows = len(token_B)
        running_R = self.active_S[:rows].nonzero().squeeze(1)
        count_R, token_R = self.generated_S[running_R], token_B[running_R]
        self.answer_SG[running_R, count_R.long()] = token_R.int()
        if logprob_B is not None:
            self.logprob_SG[running_R, count_R.long()] = logprob_B[running_R]
        self.generated_S[running_R] = count_R + 1
        going_R = ~torch.isin(token_R, self.stop_Z) & (count_R + 1 < self.limit_S[running_R])
        self.active_S[running_R] = going_R.int()
        self.token_S[running_R] = torch.where(going_R, token_R, self.token_S[running_R])
        self.position_S[running_R] += going_R

    def move(self, source_R: Tensor, target_R: Tensor) -> None:
        """Copy the entries of the source slots to the target slots."""
        for name in ("token_S", "position_S", "generated_S", "limit_S", "active_S", "answer_SG", "logprob_SG", "uniform_SG"):
            tensor = getattr(self, name)
            tensor[target_R] = tensor[source_R]

    def read(self, slots: Sequence[int]) -> list[tuple[list[int], list[float]]]:
        """Return token ids and log-probabilities of the responses in these slots. This waits for the device."""
        slot_R = to_device(slots, self.token_S.device)
        counts = self.generated_S[slot_R].tolist()
        longest = max(counts)
        answers, logprobs = self.answer_SG[slot_R, :longest].tolist(), self.logprob_SG[slot_R, :longest].tolist()
        return [(ids[:count], each[:count]) for count, ids, each in zip(counts, answers, logprobs, strict=True)]


@dataclass(frozen=True)
class SlotSize:
    """Number of slots, positions per slot (for prompt and response), and maximum tokens of a response."""

    slots: int
    positions: int
    longest_answer: int


class Slots:
    """All slots of a model. `make` allocates them, and `free` frees them.

    Args:
        shapes: for each layer, shapes of the keys and values of one token, or of its recurrent state.
        vocabulary: vocabulary size, because a decode step has the logits of every slot in memory.
        dtype: dtype of keys, values and logits.
        stop_ids: tokens that end a response.
        options: engine options; `max_sequences` and `max_positions` are used.
    Attributes:
        size: size of the slots; None if they are not allocated.
        layers: KV cache or recurrent state of each layer.
        state: decode state.
    """

    state: State

    def __init__(
        self,
        shapes: Sequence[KVShape | RecurrentShape],
        vocabulary: int,
        dtype: torch.dtype,
        device: torch.device,
        stop_ids: Sequence[int],
        options: Options,
    ):
        self._shapes, self._vocabulary, self._dtype, self._device = shapes, vocabulary, dtype, device
        self._stop_ids, self._options = stop_ids, options
        self._max_slots = sys.maxsize  # slots that fit into memory; not limited before an allocation was cut
        self.size: SlotSize | None = None
        self.layers: list[LayerCache | StateCache] = []

    @property
    def are_recurrent(self) -> bool:
        """Return whether a layer has a recurrent state, so that decode steps change what a slot has of its prompt."""
        return any(isinstance(shape, RecurrentShape) for shape in self._shapes)

    @property
    def number(self) -> int:
        """Number of allocated slots."""
        return 0 if self.size is None else self.size.slots

    def size_for(self, answers: int, positions: int, longest_answer: int) -> SlotSize:
        """Return the slot size for a call; this is the present size if it is large enough.

        Args:
            answers: number of responses.
            positions: maximum tokens of a prompt with its response.
            longest_answer: maximum tokens of a response.
        """
        slots = min(answers, self._options.max_sequences or MAX_SLOTS[self._device.type])
        positions = max(positions, self._options.max_positions or 0)
        now = self.size
        if now is None:
            return SlotSize(slots, positions, longest_answer)
        if now.slots >= min(slots, self._max_slots) and now.positions >= positions and now.longest_answer >= longest_answer:
            return now
        return SlotSize(max(slots, now.slots), max(positions, now.positions), longest_answer)

    def make(self, size: SlotSize) -> None:
        """Allocate slots of this size, or as many as fit into memory.

        Raises:
            UserError: there is not enough memory.
        """
        positions = -(-size.positions // ROUND) * ROUND if self._device.type == "cuda" else size.positions
        slots = min(size.slots, self._slots_that_fit(positions))
        self._max_slots = slots if slots < size.slots else sys.maxsize
        try:
            self.layers = [self._layer_cache(shape, slots, positions) for shape in self._shapes]
            self.state = State.empty(slots, size.longest_answer, self._stop_ids, self._device)
        except torch.OutOfMemoryError as error:
            self.free()
            raise out_of_memory(slots, self._options) from error
        self.size = SlotSize(slots, positions, size.longest_answer)

    def _layer_cache(self, shape: KVShape | RecurrentShape, slots: int, positions: int) -> LayerCache | StateCache:
        if isinstance(shape, RecurrentShape):
            return StateCache(*(None if state is None else self._zeros(state, slots) for state in shape))
        # Zeros, because attention masks positions that were never written, but a mask does not hide NaN.
        return LayerCache(
            torch.zeros(slots, shape.heads, positions, shape.key_size, dtype=self._dtype, device=self._device),
            torch.zeros(slots, shape.heads, positions, shape.value_size, dtype=self._dtype, device=self._device),
        )

    def _zeros(self, state: StateShape, slots: int) -> Tensor:
        return torch.zeros(slots, *state.sizes, dtype=state.dtype, device=self._device)

    def _slots_that_fit(self, positions: int) -> int:
        if self._device.type != "cuda":
            return sys.maxsize
        free, _ = torch.cuda.mem_get_info(self._device)
        free += torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        cache_bytes = positions * bytes_per_position(self._shapes, self._dtype) + bytes_of_states(self._shapes)
        return max(1, int(free * SHARE_OF_FREE) // (cache_bytes + self._vocabulary * (self._dtype.itemsize + 1)))

    def free(self) -> None:
        """Free the KV caches. CUDA graphs that were recorded with them must be dropped before."""
        self.layers, self.size = [], None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def worth_freeing(self) -> bool:
        """Return whether the slots take so much memory that freeing them during training is worth it."""
        if self._device.type != "cuda":
            return True
        total = torch.cuda.get_device_properties(self._device).total_memory
        return sum(tensor.nbytes for layer in self.layers for tensor in layer if tensor is not None) > WORTH_FREEING * total

    def reset(self) -> None:
        """Mark all slots as inactive, at the start of a call."""
        self.state.active_S.zero_()
        self.state.position_S.zero_()

    def clear_states(self, slots: Sequence[int]) -> None:
        """Clear the recurrent states that earlier requests have left in these slots."""
        if self.are_recurrent:
            slot_R = to_device(slots, self._device)
            for state_S in self._states:
                state_S[slot_R] = 0

    def copy(self, pairs: Sequence[tuple[int, int]], positions: int) -> None:
        """Copy the first `positions` positions of the KV caches, and recurrent states, between slots, for each pair (source, target)."""
        if pairs:
            source_R, target_R = (to_device([pair[side] for pair in pairs], self._device) for side in (0, 1))
            self._copy(source_R, target_R, positions)

    def compact(self, compaction: Compaction) -> None:
        """Move responses to lower slots, with their KV caches, recurrent states and decode state."""
        source_R, target_R = to_device(compaction.sources, self._device), to_device(compaction.targets, self._device)
        self._copy(source_R, target_R, compaction.positions)
        self.state.move(source_R, target_R)
        self.state.active_S[compaction.used :] = 0
        self.state.position_S[compaction.used :] = 0  # so that decode steps that include these slots read little of their caches

    def _copy(self, source_R: Tensor, target_R: Tensor, positions: int) -> None:
        for layer in self.layers:
            if isinstance(layer, LayerCache):
                for cache_SKLD in layer:
                    cache_SKLD[target_R, :, :positions] = cache_SKLD[source_R, :, :positions]
        for state_S in self._states:
            state_S[target_R] = state_S[source_R]

    @property
    def _states(self) -> Iterator[Tensor]:
        return (state_S for layer in self.layers if isinstance(layer, StateCache) for state_S in layer if state_S is not None)


def bytes_per_position(shapes: Sequence[KVShape | RecurrentShape], dtype: torch.dtype) -> int:
    """Return the bytes of one position of one slot, summed over all layers with attention."""
    return sum(shape.heads * (shape.key_size + shape.value_size) for shape in shapes if isinstance(shape, KVShape)) * dtype.itemsize


def bytes_of_states(shapes: Sequence[KVShape | RecurrentShape]) -> int:
    """Return the bytes of the recurrent state of one slot, summed over all layers that have one."""
    return sum(shape.nbytes for shape in shapes if isinstance(shape, RecurrentShape))


def to_device(values: Sequence[int] | np.ndarray, device: torch.device) -> Tensor:
    """Copy host values to a tensor on the device, without waiting for the device."""
    tensor = torch.as_tensor(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
