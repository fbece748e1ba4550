"""FlashAttention where documents share a prefix (verl.data.prefixes): two attentions, joined by their log-sum-exp.

1. Each segment, a document or a prefix, attends causally to itself.
2. The documents of a group attend to their prefix, all of which comes before them. They are adjacent, so they are one sequence of queries.

A softmax over both sets of keys is the mean of the two results, weighted by exp(logsumexp) of each. In the backward pass, each part gets
the joined result and its log-sum-exp. Its kernel then finds the weights of the joined softmax, so it gives the exact gradients of its keys
and values, and its share of the gradient of the queries (as in ring attention, arXiv:2310.01889).

The kernels are those that PyTorch calls FlashAttention-2, or FlashAttention-3 where it replaces version 2; of the first part, also the ones
for short documents.

Dimensions: T tokens of the packed batch; A tokens of the documents with a prefix; P tokens of the prefixes; Q queries and X keys of a part;
N query heads, K key-value heads, D head size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from verl.data.prefixes import Prefixes, Sizes
from verl.models.attention import flash


@dataclass(frozen=True)
class Part:
    """Which queries attend to which keys: sequence s of the queries to sequence s of the keys.

    Attributes:
        queries, keys: the tokens of the batch that they are taken from.
        query_bounds, key_bounds: offsets of the sequences in them, int32.
        longest_query, longest_key: tokens of the longest sequence.
        is_causal: whether a query attends only to keys up to its own place; else to all keys of its sequence.
        is_short: whether the kernels for short documents compute it, which are faster where sequences are short.
    """

    queries: slice
    keys: slice
    query_bounds: Tensor
    key_bounds: Tensor
    longest_query: int
    longest_key: int
    is_causal: bool
    is_short: bool = False


def shared_attention(
    query_TND: Tensor, key_TKD: Tensor, value_TKD: Tensor, prefixes: Prefixes, *, scale: float | None, short: bool = False
) -> Tensor:
    """Compute attention of documents to their prefix and to themselves, on CUDA in bfloat16 or float16.

    Args:
        scale: factor of the scores; None uses 1 / √D.
        short: whether verl's kernels for short documents compute the attention of each segment to itself.
    Returns:
        output_TND.
    """
    bounds = [prefixes.segment_bounds, prefixes.group_bounds, prefixes.prefix_bounds]
    output_TND: Tensor
    output_TND, _ = _shared(query_TND, key_TKD, value_TKD, bounds, prefixes.sizes, scale or query_TND.shape[-1] ** -0.5, short)
    return output_TND


def _parts(tokens: int, bounds: Sequence[Tensor], sizes: Tensor, short: bool) -> tuple[Part, Part]:
    """Return the attention of each segment to itself, and that of documents to prefixes."""
    segment_bounds, group_bounds, prefix_bounds = bounds
    of = Sizes(*sizes.tolist())
    everything, documents = slice(0, tokens), slice(0, of.group_tokens)
    prefixes = slice(of.first_token, of.first_token + of.prefix_tokens)
    longest = of.longest_segment
    return (
        Part(everything, everything, segment_bounds, segment_bounds, longest, longest, is_causal=True, is_short=short),
        Part(documents, prefixes, group_bounds, prefix_bounds, of.longest_group, of.longest_prefix, is_causal=False),
    )


# One operator for both parts and their joining, so that it is one node in a compiled layer.
@torch.library.custom_op("verl::shared_attention", mutates_args=())
def _shared(
    query_TND: Tensor, key_TKD: Tensor, value_TKD: Tensor, bounds: Sequence[Tensor], sizes: Tensor, scale: float, short: bool
) -> tuple[Tensor, Tensor]:
    """Return output_TND and the joined logsumexp_NT, float32."""
    own, other = _parts(len(query_TND), bounds, sizes, short)
    output_TND, logsumexp_NT = forward_part(query_TND, key_TKD, value_TKD, own, scale)
    output_AND, logsumexp_NA = forward_part(query_TND[other.queries], key_TKD[other.keys], value_TKD[other.keys], other, scale)
    own_AND, own_NA = output_TND[other.queries], logsumexp_NT[:, other.queries]
    precise = torch.promote_types(output_TND.dtype, torch.float32)
    share_AN1 = (logsumexp_NA - own_NA).sigmoid().T[:, :, None].to(precise)
    own_AND.copy_(own_AND.to(precise).lerp_(output_AND.to(precise), share_AN1))
    own_NA.copy_(torch.logaddexp(own_NA, logsumexp_NA))
    return output_TND, logsumexp_NT


@torch.library.custom_op("verl::shared_attention_backward", mutates_args=())
def _shared_backward(
    output_gradient_TND: Tensor, saved: Sequence[Tensor], bounds: Sequence[Tensor], sizes: Tensor, scale: float, short: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value. `saved` has query, key, value, output_TND and logsumexp_NT."""
    query_TND, key_TKD, value_TKD, output_TND, logsumexp_NT = saved
    own, other = _parts(len(query_TND), bounds, sizes, short)
    gradient_TND, a, p = output_gradient_TND.contiguous(), other.queries, other.keys
    parts = backward_part(gradient_TND, query_TND, key_TKD, value_TKD, output_TND, logsumexp_NT, own, scale)
    query, key, value = (x.contiguous() for x in parts)  # as tracing has them; a kernel's are laid out like its inputs
    of_documents = gradient_TND[a], query_TND[a], key_TKD[p], value_TKD[p], output_TND[a], logsumexp_NT[:, a].contiguous()
    more_query, more_key, more_value = backward_part(*of_documents, other, scale)
    query[a] += more_query
    key[p] += more_key
    value[p] += more_value
    return query, key, value


_shared.register_fake(flash._shapes)
_shared_backward.register_fake(flash._backward_shapes)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query_TND, key_TKD, value_TKD, bounds, sizes, ctx.scale, ctx.short = inputs
    ctx.save_for_backward(query_TND, key_TKD, value_TKD, *output, *bounds, sizes)


def _gradients(ctx: Any, output_gradient_TND: Tensor, logsumexp_gradient_NT: Tensor) -> tuple[Any, ...]:
    """Return the gradients of the inputs. The gradient of logsumexp_NT is ignored, because nothing uses that output."""
    *saved, segment_bounds, group_bounds, prefix_bounds, sizes = ctx.saved_tensors
    bounds = [segment_bounds, group_bounds, prefix_bounds]
    gradients = _shared_backward(output_gradient_TND, saved, bounds, sizes, ctx.scale, ctx.short)
    return (*gradients, [None] * len(bounds), None, None, None)


_shared.register_autograd(_gradients, setup_context=_save)


# The kernels


def forward_part(query_QND: Tensor, key_XKD: Tensor, value_XKD: Tensor, part: Part, scale: float) -> tuple[Tensor, Tensor]:
    """Return output_QND and logsumexp_NQ, float32, of a part's tokens."""
    if part.is_short:
        from verl.models.attention import short_triton

        output_QND, logarithm_NQ = short_triton.forward(query_QND, key_XKD, value_XKD, part.query_bounds, part.longest_query, scale)
        return output_QND, logarithm_NQ * math.log(2)
    bounds = (part.query_bounds, part.key_bounds, part.longest_query, part.longest_key)
    options: dict[str, Any] = {"scale": scale, "window_size_left": -1, "window_size_right": 0 if part.is_causal else -1}
    found = torch.ops.aten._flash_attention_forward(query_QND, key_XKD, value_XKD, *bounds, 0.0, part.is_causal, False, **options)
    output_QND, logsumexp_NQ = found[:2]
    return output_QND.contiguous(), logsumexp_NQ


def backward_part(
    output_gradient_QND: Tensor,
    query_QND: Tensor,
    key_XKD: Tensor,
    value_XKD: Tensor,
    output_QND: Tensor,
    logsumexp_NQ: Tensor,
    part: Part,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a part's share of the gradients of query, key and value, given the joined output and log-sum-exp."""
    if part.is_short:
        from verl.models.attention import short_triton

        kept = query_QND, key_XKD, value_XKD, output_QND, logsumexp_NQ / math.log(2)
        return short_triton.backward(output_gradient_QND, *kept, part.query_bounds, part.longest_query, scale)
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=query_QND.device), torch.empty(0, device=query_QND.device)
    options: dict[str, Any] = {"scale": scale, "window_size_left": -1, "window_size_right": 0 if part.is_causal else -1}
    query, key, value = torch.ops.aten._flash_attention_backward(
        output_gradient_QND,
        query_QND,
        key_XKD,
        value_XKD,
        output_QND,
        logsumexp_NQ,
        part.query_bounds,
        part.key_bounds,
        part.longest_query,
        part.longest_key,
        0.0,
        part.is_causal,
        *no_dropout,
        **options,
    )
    return query, key, value
