"""What a launch of the fused AdamW kernel is given."""

from dataclasses import dataclass

import torch
from torch import Tensor

from verl.engine.moments import BLOCK

ALIGNMENT = 16  # bytes that a thread reads at a time; at most so many values


@dataclass(frozen=True)
class Tiling:
    """How a launch is cut up.

    Attributes:
        rows: of BLOCK values, in one tile.
        tiles: of one program, one after another.
        vector: values side by side in one thread.
        warps: of one program.
    """

    rows: int
    tiles: int
    vector: int
    warps: int

    @property
    def chunk(self) -> int:
        """Values of one program."""
        return self.rows * self.tiles * BLOCK


@dataclass(frozen=True)
class Tables:
    """Tensors that are updated together, on the device.

    Attributes:
        fixed: by tensor, the addresses of exp_avg, its scales, exp_avg_sq, its scales and the copy (0 of what there is not), and
            the number of values.
        moving: by tensor, the addresses of its weights and of its gradient; without a gradient a tensor stays as it is.
        decay: by tensor, its weight decay.
        chunks: by program, its tensor and the chunk of it.
    """

    fixed: Tensor
    moving: Tensor
    decay: Tensor
    chunks: Tensor


@dataclass(frozen=True)
class Kind:
    """What the kernel is compiled for: dtypes (`copy` of the copies in the compute dtype, where there are any), moments, alignment.

    Attributes:
        aligned: all tensors are so many bytes from the start of the memory, and have so many values, as a thread reads at a time.
    """

    weight: torch.dtype
    gradient: torch.dtype
    copy: torch.dtype | None
    eight_bit: bool
    aligned: bool


@dataclass(frozen=True)
class Rates:
    """AdamW's numbers for one step."""

    lr: float
    betas: tuple[float, float]
    step: int  # counted from 1
    eps: float = 1e-8
