"""Arguments of a launch of the fused AdamW kernel."""

from dataclasses import dataclass

import torch
from torch import Tensor

from verl.engine.moments import BLOCK

ALIGNMENT = 16  # bytes that a thread loads at once; at most as many elements


@dataclass(frozen=True)
class Tiling:
    """Tile sizes of a launch.

    Attributes:
        rows: rows of BLOCK elements per tile.
        tiles: tiles per program, processed sequentially.
        vector: adjacent elements per thread.
        warps: warps per program.
    """

    rows: int
    tiles: int
    vector: int
    warps: int

    @property
    def chunk(self) -> int:
        """Elements per program."""
        return self.rows * self.tiles * BLOCK


@dataclass(frozen=True)
class Tables:
    """Tables of the tensors that one launch updates, on the device.

    Attributes:
        fixed: per tensor, the addresses of exp_avg, its scales, exp_avg_sq, its scales and the working copy (0 if absent), and
            the number of elements.
        moving: per tensor, the addresses of its weights and its gradient; a tensor with gradient address 0 is not updated.
        decay: per tensor, the weight decay.
        chunks: per program, the index of its tensor and of the chunk in that tensor.
    """

    fixed: Tensor
    moving: Tensor
    decay: Tensor
    chunks: Tensor


@dataclass(frozen=True)
class Kind:
    """Compile-time parameters of the kernel: dtypes, moments and alignment.

    Attributes:
        copy: dtype of the working copies; None if there are none.
        eight_bit: whether the moments are 8-bit; else they are float32.
        aligned: whether the addresses and sizes of all tensors are multiples of ALIGNMENT.
    """

    weight: torch.dtype
    gradient: torch.dtype
    copy: torch.dtype | None
    eight_bit: bool
    aligned: bool


@dataclass(frozen=True)
class Rates:
    """AdamW's hyperparameters for one step."""

    lr: float
    betas: tuple[float, float]
    step: int  # counted from 1
    eps: float = 1e-8
