"""Master weights, which the optimizer updates, and the working copies that the model computes with.

Three classes with the same methods: `MasterWeights` for one process, `ReplicatedWeights` for data parallelism with all weights on each
rank, and `ShardedWeights` for FSDP2 and CPU offloading.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from verl import dist as processes
from verl.engine.scorers import Scorer

BUCKET = 2**25  # gradients per all-reduce, in float32: 128 MiB


@dataclass(frozen=True)
class Sharding:
    """Settings of FSDP2 sharding and offloading.

    Attributes:
        size: consecutive ranks that share one copy of the weights; the groups hold replicas of each other (HSDP). None: all ranks.
        reshard_after_forward: free a layer's gathered weights after its forward pass, and gather them again for the backward pass.
        cpu_offload: keep parameters, gradients and optimizer state in host memory.
        pin: pin the offloaded parameters and gradients, which makes copies to a GPU faster; PyTorch then rounds each tensor up to a
            power of two.
    """

    size: int | None = None
    reshard_after_forward: bool = True
    cpu_offload: bool = False
    pin: bool = True

    def describe(self) -> str:
        size, everyone = self.size or processes.world_size(), processes.world_size()
        groups = f", in {everyone // size} groups" if size < everyone else ""
        return f"sharded over {size}{groups}" + (" in host memory" if self.cpu_offload else "") if everyone > 1 else "in host memory"


@dataclass(frozen=True)
class Spread:
    """Distribution of the weights over ranks, and over device and host memory.

    Attributes:
        strategy: "ddp" replicates them on each rank, "fsdp2" shards them. One process without offloading does neither.
        sharding: settings of fsdp2.
    """

    strategy: Literal["ddp", "fsdp2"] = "fsdp2"
    sharding: Sharding = field(default_factory=Sharding)


SHARDED = Spread()


class Weights(Protocol):
    """The weights of a model, as the engine and checkpoints use them.

    Attributes:
        place: where the weights are, for messages.
        trained: trainable parameters, which the optimizer updates, by the model's own names.
        copies: working copies of trainable parameters with which the model computes; an optimizer may update them in place of `publish`.
    """

    place: str
    trained: dict[str, nn.Parameter]
    copies: dict[nn.Parameter, Tensor]

    def begin(self, *, last: bool) -> None:
        """Prepare for a micro-batch; `last` marks the last one of the step."""

    def collect(self) -> None:
        """Add a micro-batch's gradients to those of `trained`, after its backward pass."""

    def publish(self) -> None:
        """Copy changed values of `trained` to the weights that the model computes with."""

    def in_model(self) -> AbstractContextManager[None]:
        """Make `trained` the model's parameters in this context, to read and save them."""
        ...


class MasterWeights:
    """Weights of one process: masters in the loaded dtype, and working copies in the compute dtype.

    A weight that was loaded in the compute dtype is its own working copy; frozen weights are cast to the compute dtype. Gradients are
    accumulated over micro-batches in the dtype of `trained`; those of a single micro-batch keep their dtype.
    """

    place = "on one process"

    def __init__(self, scorer: Scorer, compute_dtype: torch.dtype):
        # A tied parameter has one entry here, as in named_parameters.
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
            master.grad_dtype = None  # allows a gradient of any dtype

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
    """Parameters whose gradients share an all-reduce.

    Attributes:
        missing: number of members without a gradient so far in this backward pass.
        average: the members' gradients, flattened; averaged over all ranks once `message` has finished.
        message: handle of the all-reduce.
    """

    members: list[nn.Parameter] = field(default_factory=list)
    missing: int = 0
    average: Tensor | None = None
    message: Any = None

    @property
    def size(self) -> int:
        return sum(p.numel() for p in self.members)

    def parts(self) -> list[Tensor]:
        """Views of the average in the members' shapes."""
        assert self.average is not None
        flat = self.average.split([p.numel() for p in self.members])
        return [part.view(p.shape) for part, p in zip(flat, self.members, strict=True)]


class ReplicatedWeights(MasterWeights):
    """Weights replicated on every rank. Gradients are averaged in float32, one bucket at a time, and this overlaps with the last
    backward pass of the step; earlier micro-batches do not communicate. This rank waits for the averages in the context of `waiting`.
    """

    place = "whole on each process"

    def __init__(self, scorer: Scorer, compute_dtype: torch.dtype):
        super().__init__(scorer, compute_dtype)
        self.waiting: Callable[[], AbstractContextManager[None]] = nullcontext
        self._buckets, self._next, self._last = [_Bucket()], 0, False
        for p in reversed(self.trained.values()):  # roughly the order of their gradients
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
        while self._next < len(self._buckets):  # buckets with parameters that this batch did not use
            self._send()
        with self.waiting():
            for bucket in self._buckets:
                bucket.message.wait()
        for bucket in self._buckets:
            for p, part in zip(bucket.members, bucket.parts(), strict=True):
                p.grad = part
            bucket.average = bucket.message = None

    def _working(self, p: nn.Parameter) -> Tensor:
        return self.copies.get(p, p)

    def _arrived(self, bucket: _Bucket, _: Tensor) -> None:
        bucket.missing -= 1
        # In the same order on all ranks, because collectives are matched by order.
        while self._last and self._next < len(self._buckets) and self._buckets[self._next].missing == 0:
            self._send()

    @torch.no_grad()
    def _send(self) -> None:
        bucket = self._buckets[self._next]
        self._next += 1
        bucket.average = torch.zeros(bucket.size, dtype=torch.float32, device=bucket.members[0].device)
        for p, part in zip(bucket.members, bucket.parts(), strict=True):
            for holder in {p, self._working(p)}:  # gradients of earlier micro-batches, and of this one
                if holder.grad is not None:
                    part += holder.grad
                    holder.grad = None
        bucket.average /= processes.world_size()
        bucket.message = dist.all_reduce(bucket.average, group=processes.group(), async_op=True)


class ShardedWeights:
    """Sharded or offloaded weights: FSDP2 holds the masters and makes the working copies."""

    def __init__(
        self,
        scorer: Scorer,
        device: torch.device,
        sharding: Sharding,
        *,
        compute_dtype: torch.dtype,
        fill: Callable[[nn.Module, torch.device], None] | None,
    ):
        from verl.engine.sharding import shard  # of sharded weights alone

        self._sharded = shard(scorer, device, compute_dtype=compute_dtype, **asdict(sharding))
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
    """Distribute the model's weights in place.

    Args:
        device: device that computes.
        fill: reads the weights of a model on the meta device into its shards.
    """
    if processes.world_size() > 1 or spread.sharding.cpu_offload:
        if spread.strategy == "fsdp2":
            if fill is None and not spread.sharding.cpu_offload:
                scorer = scorer.to(device)
            return ShardedWeights(scorer, device, spread.sharding, compute_dtype=compute_dtype, fill=fill)
        return ReplicatedWeights(scorer.to(device), compute_dtype)
    return MasterWeights(scorer.to(device), compute_dtype)
