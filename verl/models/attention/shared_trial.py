"""The trial of attention to shared prefixes on this GPU: it must compute what FlashAttention computes of each document with its prefix.

Dimensions: T tokens of the packed batch, U of the same documents without sharing; N query heads, K key-value heads, D head size.
"""

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from verl.data.groups import collate_groups, grouped
from verl.data.pack import Document
from verl.data.prefixes import Prefixes
from verl.models.attention import flash
from verl.models.attention.flash_trial import TOLERANCE
from verl.models.attention.shared import shared_attention

PROMPTS = (131, 40)  # tokens of the prompts of the trial
ANSWERS = ((70, 1, 200), (33, 90))  # tokens of their answers


def example() -> Prefixes:
    """Return the prefixes of the trial's batch, which has filler, too."""
    documents, groups = list[Document](), []
    for prompt, answers in zip(PROMPTS, ANSWERS, strict=True):
        documents += [(np.zeros(prompt + answer, dtype=np.int32), np.arange(prompt + answer) >= prompt) for answer in answers]
        groups.append(grouped(range(len(documents) - len(answers), len(documents)), documents.__getitem__))
    batch = collate_groups(groups, documents.__getitem__, multiple_of_tokens=128)
    assert batch.prefixes is not None
    return batch.prefixes


def without_sharing(prefixes: Prefixes) -> tuple[Tensor, Tensor, Tensor]:
    """Return index_U, the token of the batch that each token is without sharing; the bounds of the documents; and own_T, the inverse.

    Tokens of prefixes are in each of their documents, and in a document of their own, which own_T names.
    """
    bounds, of = prefixes.segment_bounds.tolist(), prefixes.prefix_of_segment()
    spans = [torch.arange(start, stop) for start, stop in pairwise(bounds)]
    documents = [torch.cat([spans[of[s]], span]) if s in of else span for s, span in enumerate(spans)]
    cu_seqlens = torch.tensor([0, *map(len, documents)]).cumsum(0)
    own = [torch.arange(end - len(span), end) for end, span in zip(cu_seqlens[1:].tolist(), spans, strict=True)]
    return torch.cat(documents), cu_seqlens.int(), torch.cat(own)


def refusal(device: torch.device, dtype: torch.dtype, *heads: flash.Heads, short: bool = False) -> str | None:
    """Return why prefixes cannot be shared here by models with these heads, in one line; None if they can.

    Args:
        short: whether the kernels for short documents are used.
    """
    return next((found for each in heads if (found := _trial(device, dtype, each, short)) is not None), None)


def _trial(device: torch.device, dtype: torch.dtype, heads: flash.Heads, short: bool) -> str | None:
    try:
        difference = max(float((f - e).norm() / e.norm()) for f, e in zip(*_results(device, dtype, heads, short), strict=True))
    except Exception as error:  # whatever the kernels raise, the run continues without sharing and reports why
        lines = str(error).strip().splitlines()
        return f"its attention fails on this machine: {type(error).__name__}{f': {lines[0][:200]}' if lines else ''}"
    return None if difference < TOLERANCE else f"its attention differs from that of each document by {difference:.2g}"


def _results(device: torch.device, dtype: torch.dtype, heads: flash.Heads, short: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Return output and gradients with sharing, and those without."""
    prefixes = example()
    index_U, cu_seqlens, own_T = (x.to(device) for x in without_sharing(prefixes))
    longest = int(cu_seqlens.diff().max())
    generator = torch.Generator(device).manual_seed(0)  # does not advance the run's random state
    query_TND, key_TKD, value_TKD, output_gradient_TND = (
        torch.randn(len(own_T), number, heads.size, device=device, generator=generator).to(dtype).requires_grad_()
        for number in (heads.query, heads.key_value, heads.key_value, heads.query)
    )
    inputs, on_device = (query_TND, key_TKD, value_TKD), prefixes.with_offsets(lambda x: x.to(device))
    with torch.enable_grad():
        shared_TND = shared_attention(*inputs, on_device, scale=None, short=short)
        # The gradients of a prefix's copies are summed in float32.
        query_UND, key_UKD, value_UKD = copies = tuple(x.detach()[index_U].requires_grad_() for x in inputs)
        alone_TND = flash.flash_attention(query_UND, key_UKD, value_UKD, cu_seqlens, longest)[own_T]
        found = torch.autograd.grad(shared_TND, inputs, output_gradient_TND.detach())
        of_copies = torch.autograd.grad(alone_TND, copies, output_gradient_TND.detach())
    expected = [torch.zeros_like(x, dtype=torch.float32).index_add_(0, index_U, g.float()) for x, g in zip(inputs, of_copies, strict=True)]
    return [x.detach().float() for x in (shared_TND, *found)], [alone_TND.detach().float(), *expected]
