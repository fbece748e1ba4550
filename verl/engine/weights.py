"""The weights that the optimizer updates, beside those that the model computes with.

Two classes with the same methods, so that the engine does not care which it has: `MasterWeights` on one process,
`ShardedWeights` on many or with weights in host memory.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from verl.engine.fsdp import shard
from verl.engine.logprobs import TokenScorer


class Weights(Protocol):
    """What the engine and the checkpoint need of a model's weights.

    Attributes:
        trained: what the optimizer updates, by the model's own names.
        copies: of what is trained, those that the model computes with instead; an optimizer may write them as `publish` does.
    """

    trained: dict[str, nn.Parameter]
    copies: dict[nn.Parameter, Tensor]

    def begin(self, *, last: bool) -> None:
        """A micro-batch begins; `last` of its step."""

    def collect(self) -> None:
        """A micro-batch's gradients are there: add them to those of `trained`."""

    def publish(self) -> None:
        """`trained` has changed: let the model compute with it."""

    def in_model(self) -> AbstractContextManager[None]:
        """While this lasts, the model's parameters are `trained` itself, to be read and written out."""
        ...


class MasterWeights:
    """One process: weights as they were loaded, and working copies of them in the compute dtype.

    What is loaded in the compute dtype is its own working copy; frozen weights are cast to it. Gradients are added up
    over micro-batches in the dtype of `trained`; those of a single one are left as they are.
    """

    def __init__(self, scorer: TokenScorer, compute_dtype: torch.dtype):
        # A shared (tied) parameter has one entry here, as it has in named_parameters.
        self.trained = {name: p for name, p in scorer.named_parameters() if p.requires_grad}
        self._places: list[tuple[nn.Module, str, nn.Parameter, nn.Parameter]] = []
        working: dict[nn.Parameter, nn.Parameter] = {}
        for module in scorer.modules():
            for name, p in list(module._parameters.items()):
                if p is None or p.dtype == compute_dtype:
                    continue
                if p not in working:
                    working[p] = nn.Parameter(p.detach().to(compute_dtype), requires_grad=p.requires_grad)
                module._parameters[name] = working[p]
                if p.requires_grad:
                    self._places.append((module, name, p, working[p]))
        self.copies: dict[nn.Parameter, Tensor] = {master: copy for _, _, master, copy in self._places}
        for master in self.copies:
            master.grad_dtype = None  # its gradient may have any dtype

    def begin(self, *, last: bool) -> None:
        pass

    @torch.no_grad()
    def collect(self) -> None:
        for master, copy in self.copies.items():
            if master.grad is None:
                master.grad = copy.grad
            elif copy.grad is not None:
                master.grad = master.grad.to(master.dtype).add_(copy.grad)
            copy.grad = None

    @torch.no_grad()
    def publish(self) -> None:
        if self.copies:
            torch._foreach_copy_(list(self.copies.values()), list(self.copies))

    @contextmanager
    def in_model(self) -> Iterator[None]:
        for module, name, master, _ in self._places:
            module._parameters[name] = master
        try:
            yield
        finally:
            for module, name, _, copy in self._places:
                module._parameters[name] = copy


class ShardedWeights:
    """Many processes, or weights in host memory: FSDP2 keeps the masters and makes the working copies."""

    def __init__(self, scorer: TokenScorer, mesh: DeviceMesh, *, compute_dtype: torch.dtype, cpu_offload: bool):
        self._sharded = shard(scorer, mesh, compute_dtype=compute_dtype, cpu_offload=cpu_offload)
        self.trained = {name: p for name, p in scorer.named_parameters() if p.requires_grad}
        self.copies: dict[nn.Parameter, Tensor] = {}

    def begin(self, *, last: bool) -> None:
        self._sharded.set_requires_gradient_sync(last)

    def collect(self) -> None:
        pass

    def publish(self) -> None:
        pass

    def in_model(self) -> AbstractContextManager[None]:
        return nullcontext()
