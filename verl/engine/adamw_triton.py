"""Triton kernel of `verl.engine.fused_adamw`, which reads and writes each element of the state once.

One launch updates many tensors. A program looks up its chunk, the chunk's tensor and the tensor's addresses in tables on the device, and
then processes the chunk tile by tile. AdamW's moments are float32, or 8-bit in torchao's dynamic code.

That code has seven levels, a factor of ten apart. Each level is divided into twice as many equal intervals as the level below, and a code
stands for the midpoint of its interval. Counted over all levels, the interval's number is a concave, piecewise linear function of the
value: the minimum of seven lines, one per level. So encoding needs neither a search nor a table.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from verl.engine.moments import BLOCK

if TYPE_CHECKING:
    from verl.engine.adamw_launch import Kind, Rates, Tables, Tiling

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
EXP_AVG, EXP_AVG_SCALES, EXP_AVG_SQ, EXP_AVG_SQ_SCALES, COPY, SIZE = (tl.constexpr(column) for column in range(6))
WIDTH = tl.constexpr(BLOCK)
ROUNDS = tl.constexpr(7)  # Philox rounds; the fewest that pass its authors' tests
EXPONENT = tl.constexpr(0x7F800000)  # bit masks of float32
MANTISSA = tl.constexpr(0x007FFFFF)
WHOLE = tl.constexpr(8388608.0)  # 2**23: a float32 this large has no fraction, and its mantissa is an integer
WHOLE_BITS = tl.constexpr(0x4B000000)
LOG2_10 = tl.constexpr(3.321928094887362)


def update(tables: "Tables", kind: "Kind", rates: "Rates", factor: Tensor, seed: Tensor | None, tiling: "Tiling") -> None:
    """Take an AdamW step of all tensors in `tables` that have a gradient.

    Args:
        factor: scalar on the device that multiplies the gradients; if it is NaN, nothing is updated.
        seed: integer on the device for the stochastic rounding of bfloat16 weights; None for other dtypes.
    """
    grid = (len(tables.chunks),)
    # Only floats and tensors: Triton would compile another kernel for integers such as 1.
    numbers = (
        float(rates.lr),
        float(rates.lr / (1 - rates.betas[0] ** rates.step)),
        float((1 - rates.betas[1] ** rates.step) ** -0.5),
        float(1 - rates.betas[0]),
        float(1 - rates.betas[1]),
        float(rates.eps),
    )
    _kernel[grid](
        tables.fixed,
        tables.moving,
        tables.decay,
        tables.chunks,
        factor,
        seed,
        *numbers,
        weight_type=TYPES[kind.weight],
        gradient_type=TYPES[kind.gradient],
        copy_type=None if kind.copy is None else TYPES[kind.copy],
        eight_bit=kind.eight_bit,
        rows=tiling.rows,
        chunk_rows=tiling.rows * tiling.tiles,
        columns=tables.fixed.shape[1],
        vector=tiling.vector if kind.aligned else 1,
        num_warps=tiling.warps,
    )


@triton.jit
def _kernel(  # type: ignore[no-untyped-def]
    fixed,
    moving,
    decay,
    chunks,
    factor,
    seed,
    lr,
    step_size,  # learning rate over the first bias correction
    inverse_root,  # 1 / sqrt of the second bias correction
    rest_1,  # 1 - beta
    rest_2,
    eps,
    weight_type: tl.constexpr,
    gradient_type: tl.constexpr,
    copy_type: tl.constexpr,
    eight_bit: tl.constexpr,
    rows: tl.constexpr,
    chunk_rows: tl.constexpr,
    columns: tl.constexpr,
    vector: tl.constexpr,
):
    program = tl.program_id(0)
    tensor = tl.load(chunks + 2 * program)
    first = tl.load(chunks + 2 * program + 1).to(tl.int64) * (chunk_rows * WIDTH)
    fixed += tensor * columns
    moving += tensor * 2
    weight = _pointer(moving, weight_type, vector) + first
    gradient = _pointer(moving + 1, gradient_type, vector) + first
    moment_type: tl.constexpr = tl.uint8 if eight_bit else tl.float32
    exp_avg = _pointer(fixed + EXP_AVG, moment_type, vector) + first
    exp_avg_sq = _pointer(fixed + EXP_AVG_SQ, moment_type, vector) + first
    if eight_bit:
        m_scales = _pointer(fixed + EXP_AVG_SCALES, tl.float32, 1) + first // WIDTH
        v_scales = _pointer(fixed + EXP_AVG_SQ_SCALES, tl.float32, 1) + first // WIDTH
    if copy_type is not None:
        copy = _pointer(fixed + COPY, copy_type, vector) + first
    if weight_type == tl.bfloat16:
        seed = tl.load(seed)
    factor = tl.load(factor)
    keep = 1.0 - lr * tl.load(decay + tensor)
    left = tl.minimum(tl.load(fixed + SIZE) - first, chunk_rows * WIDTH).to(tl.int32)
    left = tl.multiple_of(tl.where((tl.load(moving + 1) == 0) | (factor != factor), 0, left), vector)
    row, column = tl.arange(0, rows)[:, None], tl.arange(0, WIDTH)[None, :]
    for start in range(0, left, rows * WIDTH):
        place = start + row * WIDTH + column
        inside = place < left
        g = tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32) * factor
        w = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
        m = tl.load(exp_avg + place, mask=inside, other=0)
        v = tl.load(exp_avg_sq + place, mask=inside, other=0)
        if eight_bit:
            block = start // WIDTH + tl.arange(0, rows)
            exists = block < left // WIDTH
            m = _decode(m, signed=True) * tl.load(m_scales + block, mask=exists, other=0.0)[:, None]
            v = _decode(v, signed=False) * tl.load(v_scales + block, mask=exists, other=0.0)[:, None]
        m += (g - m) * rest_1
        v += (g * g - v) * rest_2
        w = w * keep - step_size * m / (tl.sqrt(v) * inverse_root + eps)
        if copy_type is not None:
            tl.store(copy + place, w.to(copy_type), mask=inside)
        if weight_type == tl.bfloat16:
            number = (program * chunk_rows + start // WIDTH + row) * (WIDTH // 8) + tl.arange(0, WIDTH // 8)[None, :]
            w = _rounded(w, _random_16_bits(seed, number, rows))
        tl.store(weight + place, w, mask=inside)
        if eight_bit:
            m_scale = tl.maximum(tl.max(tl.abs(m), 1), 1e-12)
            v_scale = tl.maximum(tl.max(v, 1), 1e-12)
            tl.store(m_scales + block, m_scale, mask=exists)
            tl.store(v_scales + block, v_scale, mask=exists)
            m = _encode(m * (1.0 / m_scale)[:, None], signed=True)
            v = _encode(v * (1.0 / v_scale)[:, None], signed=False)
        tl.store(exp_avg + place, m, mask=inside)
        tl.store(exp_avg_sq + place, v, mask=inside)


@triton.jit
def _pointer(entry, dtype: tl.constexpr, vector: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load a pointer from a table, and mark it as aligned to a vector."""
    return tl.multiple_of(tl.load(entry).to(tl.pointer_type(dtype)), vector * dtype.primitive_bitwidth // 8)


@triton.jit
def _decode(code, signed: tl.constexpr):  # type: ignore[no-untyped-def]
    """Decode 8-bit codes to values in [-1, 1], or in [0, 1] if unsigned."""
    code = code.to(tl.int32)
    # Twice the interval's number, plus 1: its exponent gives the level, and its mantissa the midpoint of the interval.
    odd = 2 * tl.abs(code - 127) + 1 if signed else 2 * code + 3
    bits = odd.to(tl.float32).to(tl.int32, bitcast=True)
    exponent = (bits >> 23).to(tl.float32) - (134 if signed else 135)
    mantissa = ((bits & MANTISSA) | 0x3F800000).to(tl.float32, bitcast=True)
    value = tl.minimum(tl.exp2(exponent * LOG2_10) * (0.9 * mantissa - 0.8), 1.0)
    value = tl.where(odd == (1 if signed else 3), 0.0, value)
    return tl.where(code < 127, -value, value) if signed else value


@triton.jit
def _encode(x, signed: tl.constexpr):  # type: ignore[no-untyped-def]
    """Encode values in [-1, 1], or in [0, 1] if unsigned, as the nearest codes."""
    size = tl.abs(x) if signed else x
    parts: tl.constexpr = 1 if signed else 2  # intervals of the lowest level; anything below it is zero
    # The lowest level's line is shifted so that half of its first value, where rounding to zero ends, is at 0.2, as for the others.
    slope: tl.constexpr = 1e6 / 0.9 if signed else 0.8 / 3.875e-7
    half: tl.constexpr = 2.75e-7 if signed else 1.625e-7
    part = size * slope + (parts + 0.2 - half * slope)
    for level in tl.static_range(1, 7):
        part = tl.minimum(part, size * (parts * 1e6 / 0.9 * 0.2**level) + parts * 8 / 9 * 2**level)
    # A level's first interval is wider than the last one below, whose midpoint is nearer to the first fifth of it.
    begin = (part.to(tl.int32, bitcast=True) & EXPONENT).to(tl.float32, bitcast=True)
    nearest = tl.where(part - begin < 0.2, part - 0.2, part)
    number = (nearest + (WHOLE - 0.5)).to(tl.int32, bitcast=True) - WHOLE_BITS
    is_one = part >= parts * 128 - 0.25
    rising = tl.where(is_one, 255, number + (127 if signed else -1))
    return (tl.where(x < 0, 127 - number, rising) if signed else rising).to(tl.uint8)


@triton.jit
def _rounded(x, random):  # type: ignore[no-untyped-def]
    """Round stochastically to bfloat16: the nearer neighbour is proportionally more likely."""
    bits = ((x.to(tl.int32, bitcast=True) + random) & -65536).to(tl.float32, bitcast=True)
    return tl.where(x == x, bits, x).to(tl.bfloat16)  # the addition may turn a NaN into a number


@triton.jit
def _random_16_bits(seed, number, rows: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return random integers below 2**16, [rows, WIDTH]: eight for each element of `number`."""
    a, b, c, d = tl.randint4x(seed, number, ROUNDS)
    words = tl.reshape(tl.join(tl.join(a, b), tl.join(c, d)), [rows, WIDTH // 2]).to(tl.uint32, bitcast=True)
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), [rows, WIDTH]).to(tl.int32)
