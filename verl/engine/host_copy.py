"""A copy of a model's state in host memory, from which a checkpoint is written while training goes on."""

import os
from collections.abc import Mapping

import torch
from torch import Tensor

from verl import dist
from verl.errors import UserError

ALIGNMENT = 64  # bytes; each tensor begins at a multiple of it


class HostCopy:
    """Memory for copies of the same tensors, again and again. It is allocated once, and pinned if the tensors are on a GPU.

    All tensors are parts of one allocation: PyTorch would round each pinned tensor up to a power of two.

    Args:
        tensors: tensors of the names, shapes and dtypes that are copied later; these are copied first.
    Raises:
        UserError: this machine does not have the memory.
    """

    def __init__(self, tensors: Mapping[str, Tensor]):
        self._on_gpu = any(tensor.is_cuda for tensor in tensors.values())
        sizes = {name: -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for name, tensor in tensors.items()}
        self.bytes = sum(sizes.values())
        _check_memory(self.bytes)
        self._memory = torch.empty(self.bytes, dtype=torch.uint8)
        self._is_pinned = self._on_gpu and self._pin()
        self._copies: dict[str, Tensor] = {}
        offset = 0
        for name, tensor in tensors.items():
            self._copies[name] = _part(self._memory, offset, tensor)
            offset += sizes[name]
        self.take(tensors)

    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy the tensors' current values, and return the copies by name. They are valid until the next call."""
        for name, tensor in tensors.items():
            self._copies[name].copy_(tensor.detach(), non_blocking=True)
        if self._on_gpu:
            torch.cuda.current_stream().synchronize()
        return dict(self._copies)

    def describe(self) -> str:
        pinned = "" if not self._on_gpu else ", pinned" if self._is_pinned else ", not pinned: copies are slower"
        return f"{self.bytes / 1e9:,.1f} GB of host memory{pinned}"

    def close(self) -> None:
        """Free the memory; the copies must not be used afterwards."""
        self._copies.clear()
        if self._is_pinned:
            torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr())
            self._is_pinned = False

    def _pin(self) -> bool:
        """Pin the memory, and return whether the system allows it."""
        return int(torch.cuda.cudart().cudaHostRegister(self._memory.data_ptr(), self.bytes, 0)) == 0


def _part(memory: Tensor, offset: int, like: Tensor) -> Tensor:
    """Return a part of the memory as a tensor with a storage of its own, as safetensors and PyTorch take shared ones for tied weights."""
    if like.numel() == 0:
        return torch.empty(like.shape, dtype=like.dtype)
    return torch.frombuffer(memory.numpy().data, dtype=like.dtype, count=like.numel(), offset=offset).view(like.shape)


def _check_memory(size: int) -> None:
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if size * processes > dist.host_memory():
        what = f"needs {size * processes / 1e9:,.1f} GB of host memory, and this machine has {dist.host_memory() / 1e9:,.1f} GB"
        raise UserError(what, where="trainer.async_save", fix="set trainer.async_save=false")
