"""The weights that the optimizer updates, beside those that the model computes with.

Classes with the same methods, so that the engine does not care which it has: `MasterWeights` on one process,
`ReplicatedWeights` where each process has all of them, `ShardedWeights` where each has a part, or they are in host memory.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from verl import dist as processes
from verl.engine.fsdp import Sharding, shard
from verl.engine.scorers import Scorer

BUCKET = 2**25  # gradients that are averaged in one message: 128 MiB


@dataclass(frozen=True)
class Spread:
    """How weights lie on processes and their memory.

    Attributes:
        strategy: "ddp": all of them on each process; "fsdp2": sharded. One process without offloading does neither.
        sharding: for fsdp2.
    """

    strategy: Literal["ddp", "fsdp2"] = "fsdp2"
    sharding: Sharding = field(default_factory=Sharding)


SHARDED = Spread()


class Weights(Protocol):
    """What the engine and the checkpoint need of a model's weights.

    Attributes:
        trained: what the optimizer updates, by the model's own names.
        copies: of what is trained, those that the model computes with instead; an optimizer may write them as `publish` does.
        place: where they lie, in words.
    """

    place: str
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

    place = "on one process"

    def __init__(self, scorer: Scorer, compute_dtype: torch.dtype):
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


@dataclass
class _Bucket:
    """Weights whose gradients travel together.

    Attributes:
        missing: how many of them have no gradient yet in this backward pass.
        average: of their gradients over all processes, one after another, once its message is under way.
    """

    members: list[nn.Parameter] = field(default_factory=list)
    missing: int = 0
    average: Tensor | None = None
    message: Any = None

    @property
    def size(self) -> int:
        return sum(p.numel() for p in self.members)

    def parts(self) -> list[Tensor]:
        """The average, in the members' shapes."""
        assert self.average is not None
        flat = self.average.split([p.numel() for p in self.members])
        return [part.view(p.shape) for part, p in zip(flat, self.members, strict=True)]


class ReplicatedWeights(MasterWeights):
    """Several processes with all of the weights each. Gradients are averaged over them in float32, a bucket at a time, while
    the step's last backward pass goes on; the micro-batches before it send nothing.
    """

    place = "whole on each process"

    def __init__(self, scorer: Scorer, compute_dtype: torch.dtype):
        super().__init__(scorer, compute_dtype)
        self._buckets, self._next, self._last = [_Bucket()], 0, False
        for p in reversed(self.trained.values()):  # about as their gradients come
            if self._buckets[-1].size >= BUCKET:
                self._buckets.append(_Bucket())
            self._buckets[-1].members.append(p)
            self._working(p).register_post_accumulate_grad_hook(partial(self._arrived, self._buckets[-1]))

    def begin(self, *, last: bool) -> None:
        self._last, self._next = last, 0
        for bucket in self._buckets:
            bucket.missing = len(bucket.members)

    @torch.no_grad()
    def collect(self) -> None:
        if not self._last:
            super().collect()
            return
        while self._next < len(self._buckets):  # those with weights that had no part in this batch
            self._send()
        for bucket in self._buckets:
            bucket.message.wait()
            for p, part in zip(bucket.members, bucket.parts(), strict=True):
                p.grad = part
            bucket.average = bucket.message = None

    def _working(self, p: nn.Parameter) -> Tensor:
        return self.copies.get(p, p)

    def _arrived(self, bucket: _Bucket, _: Tensor) -> None:
        bucket.missing -= 1
        # In one order on all processes, since messages are matched by it.
        while self._last and self._next < len(self._buckets) and self._buckets[self._next].missing == 0:
            self._send()

    @torch.no_grad()
    def _send(self) -> None:
        bucket = self._buckets[self._next]
        self._next += 1
        bucket.average = torch.zeros(bucket.size, dtype=torch.float32, device=bucket.members[0].device)
        for p, part in zip(bucket.members, bucket.parts(), strict=True):
            for holder in {p, self._working(p)}:  # of the micro-batches before, and of this one
                if holder.grad is not None:
                    part += holder.grad
                    holder.grad = None
        bucket.average /= processes.world_size()
        bucket.message = dist.all_reduce(bucket.average, group=processes.group(), async_op=True)


class ShardedWeights:
    """Many processes, or weights in host memory: FSDP2 keeps the masters and makes the working copies."""

    def __init__(
        self,
        scorer: Scorer,
        device: torch.device,
        sharding: Sharding,
        *,
        compute_dtype: torch.dtype,
        fill: Callable[[nn.Module, torch.device], None] | None,
    ):
        self._sharded = shard(scorer, device, sharding, compute_dtype=compute_dtype)
        self.place = sharding.describe()
        if fill is not None:
            fill(scorer, torch.device("cpu") if sharding.cpu_offload else device)
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


def spread_weights(
    scorer: Scorer,
    spread: Spread,
    *,
    device: torch.device,
    compute_dtype: torch.dtype,
    fill: Callable[[nn.Module, torch.device], None] | None = None,
) -> Weights:
    """Put the weights where they belong, in place.

    Args:
        device: where the arithmetic runs.
        fill: where the model has no values yet, reads them into its shards.
    """
    if processes.world_size() > 1 or spread.sharding.cpu_offload:
        if spread.strategy == "fsdp2":
            if fill is None and not spread.sharding.cpu_offload:
                scorer = scorer.to(device)
            return ShardedWeights(scorer, device, spread.sharding, compute_dtype=compute_dtype, fill=fill)
        return ReplicatedWeights(scorer.to(device), compute_dtype)
    return MasterWeights(scorer.to(device), compute_dtype)
