"""What lies on the device while answers are generated: keys and values in slots, and how far each slot is.

Dimensions: S slots, L positions of a slot, K key-value heads, D head size, G longest answer, Z stop tokens, R slots that change.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from verl.rollout._attention import LayerCache, Shape


@dataclass
class State:
    """One entry a slot.

    Attributes:
        token_S: the newest token, which the next step puts in, int64.
        position_S: where it stands, int64.
        generated_S: tokens of the answer so far, int32.
        limit_S: tokens at which it is cut, int32.
        active_S: 1 until the answer has ended, int32.
        answer_SG: its tokens, int32.
        logprob_SG: their log-probabilities, float32.
        uniform_SG: random numbers to draw them with, float32.
        stop_Z: tokens that end an answer, int32.
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

    def begin(
        self, slots: Sequence[int], tokens: Sequence[int], positions: Sequence[int], limits: Sequence[int], uniforms: np.ndarray
    ) -> None:
        """Let slots start an answer each, behind this token at this position."""
        slot_R = to_device(slots, self.token_S.device)
        self.token_S[slot_R] = to_device(tokens, self.token_S.device)
        self.position_S[slot_R] = to_device(positions, self.token_S.device)
        self.limit_S[slot_R] = to_device(limits, self.token_S.device).int()
        self.generated_S[slot_R] = 0
        self.active_S[slot_R] = 1
        self.uniform_SG[slot_R, : uniforms.shape[1]] = to_device(uniforms, self.token_S.device)

    def move(self, source_R: Tensor, target_R: Tensor) -> None:
        """Copy what slots hold into others."""
        for name in ("token_S", "position_S", "generated_S", "limit_S", "active_S", "answer_SG", "logprob_SG", "uniform_SG"):
            tensor = getattr(self, name)
            tensor[target_R] = tensor[source_R]

    def advance(self, token_B: Tensor, logprob_B: Tensor | None) -> None:
        """Write down a token for each of the first B slots; those that have ended stay as they are."""
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


class Caches:
    """Keys and values of all layers.

    Args:
        shapes: of each layer.
        slots, positions: how many.
    """

    def __init__(self, shapes: Sequence[Shape], slots: int, positions: int, dtype: torch.dtype, device: torch.device):
        # Zeros: positions that were never written are masked, and a mask does not hide what is not a number.
        self.layers = [
            LayerCache(
                torch.zeros(slots, shape.heads, positions, shape.key_size, dtype=dtype, device=device),
                torch.zeros(slots, shape.heads, positions, shape.value_size, dtype=dtype, device=device),
            )
            for shape in shapes
        ]

    def move(self, source_R: Tensor, target_R: Tensor, positions: int) -> None:
        """Copy the first positions of slots into others."""
        for layer in self.layers:
            for slots_SKLD in layer:
                slots_SKLD[target_R, :, :positions] = slots_SKLD[source_R, :, :positions]


def bytes_of_position(shapes: Sequence[Shape], dtype: torch.dtype) -> int:
    """What one position of one slot takes in all layers."""
    return sum(shape.heads * (shape.key_size + shape.value_size) for shape in shapes) * dtype.itemsize


def to_device(values: Sequence[int] | np.ndarray, device: torch.device) -> Tensor:
    """Numbers of the host, without waiting for the device."""
    tensor = torch.as_tensor(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
