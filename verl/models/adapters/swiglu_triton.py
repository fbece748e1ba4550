"""Triton kernels for SwiGLU, with the small matmuls of LoRA adapters fused into the backward pass.

The gate and up activations and their gradients are the widest tensors of a layer. The gradients of the adapters need each of them again,
multiplied by an R-wide matrix. These kernels do that while the tensors are in registers and shared memory.

Dimensions: T tokens, F intermediate size of the MLP, R rank.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 4096, 8  # elements and warps per program of the forward pass
BACKWARD = (32, 64, 4, 3)  # tokens and columns of a tile, warps and pipeline stages: the fastest of nine on an H200
SPANS = 24  # the tokens are split into spans, so that there are enough programs for the GPU; the sums of the spans are added at the end
LARGEST_RANK = 128  # up to this rank, a tile's sums fit into registers


def forward(gate_TF: Tensor, up_TF: Tensor, product_TF: Tensor) -> None:
    """Write silu(gate) * up to product_TF, whose row stride may be larger than F."""
    grid = (triton.cdiv(gate_TF.numel(), BLOCK),)
    _forward[grid](gate_TF, up_TF, product_TF, product_TF.stride(0), gate_TF.numel(), gate_TF.shape[1], BLOCK, num_warps=WARPS)


def backward(
    product_gradient_TF: Tensor, gate_TF: Tensor, up_TF: Tensor, gate_hidden_TR: Tensor, up_hidden_TR: Tensor, down_gradient_TR: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of gate and up, and those of three adapter matrices, which are sums over the tokens.

    Args:
        product_gradient_TF: gradient of silu(gate) * up.
        gate_hidden_TR, up_hidden_TR: x Aᵀ of the adapters of gate and up.
        down_gradient_TR: gradient of x Aᵀ of the adapter of down.
    Returns:
        gate_gradient_TF, up_gradient_TF, gate_gradientᵀ gate_hidden and up_gradientᵀ up_hidden, [F, R], and
        productᵀ down_gradient, [F, R].
    """
    tokens, width = gate_TF.shape
    ranks = [x.shape[1] for x in (gate_hidden_TR, up_hidden_TR, down_gradient_TR)]
    gate_gradient_TF, up_gradient_TF = torch.empty_like(gate_TF), torch.empty_like(up_TF)
    spans = min(SPANS, triton.cdiv(tokens, BACKWARD[0]))
    sums = [torch.empty(spans, width, rank, dtype=torch.float32, device=gate_TF.device) for rank in ranks]
    rows, columns, warps, stages = BACKWARD
    grid = (triton.cdiv(width, columns), spans)
    _backward[grid](
        product_gradient_TF, gate_TF, up_TF, gate_hidden_TR, up_hidden_TR, down_gradient_TR, gate_gradient_TF, up_gradient_TF, *sums,
        *(x.stride(0) for x in (gate_hidden_TR, up_hidden_TR, down_gradient_TR)),
        tokens, triton.cdiv(triton.cdiv(tokens, rows), spans), width, *ranks, _padded(max(ranks)), rows, columns,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    gate_b, up_b, down_a = (total.sum(0).to(gate_TF.dtype) for total in sums)
    return gate_gradient_TF, up_gradient_TF, gate_b, up_b, down_a


def _padded(rank: int) -> int:
    return max(16, int(triton.next_power_of_2(rank)))


@triton.jit
def _forward(gate, up, product, stride, values, width: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    g = tl.load(gate + place, mask=place < values, other=0.0).to(tl.float32)
    u = tl.load(up + place, mask=place < values, other=0.0).to(tl.float32)
    into = place // width * stride + place % width
    tl.store(product + into, (g * tl.sigmoid(g) * u).to(product.dtype.element_ty), mask=place < values)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    product_gradient, gate, up, gate_hidden, up_hidden, down_gradient, gate_gradient, up_gradient, gate_sum, up_sum, down_sum,
    gate_stride, up_stride, down_stride, tokens, tiles, width: tl.constexpr,
    gate_rank: tl.constexpr, up_rank: tl.constexpr, down_rank: tl.constexpr, padded: tl.constexpr,
    rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    column, r = tl.program_id(0) * columns + tl.arange(0, columns), tl.arange(0, padded)
    # [rank, columns]: a tile of gradients is then the right operand, which tensor cores read from shared memory without a transpose.
    gate_total = tl.zeros([padded, columns], tl.float32)
    up_total = tl.zeros([padded, columns], tl.float32)
    down_total = tl.zeros([padded, columns], tl.float32)
    for tile in range(tl.program_id(1) * tiles, (tl.program_id(1) + 1) * tiles):
        row = tile * rows + tl.arange(0, rows)
        real = (row < tokens)[:, None] & (column < width)[None, :]
        place = row[:, None].to(tl.int64) * width + column[None, :]
        slope = tl.load(product_gradient + place, mask=real, other=0.0).to(tl.float32)
        g = tl.load(gate + place, mask=real, other=0.0).to(tl.float32)
        u = tl.load(up + place, mask=real, other=0.0).to(tl.float32)
        open_ = tl.sigmoid(g)
        silu = g * open_
        up_slope = (slope * silu).to(up_gradient.dtype.element_ty)
        gate_slope = (slope * u * open_ * (1 + g - silu)).to(gate_gradient.dtype.element_ty)
        p = (silu * u).to(gate_gradient.dtype.element_ty)
        tl.store(up_gradient + place, up_slope, mask=real)
        tl.store(gate_gradient + place, gate_slope, mask=real)
        at = row[None, :].to(tl.int64)
        inside = (row < tokens)[None, :]
        gate_h = tl.load(gate_hidden + at * gate_stride + r[:, None], mask=inside & (r < gate_rank)[:, None], other=0.0)
        gate_total = tl.dot(gate_h, gate_slope, gate_total)
        up_h = tl.load(up_hidden + at * up_stride + r[:, None], mask=inside & (r < up_rank)[:, None], other=0.0)
        up_total = tl.dot(up_h, up_slope, up_total)
        down_g = tl.load(down_gradient + at * down_stride + r[:, None], mask=inside & (r < down_rank)[:, None], other=0.0)
        down_total = tl.dot(down_g, p, down_total)
    span = tl.program_id(1).to(tl.int64) * width + column[None, :]
    wide = (column < width)[None, :]
    tl.store(gate_sum + span * gate_rank + r[:, None], gate_total, mask=wide & (r < gate_rank)[:, None])
    tl.store(up_sum + span * up_rank + r[:, None], up_total, mask=wide & (r < up_rank)[:, None])
    tl.store(down_sum + span * down_rank + r[:, None], down_total, mask=wide & (r < down_rank)[:, None])
