"""AdamW's state of one parameter: float32 moments, or 8-bit moments in torchao's format.

An 8-bit moment is stored in blocks of BLOCK elements of a row: one code per element, and the block's largest magnitude in float32
(Dettmers et al., 8-bit Optimizers via Block-wise Quantization, 2021). No block crosses a row, so that a checkpoint can be resharded to any
number of ranks.
"""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

BLOCK = 128  # elements that share a scale; the hidden sizes of common models are multiples of it
MIN_ELEMENTS = 4096  # smaller tensors keep float32 moments, because 8 bits would save nothing
MOMENTS = {"exp_avg": True, "exp_avg_sq": False}  # AdamW's names: whether the moment is signed


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a tensor, or the tensor itself if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def fits_blocks(parameter: Tensor) -> bool:
    """Return whether a parameter can have 8-bit moments."""
    return parameter.ndim >= 2 and parameter.shape[-1] % BLOCK == 0 and parameter.numel() >= MIN_ELEMENTS


def zeros(shard: Tensor, *, eight_bit: bool) -> dict[str, Tensor]:
    """Return the state before the first step: AdamW's own names, or codes and scales (one per block) of each 8-bit moment."""
    state = {"step": torch.zeros(())}  # on the CPU, where computing the bias corrections costs nothing
    for name in MOMENTS:
        if eight_bit:
            scales = (*shard.shape[:-1], shard.shape[-1] // BLOCK)
            state[f"{name}_codes"] = torch.zeros_like(shard, dtype=torch.uint8, requires_grad=False)
            state[f"{name}_scales"] = torch.zeros(scales, device=shard.device)
        else:
            state[name] = torch.zeros_like(shard, dtype=torch.float32, requires_grad=False)
    return state


def sharded_like(parameter: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Wrap a parameter's state in DTensors that are sharded like the parameter and share the state's memory."""
    if not isinstance(parameter, DTensor):
        return state
    return {name: tensor if name == "step" else _sharded(parameter, tensor) for name, tensor in state.items()}


def _sharded(parameter: DTensor, shard: Tensor) -> DTensor:
    """Wrap a local shard in a DTensor whose rows are distributed like the parameter's."""
    shape = torch.Size((parameter.shape[0], *shard.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(shard, parameter.device_mesh, parameter.placements, run_check=False, shape=shape, stride=stride)
