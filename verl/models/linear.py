"""Matrix products on CPUs of which PyTorch's own use half.

PyTorch leaves float32 products on a CPU to MKL, which uses AVX-512 on Intel's processors alone. oneDNN, a part of PyTorch too, uses it on
all that have it: on an AMD EPYC of 2025 it is 2.2 times as fast. The arithmetic is float32 in both.

oneDNN keeps what it made for each shape that it has seen, a packed copy of the weights included. So that this is little, rows go
through it in pieces of few sizes.

Dimensions: T rows, in one or more dimensions; K numbers in, N out.
"""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ENOUGH = 2**22  # multiplications, below which a call of oneDNN, which takes 60 µs at least, is not the faster
WIDEST = 512  # outputs for each number in: a product of more is bound by writing them, which pieces do twice
PIECES = (1024, 512, 256, 128, 64)  # rows that go through it at a time


def use_whole_cpu(model: nn.Module) -> None:
    """Let the model's linear layers use the faster of the two libraries. Where there is no faster one, nothing changes.

    Layers on a GPU stay as they are, and those that torch.compile runs: it would compile each of them by itself.
    """
    if not is_faster() or any(module._compiled_call_impl is not None for module in model.modules()):
        return
    for module in model.modules():
        if type(module) is nn.Linear and not module.weight.is_cuda and "forward" not in module.__dict__:
            module.__dict__["forward"] = MethodType(_forward, module)


@cache
def is_faster() -> bool:
    """Whether this machine has a CPU with AVX-512 that is not Intel's, and a PyTorch with both libraries."""
    has_both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return has_both and torch.backends.cpu.get_cpu_capability() == "AVX512" and _vendor() not in ("", "GenuineIntel")


def _vendor() -> str:
    """Who made the CPU, as Linux says it; "": it does not."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")


def _forward(layer: nn.Linear, input_TK: Tensor) -> Tensor:
    return linear(input_TK, layer.weight, layer.bias)


def linear(input_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    """As `torch.nn.functional.linear`; large products of float32 in host memory through oneDNN."""
    if not _suits(input_TK, weight_NK):
        return F.linear(input_TK, weight_NK, bias_N)
    output_TN: Tensor = _Linear.apply(input_TK, weight_NK, bias_N)
    return output_TN


def multiply(rows_TK: Tensor, weight_NK: Tensor, *, out: Tensor) -> Tensor:
    """Without a gradient: rows · weightᵀ into `out`, or, where oneDNN is used, perhaps elsewhere. Returns where it lies."""
    return _product(rows_TK, weight_NK) if _suits(rows_TK, weight_NK) else torch.mm(rows_TK, weight_NK.T, out=out)


def add_outer(total_NK: Tensor, left_TN: Tensor, right_TK: Tensor) -> None:
    """Without a gradient: add leftᵀ · right where `total_NK` lies."""
    if _suits(right_TK, left_TN.T):
        _add_outer(total_NK, left_TN, right_TK)
    else:
        total_NK.addmm_(left_TN.T, right_TK)


def _suits(rows_TK: Tensor, weight_NK: Tensor) -> bool:
    """Whether oneDNN takes these, and is the faster."""
    if torch.compiler.is_compiling() or not is_faster():  # in this order: the compiler cannot follow the second
        return False
    rows = rows_TK.numel() // max(1, rows_TK.shape[-1])
    if len(weight_NK) > WIDEST * weight_NK.shape[1] or not any(_pieces(rows, weight_NK.numel())):
        return False
    return all(type(x) in (Tensor, nn.Parameter) and x.dtype == torch.float32 and x.device.type == "cpu" for x in (rows_TK, weight_NK))


class _Linear(torch.autograd.Function):
    """All three products through oneDNN."""

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
    for piece in _pieces(len(flat_TK), weight_NK.numel()):
        flat_TN[piece], done = _call(flat_TK[piece], weight_NK, bias_N), piece.stop
    if done < len(flat_TK):
        flat_TN[done:] = F.linear(flat_TK[done:], weight_NK, bias_N)
    return product_TN


def _add_outer(total_NK: Tensor, left_TN: Tensor, right_TK: Tensor) -> None:
    done = 0
    for piece in _pieces(len(right_TK), total_NK.numel()):
        total_NK += _call(left_TN[piece].T, right_TK[piece].T, None)
        done = piece.stop
    if done < len(right_TK):
        total_NK.addmm_(left_TN[done:].T, right_TK[done:])


def _pieces(rows: int, multiplications: int) -> Iterator[slice]:
    """Rows to take at a time, from the first on; the last few, which are not worth a call, are left out.

    Args:
        multiplications: for each row.
    """
    start = 0
    for size in PIECES:
        while rows - start >= size and size * multiplications >= ENOUGH:
            yield slice(start, start + size)
            start += size


def _call(rows_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    product_TN: Tensor = torch.ops.mkldnn._linear_pointwise(rows_TK, weight_NK, bias_N, "none", [], "")
    return product_TN
