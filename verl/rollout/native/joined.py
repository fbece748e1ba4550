"""Query, key and value of an attention layer as one matrix product.

A decode step multiplies few rows, so a product with the few columns of keys or values leaves most of a GPU idle: at 7B, the three
products take 32 µs a layer for 256 rows, and one product of all columns 16 µs. The joined weights are a copy, about 6% of a model's.

Dimensions: N output features of all members, H hidden size.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NAMES = ("q_proj", "k_proj", "v_proj")


class JoinedLinears:
    """Linear layers that read the same input, and a copy of their weights in one tensor.

    Args:
        members: plain linear layers with equally many inputs; all have a bias, or none has.
    """

    def __init__(self, members: Sequence[nn.Linear]):
        self._members = list(members)
        self._sizes = [member.out_features for member in members]
        first = members[0]
        self._weight_NH = first.weight.new_empty(sum(self._sizes), first.in_features)
        self._bias_N = None if first.bias is None else first.bias.new_empty(sum(self._sizes))
        self._input: Tensor | None = None  # of the last product
        self._outputs: dict[int, Tensor] = {}  # by member: parts of the last product that were not asked for yet
        self._forwards = [self._forward_of(number) for number in range(len(members))]

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the members' present weights."""
        torch.cat([member.weight for member in self._members], out=self._weight_NH)
        if self._bias_N is not None:
            torch.cat([member.bias for member in self._members], out=self._bias_N)

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Let the members compute with the joined weights in this context."""
        for member, forward in zip(self._members, self._forwards, strict=True):
            member.__dict__["forward"] = forward
        try:
            yield
        finally:
            for member in self._members:
                del member.__dict__["forward"]
            self._input, self._outputs = None, {}

    def _forward_of(self, number: int) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            if self._input is not x or number not in self._outputs:
                self._outputs = dict(enumerate(F.linear(x, self._weight_NH, self._bias_N).split(self._sizes, -1)))
                self._input = x
            output = self._outputs.pop(number)
            if not self._outputs:
                self._input = None
            return output

        return forward


def join_linears(layers: Sequence[nn.Module]) -> list[JoinedLinears]:
    """Join the query, key and value layers of decoder layers, except those that are not plain, such as those with adapters."""
    groups: list[list[Any]] = [[getattr(module, name, None) for name in NAMES] for layer in layers for module in layer.modules()]
    return [JoinedLinears(group) for group in groups if _can_join(group)]


def _can_join(group: Sequence[Any]) -> bool:
    if any(type(member) is not nn.Linear or "forward" in member.__dict__ or type(member.weight) is not nn.Parameter for member in group):
        return False
    kinds = {(member.in_features, member.bias is None, member.weight.dtype) for member in group}
    return len(kinds) == 1 and not any(member._forward_hooks or member._forward_pre_hooks for member in group)
