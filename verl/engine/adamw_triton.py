"""The update of `verl.engine.fused_adamw` as Triton kernels: each value of the state is read once and written once.

One launch serves many tensors. A program looks up its chunk, the chunk's tensor and the tensor's addresses in tables on the
device, and then goes through the chunk by tiles. Two forms of AdamW's moments: float32, or 8 bits in torchao's dynamic code.

That code's values come in seven levels a factor of ten apart, each cut into twice as many equal parts as the one below it, and
a value is the middle of its part. Counted through all levels, the part that holds a number grows ever more slowly with it:
it is the lowest of seven straight lines, one a level. So nothing is searched or looked up.
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
ROUNDS = tl.constexpr(7)  # of Philox; the fewest that pass its authors' tests
EXPONENT = tl.constexpr(0x7F800000)  # of a float32's bits
MANTISSA = tl.constexpr(0x007FFFFF)
WHOLE = tl.constexpr(8388608.0)  # 2**23: a float32 this large has no fraction, and its mantissa is an integer
WHOLE_BITS = tl.constexpr(0x4B000000)
LOG2_10 = tl.constexpr(3.321928094887362)


def update(tables: "Tables", kind: "Kind", rates: "Rates", factor: Tensor, seed: Tensor | None, tiling: "Tiling") -> None:
    """AdamW's step of all tensors of `tables` that have a gradient.

    Args:
        factor: a scalar on the device, by which gradients are multiplied first; where it is no number, nothing is updated.
        seed: an integer on the device, for the rounding of bfloat16 weights; None for others.
    """
    grid = (len(tables.chunks),)
    # Only floats and tensors, since Triton would compile anew for integers such as 1.
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
    inverse_root,  # of the second bias correction
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
    """An address in a table, of memory that starts with a whole vector."""
    return tl.multiple_of(tl.load(entry).to(tl.pointer_type(dtype)), vector * dtype.primitive_bitwidth // 8)


@triton.jit
def _decode(code, signed: tl.constexpr):  # type: ignore[no-untyped-def]
    """The values of codes, from -1 to 1, or from 0."""
    code = code.to(tl.int32)
    # Twice the number of the part, plus 1: its exponent is that of the level, and its mantissa the middle of the part.
    odd = 2 * tl.abs(code - 127) + 1 if signed else 2 * code + 3
    bits = odd.to(tl.float32).to(tl.int32, bitcast=True)
    exponent = (bits >> 23).to(tl.float32) - (134 if signed else 135)
    mantissa = ((bits & MANTISSA) | 0x3F800000).to(tl.float32, bitcast=True)
    value = tl.minimum(tl.exp2(exponent * LOG2_10) * (0.9 * mantissa - 0.8), 1.0)
    value = tl.where(odd == (1 if signed else 3), 0.0, value)
    return tl.where(code < 127, -value, value) if signed else value


@triton.jit
def _encode(x, signed: tl.constexpr):  # type: ignore[no-untyped-def]
    """The codes whose values are nearest to numbers from -1 to 1, or from 0."""
    size = tl.abs(x) if signed else x
    parts: tl.constexpr = 1 if signed else 2  # of the lowest level; those below it count for zero
    # The line of the lowest level is moved a little, so that half of its first value, where zero ends, is at 0.2 as below.
    slope: tl.constexpr = 1e6 / 0.9 if signed else 0.8 / 3.875e-7
    half: tl.constexpr = 2.75e-7 if signed else 1.625e-7
    part = size * slope + (parts + 0.2 - half * slope)
    for level in tl.static_range(1, 7):
        part = tl.minimum(part, size * (parts * 1e6 / 0.9 * 0.2**level) + parts * 8 / 9 * 2**level)
    # A level's first part is wider than the last one below it, and the first fifth of it is nearer to that one's middle.
    begin = (part.to(tl.int32, bitcast=True) & EXPONENT).to(tl.float32, bitcast=True)
    nearest = tl.where(part - begin < 0.2, part - 0.2, part)
    number = (nearest + (WHOLE - 0.5)).to(tl.int32, bitcast=True) - WHOLE_BITS
    is_one = part >= parts * 128 - 0.25
    rising = tl.where(is_one, 255, number + (127 if signed else -1))
    return (tl.where(x < 0, 127 - number, rising) if signed else rising).to(tl.uint8)


@triton.jit
def _rounded(x, random):  # type: ignore[no-untyped-def]
    """To bfloat16: away from zero with the probability of the share of the way there, else towards it."""
    bits = ((x.to(tl.int32, bitcast=True) + random) & -65536).to(tl.float32, bitcast=True)
    return tl.where(x == x, bits, x).to(tl.bfloat16)  # the sum may turn what is no number into one


@triton.jit
def _random_16_bits(seed, number, rows: tl.constexpr):  # type: ignore[no-untyped-def]
    """Integers below 2**16, [rows, WIDTH]: eight for each of `number`."""
    a, b, c, d = tl.randint4x(seed, number, ROUNDS)
    words = tl.reshape(tl.join(tl.join(a, b), tl.join(c, d)), [rows, WIDTH // 2]).to(tl.uint32, bitcast=True)
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), [rows, WIDTH]).to(tl.int32)
