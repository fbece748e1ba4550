"""Faster float32 matmuls on non-Intel CPUs.

PyTorch runs float32 matmuls on a CPU through MKL, which uses AVX-512 only on Intel processors. oneDNN, which PyTorch includes too, uses
it on every CPU that has it: on an AMD EPYC of 2025 it is 2.2 times as fast. Both compute in float32.

oneDNN caches a packed copy of the weights for each input shape. To keep the cache small, rows are passed in chunks of a few fixed sizes.

Dimensions: T rows, in one or more dimensions; K input features, N output features.
"""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MIN_MULTIPLICATIONS = 2**22  # below this, oneDNN is not faster, because a call takes at least 60 µs
MAX_WIDENING = 512  # N / K; above this, writing the output takes most of the time, and chunks are written twice
CHUNK_ROWS = (1024, 512, 256, 128, 64)  # rows per call


def use_whole_cpu(model: nn.Module) -> None:
    """Let the model's linear layers use oneDNN if it is faster on this machine.

    Layers on a GPU are not changed. Neither are compiled models, because torch.compile would compile each of their layers separately.
    """
    if not is_faster() or any(module._compiled_call_impl is not None for module in model.modules()):
        return
    for module in model.modules():
        if type(module) is nn.Linear and not module.weight.is_cuda and "forward" not in module.__dict__:
            module.__dict__["forward"] = MethodType(_forward, module)


@cache
def is_faster() -> bool:
    """Return whether the CPU has AVX-512 and is not Intel's, and PyTorch has both libraries."""
    has_both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return has_both and torch.backends.cpu.get_cpu_capability() == "AVX512" and _vendor() not in ("", "GenuineIntel")


def _vendor() -> str:
    """Return the CPU vendor according to Linux, or "" if unknown."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")


def _forward(layer: nn.Linear, input_TK: Tensor) -> Tensor:
    return linear(input_TK, layer.weight, layer.bias)


def linear(input_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    """Same as `torch.nn.functional.linear`, but large float32 products on the CPU run through oneDNN."""
    if not _use_onednn(input_TK, weight_NK):
        return F.linear(input_TK, weight_NK, bias_N)
    output_TN: Tensor = _Linear.apply(input_TK, weight_NK, bias_N)
    return output_TN


def multiply(rows_TK: Tensor, weight_NK: Tensor, *, out: Tensor) -> Tensor:
    """Return rows · weightᵀ, without a gradient. The result is `out`, or a new tensor if oneDNN computed it."""
    return _product(rows_TK, weight_NK) if _use_onednn(rows_TK, weight_NK) else torch.mm(rows_TK, weight_NK.T, out=out)


def add_outer(total_NK: Tensor, left_TN: Tensor, right_TK: Tensor) -> None:
    """Add leftᵀ · right to `total_NK` in place, without a gradient."""
    if _use_onednn(right_TK, left_TN.T):
        _add_outer(total_NK, left_TN, right_TK)
    else:
        total_NK.addmm_(left_TN.T, right_TK)


def _use_onednn(rows_TK: Tensor, weight_NK: Tensor) -> bool:
    """Return whether oneDNN supports these tensors and is faster for them."""
    if torch.compiler.is_compiling() or not is_faster():  # in this order, because the compiler cannot trace is_faster
        return False
    rows = rows_TK.numel() // max(1, rows_TK.shape[-1])
    if len(weight_NK) > MAX_WIDENING * weight_NK.shape[1] or not any(_chunks(rows, weight_NK.numel())):
        return False
    return all(type(x) in (Tensor, nn.Parameter) and x.dtype == torch.float32 and x.device.type == "cpu" for x in (rows_TK, weight_NK))


class _Linear(torch.autograd.Function):
    """A linear layer whose forward and backward matmuls run through oneDNN."""

    @staticmethod
    def forward(ctx: Any, input_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
        ctx.save_for_backward(input_TK, weight_NK)
        return _product(input_TK, weight_NK, bias_N)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_TN,), (input_TK, weight_NK) = grads, ctx.saved_tensors
        flat_TN, weight_grad_NK = grad_TN.reshape(-1, len(weight_NK)), None
        if ctx.needs_input_grad[1]:
            weight_grad_NK = torch.zeros_like(weight_NK)
            _add_outer(weight_grad_NK, flat_TN, input_TK.reshape(-1, input_TK.shape[-1]))
        return (
            _product(grad_TN, weight_NK.T) if ctx.needs_input_grad[0] else None,
            weight_grad_NK,
            flat_TN.sum(0) if ctx.needs_input_grad[2] else None,
        )


def _product(rows_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    product_TN, done = rows_TK.new_empty(*rows_TK.shape[:-1], len(weight_NK)), 0
    flat_TK, flat_TN = rows_TK.reshape(-1, rows_TK.shape[-1]), product_TN.view(-1, len(weight_NK))
    for chunk in _chunks(len(flat_TK), weight_NK.numel()):
        flat_TN[chunk], done = _call(flat_TK[chunk], weight_NK, bias_N), chunk.stop
    if done < len(flat_TK):
        flat_TN[done:] = F.linear(flat_TK[done:], weight_NK, bias_N)
    return product_TN


def _add_outer(total_NK: Tensor, left_TN: Tensor, right_TK: Tensor) -> None:
    done = 0
    for chunk in _chunks(len(right_TK), total_NK.numel()):
        total_NK += _call(left_TN[chunk].T, right_TK[chunk].T, None)
        done = chunk.stop
    if done < len(right_TK):
        total_NK.addmm_(left_TN[done:].T, right_TK[done:])


def _chunks(rows: int, multiplications: int) -> Iterator[slice]:
    """Yield the chunks of rows for oneDNN. The last rows are omitted if they are too few for a call.

    Args:
        multiplications: number of multiplications per row.
    """
    start = 0
    for size in CHUNK_ROWS:
        while rows - start >= size and size * multiplications >= MIN_MULTIPLICATIONS:
            yield slice(start, start + size)
            start += size


def _call(rows_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    product_TN: Tensor = torch.ops.mkldnn._linear_pointwise(rows_TK, weight_NK, bias_N, "none", [], "")
    return product_TN
