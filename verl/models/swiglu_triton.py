"""SwiGLU with the small products of LoRA adapters in the same pass over memory, as Triton kernels.

The gate, its partner and their gradients are the widest tensors of a layer. An adapter needs each of them once more, to be
multiplied with something R wide; here that happens while they are on the chip.

Dimensions: T tokens, F width of the feed-forward part, R rank.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Tokens and columns of a tile, warps and pipeline stages.
FORWARD = (64, 64, 4, 3)
BACKWARD = (64, 64, 4, 2)
SPANS = 8  # shares of the tokens whose sums over tokens are added up at the end, so that there is work for the whole chip
LARGEST_RANK = 128  # a tile's sums fit into registers


def serves(*tensors_TF: Tensor, ranks: tuple[int, ...]) -> bool:
    """Whether these kernels can be called."""
    return all(x.is_cuda and x.is_contiguous() and x.dtype == torch.bfloat16 for x in tensors_TF) and max(ranks) <= LARGEST_RANK


def forward(gate_TF: Tensor, up_TF: Tensor, a_RF: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """product_TF = silu(gate) * up, and hidden_TR = scale * product Aᵀ."""
    tokens, width = gate_TF.shape
    rank = len(a_RF)
    product_TF = torch.empty_like(gate_TF)
    hidden_TR = torch.empty(tokens, rank, dtype=gate_TF.dtype, device=gate_TF.device)
    rows, columns, warps, stages = FORWARD
    grid = (triton.cdiv(tokens, rows),)
    _forward[grid](
        gate_TF, up_TF, a_RF, product_TF, hidden_TR, tokens, scale, width, rank, _padded(rank), rows, columns,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return product_TF, hidden_TR


def backward(
    product_gradient_TF: Tensor, gate_TF: Tensor, up_TF: Tensor, gate_hidden_TR: Tensor, up_hidden_TR: Tensor, down_gradient_TR: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients by the gate and by its partner, and three sums over the tokens.

    Args:
        product_gradient_TF: by silu(gate) * up.
        gate_hidden_TR, up_hidden_TR: what the adapters of gate and up make of their input.
        down_gradient_TR: gradient by what the adapter of down makes of its input.
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
    return gate_gradient_TF, up_gradient_TF, *(total.sum(0).to(gate_TF.dtype) for total in sums)


def _padded(rank: int) -> int:
    return max(16, triton.next_power_of_2(rank))


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    gate, up, a, product, hidden, tokens, scale,
    width: tl.constexpr, rank: tl.constexpr, padded: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    r = tl.arange(0, padded)
    total = tl.zeros([rows, padded], tl.float32)
    for first in range(0, width, columns):
        column = first + tl.arange(0, columns)
        place = row[:, None].to(tl.int64) * width + column[None, :]
        real = (row < tokens)[:, None] & (column < width)[None, :]
        g = tl.load(gate + place, mask=real, other=0.0).to(tl.float32)
        u = tl.load(up + place, mask=real, other=0.0).to(tl.float32)
        p = (g * tl.sigmoid(g) * u).to(product.dtype.element_ty)
        tl.store(product + place, p, mask=real)
        weights = tl.load(a + r[None, :] * width + column[:, None], mask=(r < rank)[None, :] & (column < width)[:, None], other=0.0)
        total = tl.dot(p, weights.to(p.dtype), total)
    place = row[:, None].to(tl.int64) * rank + r[None, :]
    tl.store(hidden + place, (total * scale).to(hidden.dtype.element_ty), mask=(row < tokens)[:, None] & (r < rank)[None, :])


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    product_gradient, gate, up, gate_hidden, up_hidden, down_gradient, gate_gradient, up_gradient, gate_sum, up_sum, down_sum,
    gate_stride, up_stride, down_stride, tokens, tiles, width: tl.constexpr,
    gate_rank: tl.constexpr, up_rank: tl.constexpr, down_rank: tl.constexpr, padded: tl.constexpr,
    rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    column, r = tl.program_id(0) * columns + tl.arange(0, columns), tl.arange(0, padded)
    gate_total = tl.zeros([columns, padded], tl.float32)
    up_total = tl.zeros([columns, padded], tl.float32)
    down_total = tl.zeros([columns, padded], tl.float32)
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
        at = row[:, None].to(tl.int64)
        inside = (row < tokens)[:, None]
        gate_h = tl.load(gate_hidden + at * gate_stride + r[None, :], mask=inside & (r < gate_rank)[None, :], other=0.0)
        gate_total = tl.dot(tl.trans(gate_slope), gate_h, gate_total)
        up_h = tl.load(up_hidden + at * up_stride + r[None, :], mask=inside & (r < up_rank)[None, :], other=0.0)
        up_total = tl.dot(tl.trans(up_slope), up_h, up_total)
        down_g = tl.load(down_gradient + at * down_stride + r[None, :], mask=inside & (r < down_rank)[None, :], other=0.0)
        down_total = tl.dot(tl.trans(p), down_g, down_total)
    span = tl.program_id(1).to(tl.int64) * width + column[:, None]
    wide = (column < width)[:, None]
    tl.store(gate_sum + span * gate_rank + r[None, :], gate_total, mask=wide & (r < gate_rank)[None, :])
    tl.store(up_sum + span * up_rank + r[None, :], up_total, mask=wide & (r < up_rank)[None, :])
    tl.store(down_sum + span * down_rank + r[None, :], down_total, mask=wide & (r < down_rank)[None, :])
