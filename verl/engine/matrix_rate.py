"""The rate at which a GPU multiplies matrices, measured: what it can reach, where the data sheet says what its makers did."""

import itertools
import statistics
from functools import cache

import torch

SIZES, PRODUCTS, WARMING = (4096, 8192), 13, 3


@cache
def matrix_rate(device: torch.device) -> float | None:
    """Measure the FLOP/s of the faster of two square products in bfloat16: 40 ms, once in a process. None: there is no memory for it.

    The random numbers of training, and its peak of memory, are left as they are.
    """
    peak = torch.cuda.max_memory_allocated(device)
    try:
        return max(_rate(device, size) for size in SIZES)
    except RuntimeError:  # such as out of memory: what is only shown ends no run
        return None
    finally:
        torch.cuda.empty_cache()
        if torch.cuda.max_memory_allocated(device) > peak:
            torch.cuda.reset_peak_memory_stats(device)


def _rate(device: torch.device, size: int) -> float:
    own = torch.Generator(device).manual_seed(0)  # products of zeros would take less power, and be faster
    left, right, product = (torch.empty(size, size, device=device, dtype=torch.bfloat16) for _ in range(3))
    for factor in (left, right):
        factor.normal_(generator=own)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(PRODUCTS + 1)]
    for mark in marks[:-1]:
        mark.record()
        torch.matmul(left, right, out=product)
    marks[-1].record()
    marks[-1].synchronize()
    seconds = [first.elapsed_time(then) / 1000 for first, then in itertools.pairwise(marks[WARMING:])]
    return float(2 * size**3 / statistics.median(seconds))
