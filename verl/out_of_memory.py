"""Errors of memory that ran out, described in one line: of a GPU, or of this machine."""

import re
import sys

from verl.errors import UserError

GIB = 2**30
# A CPU's allocator raises a plain RuntimeError.
ON_HOST = re.compile(r"DefaultCPUAllocator: (?:can't|not enough) allocate memory|not enough memory: you tried to allocate", re.IGNORECASE)
FIXES = (
    "use smaller micro-batches (data.micro_batch_size_per_gpu, data.max_tokens_per_micro_batch), a smaller data.max_length, "
    "model.enable_gradient_checkpointing=true, or adapters (model.lora_rank=32)"
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out, of a GPU or of this machine."""
    if isinstance(error, MemoryError) or _of_gpu(error):
        return True
    return isinstance(error, RuntimeError) and ON_HOST.search(str(error)) is not None


def _of_gpu(error: BaseException) -> bool:
    return "torch" in sys.modules and isinstance(error, sys.modules["torch"].OutOfMemoryError)


def memory_error(error: BaseException, *, where: str | None = None, what: str = "", fix: str = FIXES) -> UserError | None:
    """Return the one-line error for memory that ran out; None if the exception is something else.

    Args:
        where: what the run was doing, such as `step 7`.
        what: further findings, such as the longest row; they follow what the device has.
    """
    if not is_out_of_memory(error):
        return None
    from verl import dist  # imports torch, which not every command does

    on_gpu = _of_gpu(error)
    has = device_text() if on_gpu else f"it has {dist.host_memory() / GIB:.1f} GiB"
    details = f"{has}; {what}" if what else has
    described = UserError(f"{'the GPU' if on_gpu else 'this machine'} ran out of memory: {details}", where=where, fix=fix)
    described.tells = True  # perhaps only this rank raises it
    return described


def device_text() -> str:
    """Say how much memory the GPU has, and how much of it this process has used at most."""
    import torch

    if not torch.cuda.is_available():
        return "no GPU is in use"
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return f"it has {total / GIB:.1f} GiB, of which this process held {torch.cuda.max_memory_reserved() / GIB:.1f}"
