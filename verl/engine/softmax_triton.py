"""The pass of `verl.engine.softmax` as one Triton kernel: a row of logits is read twice and written once.

Dimensions: C positions of a chunk, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, LANE, WARPS = 8192, 8, 32  # columns at a time; of them, side by side in one thread
LOG2_E = tl.constexpr(1.4426950408889634)


def logprobs_with_gradient_(logits_CV: Tensor, target_C: Tensor, slope_C: Tensor, factor: float) -> Tensor:
    """As `verl.engine.softmax.logprobs_with_gradient_`, on a CUDA device."""
    rows, vocabulary = logits_CV.shape
    logprob_C = torch.empty(rows, dtype=torch.float32, device=logits_CV.device)
    if rows > 0:
        grid = (rows,)
        _kernel[grid](logits_CV, target_C, slope_C, logprob_C, vocabulary, factor, BLOCK, LANE, num_warps=WARPS)
    return logprob_C


@triton.jit
def _kernel(logits, targets, slopes, logprobs, vocabulary: tl.constexpr, factor, block: tl.constexpr, lane: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocabulary
    # Each thread keeps a running maximum and sum of its own columns, rescaled once for `lane` of them.
    highest = tl.full([block // lane], float("-inf"), tl.float32)
    total = tl.zeros([block // lane], tl.float32)
    for start in range(0, vocabulary, block):
        column = start + tl.arange(0, block)
        x = tl.load(logits + column, mask=column < vocabulary, other=float("-inf")).to(tl.float32) * (factor * LOG2_E)
        x = tl.reshape(x, [block // lane, lane])
        # Where all columns so far lie beyond the vocabulary, any finite maximum keeps infinity from being taken from infinity.
        higher = tl.maximum(tl.maximum(highest, tl.max(x, 1)), -1e30)
        total = total * tl.exp2(highest - higher) + tl.sum(tl.exp2(x - higher[:, None]), 1)
        highest = higher
    peak = tl.max(highest, 0)
    log2_normalizer = peak + tl.log2(tl.sum(total * tl.exp2(highest - peak), 0))
    target = tl.load(targets + row)
    logprob = (tl.load(logits + target).to(tl.float32) * (factor * LOG2_E) - log2_normalizer) / LOG2_E
    tl.store(logprobs + row, logprob)
    weight = tl.load(slopes + row) * factor
    for start in range(0, vocabulary, block):
        column = start + tl.arange(0, block)
        x = tl.load(logits + column, mask=column < vocabulary, other=0.0).to(tl.float32) * (factor * LOG2_E)
        gradient = (tl.where(column == target, 1.0, 0.0) - tl.exp2(x - log2_normalizer)) * weight
        tl.store(logits + column, gradient.to(logits.dtype.element_ty), mask=column < vocabulary)
