"""AdamW's state of one parameter: its moments in float32, or in 8 bits as torchao keeps them.

A moment of 8 bits is kept in blocks of BLOCK values of one row: a code for each value, and the block's largest magnitude in
float32 (Dettmers et al., 8-bit Optimizers via Block-wise Quantization, 2021). Blocks end with their row, so that a checkpoint
can be cut up between any number of processes.
"""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

BLOCK = 128  # values that share a scale; the hidden sizes of common models are multiples of it
LEAST_VALUES = 4096  # in a tensor whose moments are 8 bits; what is smaller saves nothing
MOMENTS = {"exp_avg": True, "exp_avg_sq": False}  # by AdamW's names: whether it has a sign


def local(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor; all of one that is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def fits_blocks(parameter: Tensor) -> bool:
    """Whether a parameter's moments can be 8 bits."""
    return parameter.ndim >= 2 and parameter.shape[-1] % BLOCK == 0 and parameter.numel() >= LEAST_VALUES


def zeros(shard: Tensor, *, eight_bit: bool) -> dict[str, Tensor]:
    """The state before the first step: AdamW's own names, or of an 8-bit moment its codes and its scales, one for a block."""
    state = {"step": torch.zeros(())}  # on the host, where its powers cost nothing
    for name in MOMENTS:
        if eight_bit:
            scales = (*shard.shape[:-1], shard.shape[-1] // BLOCK)
            state[f"{name}_codes"] = torch.zeros_like(shard, dtype=torch.uint8, requires_grad=False)
            state[f"{name}_scales"] = torch.zeros(scales, device=shard.device)
        else:
            state[name] = torch.zeros_like(shard, dtype=torch.float32, requires_grad=False)
    return state


def sharded_like(parameter: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A parameter's state with its tensors sharded as the parameter is; they share the memory of those given."""
    if not isinstance(parameter, DTensor):
        return state
    return {name: tensor if name == "step" else _sharded(parameter, tensor) for name, tensor in state.items()}


def _sharded(parameter: DTensor, shard: Tensor) -> DTensor:
    """A process's part of a tensor whose rows lie where the parameter's do."""
    shape = torch.Size((parameter.shape[0], *shard.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(shard, parameter.device_mesh, parameter.placements, run_check=False, shape=shape, stride=stride)
