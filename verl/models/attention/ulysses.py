"""Context-parallel attention by all-to-all (Ulysses, arXiv:2309.14509).

Before attention, the ranks exchange slices of the tokens with all heads for all tokens with a slice of the heads. After attention, they
exchange back. During attention, documents are whole, so every attention kernel, mask and window works unchanged.

The exchange is a custom operator, so that it is one node in a compiled layer and the shapes stay those of the model.

Dimensions: P ranks that share a batch; U tokens of one rank's slice, T = P × U tokens of the batch; X heads of a tensor, D head size.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PretrainedConfig

from verl import dist as processes
from verl.errors import UserError
from verl.models.attention.flash import Heads


def check_heads(config: PretrainedConfig, heads: Sequence[Heads], size: int) -> None:
    """Raise UserError if `size` does not divide the number of query heads of every layer."""
    common = math.gcd(*(each.query for each in heads))
    if common % size:
        sizes = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
        numbers = " and ".join(map(str, sorted({each.query for each in heads})))
        raise UserError(
            f"the {numbers} attention heads of {config.model_type} cannot be divided among {size} processes",
            where=f"model.context_parallel_size={size}",
            fix=f"set one of {sizes}",
        )


def to_heads(parts_UXD: Sequence[Tensor], group: str) -> list[Tensor]:
    """Exchange slices of tokens with all heads for all tokens with this rank's heads, in one all-to-all.

    Args:
        parts_UXD: this rank's tokens, with all heads. If the number of heads of a tensor is not a multiple of the number of ranks, heads
            are repeated, so that each rank has the key heads of its query heads.
        group: `processes.context_name()`; every rank of the group calls this with the same shapes.
    Returns:
        wholes_TXD, contiguous.
    """
    wholes: list[Tensor] = _to_heads(list(parts_UXD), group)
    return wholes


def to_tokens(whole_TXD: Tensor, heads: int, group: str) -> Tensor:
    """Exchange all tokens with this rank's heads for this rank's tokens with all heads: the inverse of `to_heads`.

    Args:
        whole_TXD: all tokens, with this rank's heads.
        heads: total number of heads over all ranks.
        group: same as in `to_heads`.
    Returns:
        part_UXD, contiguous.
    """
    part_UXD: Tensor = _to_tokens([whole_TXD], [heads], group)[0]
    return part_UXD


@torch.library.custom_op("verl::to_heads", mutates_args=())
def _to_heads(parts_UXD: list[Tensor], group: str) -> list[Tensor]:
    size, tokens = _size(group), len(parts_UXD[0])
    repeated = [x.repeat_interleave(math.lcm(x.shape[1], size) // x.shape[1], 1) if x.shape[1] % size else x for x in parts_UXD]
    by_process = [x.reshape(tokens, size, -1).transpose(0, 1) for x in repeated]
    received = _exchange(torch.cat(by_process, 2), group).view(size * tokens, -1)
    shares = received.split([x.shape[2] for x in by_process], 1)
    return [_copy(s).view(size * tokens, -1, x.shape[2]) for s, x in zip(shares, parts_UXD, strict=True)]


@torch.library.custom_op("verl::to_tokens", mutates_args=())
def _to_tokens(wholes_TXD: list[Tensor], heads: list[int], group: str) -> list[Tensor]:
    """Same as `to_tokens` for several tensors; `heads` has the total number of heads of each. The values of repeated heads are summed."""
    size, tokens = _size(group), len(wholes_TXD[0])
    by_process = [x.reshape(size, tokens // size, -1) for x in wholes_TXD]
    received = _exchange(torch.cat(by_process, 2), group).transpose(0, 1)
    parts = []
    for share, x, number in zip(received.split([x.shape[2] for x in by_process], 2), wholes_TXD, heads, strict=True):
        part_UXD = _copy(share).view(tokens // size, size * x.shape[1], x.shape[2])
        repeats = part_UXD.shape[1] // number
        parts.append(part_UXD if repeats == 1 else part_UXD.unflatten(1, (number, repeats)).sum(2))
    return parts


def _exchange(sent_PUX: Tensor, group: str) -> Tensor:
    """All-to-all: return the block that each rank sent to this one, in rank order."""
    sent_PUX = sent_PUX.contiguous()
    received_PUX = torch.empty_like(sent_PUX)
    dist.all_to_all_single(received_PUX, sent_PUX, group=processes.context_group(group))
    return received_PUX


def _copy(tensor: Tensor) -> Tensor:
    """Return a contiguous copy, because an operator's results must not share memory."""
    return tensor.clone(memory_format=torch.contiguous_format)


def _size(group: str) -> int:
    return processes.context_group(group).size()


@_to_heads.register_fake
def _shapes_of_wholes(parts_UXD: list[Tensor], group: str) -> list[Tensor]:
    size = _size(group)
    return [x.new_empty((x.shape[0] * size, math.lcm(int(x.shape[1]), size) // size, x.shape[2])) for x in parts_UXD]


@_to_tokens.register_fake
def _shapes_of_parts(wholes_TXD: list[Tensor], heads: list[int], group: str) -> list[Tensor]:
    return [x.new_empty((x.shape[0] // _size(group), number, x.shape[2])) for x, number in zip(wholes_TXD, heads, strict=True)]


# Each operator is the other's backward pass; the gradients of repeated heads are summed.
def _keep_heads(ctx: Any, inputs: tuple[list[Tensor], str], output: list[Tensor]) -> None:
    parts_UXD, ctx.group = inputs
    ctx.heads = [x.shape[1] for x in parts_UXD]


def _gradients_of_parts(ctx: Any, gradients_TXD: list[Tensor]) -> tuple[list[Tensor], None]:
    return _to_tokens(gradients_TXD, ctx.heads, ctx.group), None


def _keep_group(ctx: Any, inputs: tuple[list[Tensor], list[int], str], output: list[Tensor]) -> None:
    _, _, ctx.group = inputs


def _gradients_of_wholes(ctx: Any, gradients_UXD: list[Tensor]) -> tuple[list[Tensor], None, None]:
    return _to_heads(gradients_UXD, ctx.group), None, None


_to_heads.register_autograd(_gradients_of_parts, setup_context=_keep_heads)
_to_tokens.register_autograd(_gradients_of_wholes, setup_context=_keep_group)
