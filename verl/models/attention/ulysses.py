"""Context parallel attention: from a part of the tokens with all heads to all tokens with a part of the heads, and back (Ulysses,
arXiv:2309.14509). Documents are whole in between, so that every kernel, mask and window serves as it is.

The exchange is an operator of PyTorch, so that a compiled layer holds it as one node and its shapes stay those of the model.

Dimensions: P processes that share a batch; U tokens of one process's part, T = P × U of the batch; X heads of a tensor, D head size.
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


def check_heads(config: PretrainedConfig, heads: Heads, size: int) -> None:
    """Raises UserError if a model's heads cannot be shared out among so many processes."""
    if heads.query % size:
        sizes = ", ".join(str(n) for n in range(1, heads.query + 1) if heads.query % n == 0)
        raise UserError(
            f"the {heads.query} attention heads of {config.model_type} cannot be shared out among {size} processes",
            where=f"model.context_parallel_size={size}",
            fix=f"one of {sizes}",
        )


def heads_of_each(heads: Heads, size: int) -> Heads:
    """The heads that each of so many processes computes. A key head whose query heads lie on several of them is on each."""
    return Heads(heads.query // size, math.lcm(heads.key_value, size) // size, heads.size)


def to_heads(parts_UXD: Sequence[Tensor], group: str) -> list[Tensor]:
    """All tokens of this process's share of each tensor's heads, in one exchange.

    Args:
        parts_UXD: this process's tokens, with all heads. Where heads are no multiple of the processes, each is repeated, so that
            the query heads of a process find the key head that they had.
        group: `processes.context_name()`; every process of the group calls this with tensors of the same shapes.
    Returns:
        wholes_TXD, contiguous.
    """
    wholes: list[Tensor] = _to_heads(list(parts_UXD), group)
    return wholes


def to_tokens(whole_TXD: Tensor, heads: int, group: str) -> Tensor:
    """The way back: this process's tokens, with the heads of all processes.

    Args:
        whole_TXD: all tokens, with this process's share of the heads.
        heads: of all processes together.
        group: as in `to_heads`.
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
    """`heads` are those of each result; the values of heads that were repeated are added up."""
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
    """What each process has for this one, in their order."""
    sent_PUX = sent_PUX.contiguous()
    received_PUX = torch.empty_like(sent_PUX)
    dist.all_to_all_single(received_PUX, sent_PUX, group=processes.context_group(group))
    return received_PUX


def _copy(tensor: Tensor) -> Tensor:
    """Contiguous, and in memory of its own, as each of an operator's results must be."""
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


# Each is the other's backward pass: what was sent comes back as a gradient, and what was sent several times is added up.
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
