"""Triton kernels of `verl.engine.logprobs`, which read and write every logit once.

A softmax needs the row's maximum and sum before its first result, so it usually takes one pass that reads, and one that reads again and
writes. Here, the kernel writes 2 ** (x - base), where `base` is an integer close to the row's maximum, and returns the sum for the caller
to divide by. `base` is the rounded maximum of the first block. A later block may have a far larger maximum, for which the exponents of
bfloat16 and float32 leave room. Before that runs out, the powers written so far are multiplied by a power of two, which is exact.

Dimensions: C positions of a chunk, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 16_384, 32  # columns per block; the fastest of nine pairs on an H200, where 8192 takes 1.14 times as long
ROOM = tl.constexpr(60.0)  # powers up to 2**60, and their sum, are far from overflow
LOG2_E = tl.constexpr(1.4426950408889634)


def logprobs_with_gradient_(logits_CV: Tensor, target_C: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Same as `verl.engine.logprobs.logprobs_with_gradient_`, on CUDA in bfloat16 or float32."""
    rows, vocabulary = logits_CV.shape
    logprob_C, scale_C = (torch.empty(rows, dtype=torch.float32, device=logits_CV.device) for _ in range(2))
    if rows > 0:
        grid = (rows,)
        _kernel[grid](logits_CV, target_C, logprob_C, scale_C, vocabulary, factor, BLOCK, num_warps=WARPS)
    return logprob_C, scale_C


def logprobs_and_entropy(logits_CV: Tensor, target_C: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Same as `verl.engine.logprobs.logprobs_and_entropy`, on CUDA; the logits are read once."""
    rows, vocabulary = logits_CV.shape
    logprob_C, entropy_C = (torch.empty(rows, dtype=torch.float32, device=logits_CV.device) for _ in range(2))
    if rows > 0:
        _scores_kernel[(rows,)](logits_CV, target_C, logprob_C, entropy_C, vocabulary, factor, BLOCK, num_warps=WARPS)
    return logprob_C, entropy_C


@triton.jit
def _scores_kernel(logits, targets, logprobs, entropies, vocabulary: tl.constexpr, factor, block: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocabulary
    at_target = tl.load(logits + tl.load(targets + row)).to(tl.float32) * (factor * LOG2_E)
    highest = -1e30  # finite, to avoid inf - inf
    total = 0.0
    weighted = 0.0
    for start in range(0, vocabulary, block):
        column = start + tl.arange(0, block)
        x = tl.load(logits + column, mask=column < vocabulary, other=float("-inf")).to(tl.float32) * (factor * LOG2_E)
        peak = tl.maximum(highest, tl.max(x, 0))
        shrink, power = tl.exp2(highest - peak), tl.exp2(x - peak)
        total = total * shrink + tl.sum(power, 0)
        weighted = weighted * shrink + tl.sum(tl.where(power > 0, power * x, 0.0), 0)
        highest = peak
    log_total = highest + tl.log2(total)
    tl.store(logprobs + row, (at_target - log_total) / LOG2_E)
    tl.store(entropies + row, (log_total - weighted / total) / LOG2_E)


@triton.jit
def _kernel(logits, targets, logprobs, scales, vocabulary: tl.constexpr, factor, block: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocabulary
    column = tl.arange(0, block)
    target = tl.load(targets + row)
    at_target = tl.load(logits + target).to(tl.float32) * (factor * LOG2_E)
    x = tl.load(logits + column, mask=column < vocabulary, other=float("-inf")).to(tl.float32) * (factor * LOG2_E)
    tl.debug_barrier()  # all threads have read the target's logit before any overwrites it
    base = tl.ceil(tl.maximum(tl.max(x, 0), -1e30))  # finite, to avoid inf - inf
    total = tl.zeros([block], tl.float32)
    for start in range(0, vocabulary, block):
        following = start + block + column  # loaded while this block is processed
        x_following = tl.load(logits + following, mask=following < vocabulary, other=float("-inf")).to(tl.float32) * (factor * LOG2_E)
        peak = tl.max(x, 0)
        if peak > base + ROOM:
            shrink = tl.exp2(base - tl.ceil(peak))
            for done in range(0, start, block):
                earlier = tl.load(logits + done + column).to(tl.float32)
                tl.store(logits + done + column, (earlier * shrink).to(logits.dtype.element_ty))
            total *= shrink
            base = tl.ceil(peak)
        power = tl.exp2(x - base)
        total += power
        tl.store(logits + start + column, power.to(logits.dtype.element_ty), mask=start + column < vocabulary)
        x = x_following
    total_power = tl.sum(total, 0)
    tl.debug_barrier()  # the target's power has been written before it is replaced
    tl.store(logits + target, (tl.exp2(at_target - base) - total_power).to(logits.dtype.element_ty))
    tl.store(logprobs + row, (at_target - base - tl.log2(total_power)) / LOG2_E)
    tl.store(scales + row, -factor / total_power)
