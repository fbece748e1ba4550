"""AdamW on a GPU in one pass: clipping, moments, weights and their working copies, in one launch for all tensors of a kind.

Small steps are bound by the host, so that a step hands the device no more than the addresses that have changed. The moments are
float32 or 8 bits (`verl.engine.moments`); weights in bfloat16 are rounded stochastically.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from verl.engine import moments
from verl.engine.adamw_launch import ALIGNMENT, Kind, Rates, Tables, Tiling

# The fastest of eight each on an H200: 4.1 TB/s, and 36 ms for 7.6e9 values, which arithmetic bounds.
FLOAT_MOMENTS = Tiling(rows=16, tiles=1, vector=4, warps=4)
EIGHT_BIT_MOMENTS = Tiling(rows=8, tiles=8, vector=8, warps=4)


class FusedAdamW:
    """AdamW over whole parameters, or over this process's shards of them.

    Attributes:
        lr: learning rate of the next step.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eight_bit: bool,
        copies: Mapping[nn.Parameter, Tensor],
    ):
        """
        Args:
            groups: "params" and "weight_decay" of each.
            eight_bit: the moments; otherwise they are float32.
            copies: of some of the parameters, to be written with them in their own dtype.
        """
        self.lr, self._betas = lr, betas
        decays = {p: float(group["weight_decay"]) for group in groups for p in group["params"]}
        self._steps = torch.zeros(len(decays))  # on the host; each parameter's "step" is an element of it
        self._latest: _Latest | None = None
        self._state: dict[nn.Parameter, dict[str, Tensor]] = {}
        kinds: dict[tuple[object, ...], list[_Member]] = {}
        for number, (p, decay) in enumerate(decays.items()):
            shard, copy, compact = moments.local(p), copies.get(p), eight_bit and moments.fits_blocks(p)
            assert shard.is_contiguous()
            self._state[p] = {**moments.zeros(shard, eight_bit=compact), "step": self._steps[number]}
            kind = (p.dtype, None if copy is None else copy.dtype, compact)
            kinds.setdefault(kind, []).append(_Member(number, p, shard.numel(), decay, copy, self._state[p]))
        self._launches = [_Launch(members) for members in kinds.values()]

    @torch.no_grad()
    def step(self, factor: Tensor | None = None, finite: Tensor | None = None) -> None:
        """Update the parameters that have a gradient, in whatever dtype, and their copies.

        Args:
            factor: a scalar on the device; the gradients count so many times as much, and stay as they are.
            finite: a flag on the device; where it is not set, nothing is updated.
        """
        self._settle()
        gradients = [None if p.grad is None else _contiguous(moments.local(p.grad)) for p in self._state]
        moved = torch.tensor([float(gradient is not None) for gradient in gradients])
        self._steps += moved
        steps = [int(step) for step in self._steps.tolist()]
        if finite is not None:
            self._latest = _Latest(moved, finite)
            factor = torch.where(finite, 1.0 if factor is None else factor, torch.nan)
        rates = {step: Rates(self.lr, self._betas, step) for step in set(steps)}
        for launch in self._launches:
            launch(gradients, [rates[step] for step in steps], factor)

    def _settle(self) -> None:
        """Take the latest step back if it was not finite.

        Here, where the device has the next step's forward and backward pass in hand and waits for nobody.
        """
        if self._latest is not None and not self._latest.was_taken():
            self._steps -= self._latest.moved
        self._latest = None

    def zero_grad(self, *, set_to_none: bool = True) -> None:
        assert set_to_none
        for p in self._state:
            p.grad = None

    def state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """A parameter's state as plain tensors, sharded as it is; they are the optimizer's own, so loading into them loads it."""
        self._settle()
        return moments.sharded_like(parameter, self._state[parameter])


class _Latest:
    """A step of which the device decides whether it is taken.

    Attributes:
        moved: by parameter, 1 where it had a gradient.
    """

    def __init__(self, moved: Tensor, finite: Tensor):
        self.moved = moved
        self._taken = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(finite, non_blocking=True)
        self._decided = torch.cuda.Event()
        self._decided.record()

    def was_taken(self) -> bool:
        self._decided.synchronize()
        return bool(self._taken)


class _Member(NamedTuple):
    """One parameter of a launch; `number` is its place among all parameters, `size` the number of this process's values."""

    number: int
    parameter: nn.Parameter
    size: int
    decay: float
    copy: Tensor | None
    state: dict[str, Tensor]


class _Alike(NamedTuple):
    """Members that one launch can update together; `addresses` of weights and gradients, zeros for the others."""

    kind: Kind
    rates: Rates
    addresses: list[int]


class _Launch:
    """Parameters of one kind, and the tables that one launch finds them by."""

    def __init__(self, members: list[_Member]):
        first = members[0]
        self._members, self._device = members, moments.local(first.parameter).device
        self._eight_bit = "exp_avg_codes" in first.state
        self._tiling = EIGHT_BIT_MOMENTS if self._eight_bit else FLOAT_MOMENTS
        self._fixed = torch.tensor([_fixed_addresses(member) for member in members], device=self._device)
        self._decay = torch.tensor([member.decay for member in members], device=self._device)
        self._chunks = _chunks([member.size for member in members], self._tiling).to(self._device)
        self._neutral = torch.ones((), device=self._device)
        self._addresses: list[int] = []
        self._moving: Tensor

    def __call__(self, gradients: Sequence[Tensor | None], rates: Sequence[Rates], factor: Tensor | None) -> None:
        """Update the members that have a gradient; `gradients` and `rates` are of all parameters, by number.

        Those alike in step, dtype and alignment go together, which is nearly always all.
        """
        sets: dict[tuple[int, torch.dtype, bool], _Alike] = {}
        for place, member in enumerate(self._members):
            gradient, rate = gradients[member.number], rates[member.number]
            if gradient is None or member.size == 0:
                continue
            weight = moments.local(member.parameter).data_ptr()  # anew in each step: FSDP may have moved it
            aligned = (weight | gradient.data_ptr() | member.size) % ALIGNMENT == 0
            alike = (rate.step, gradient.dtype, aligned)
            if alike not in sets:
                sets[alike] = _Alike(self._kind(gradient.dtype, aligned), rate, [0] * (2 * len(self._members)))
            sets[alike].addresses[2 * place : 2 * place + 2] = weight, gradient.data_ptr()
        for kind, rate, addresses in sets.values():
            self._run(kind, rate, self._on_device(addresses), self._neutral if factor is None else factor)

    def _kind(self, gradient: torch.dtype, aligned: bool) -> Kind:
        weight, copy = self._members[0].parameter.dtype, self._members[0].copy
        return Kind(weight, gradient, None if copy is None else copy.dtype, self._eight_bit, aligned)

    def _run(self, kind: Kind, rates: Rates, moving: Tensor, factor: Tensor) -> None:
        from verl.engine.adamw_triton import update

        # From the generator whose state a checkpoint keeps, so that a resumed run rounds as an uninterrupted one.
        seed = torch.randint(2**62, (), device=self._device) if kind.weight == torch.bfloat16 else None
        update(Tables(self._fixed, moving, self._decay, self._chunks), kind, rates, factor, seed, self._tiling)

    def _on_device(self, addresses: list[int]) -> Tensor:
        if addresses != self._addresses:
            # The pinned memory is let go at once; PyTorch gives it to nobody before the copy has ended.
            self._moving = torch.tensor(addresses, pin_memory=True).to(self._device, non_blocking=True)
            self._addresses = addresses
        return self._moving


def _fixed_addresses(member: _Member) -> list[int]:
    state, row = member.state, [0, 0, 0, 0, 0, member.size]
    for column, name in enumerate(moments.MOMENTS):
        row[2 * column] = state[f"{name}_codes" if f"{name}_codes" in state else name].data_ptr()
        row[2 * column + 1] = state[f"{name}_scales"].data_ptr() if f"{name}_scales" in state else 0
    row[4] = 0 if member.copy is None else member.copy.data_ptr()
    return row


def _chunks(sizes: list[int], tiling: Tiling) -> Tensor:
    """By program, the tensor that it works on and the chunk of it."""
    counts = torch.tensor([-(-size // tiling.chunk) for size in sizes])
    tensors = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    numbers = torch.arange(len(tensors)) - (counts.cumsum(0) - counts)[tensors]
    return torch.stack([tensors, numbers], dim=1).int()


def _contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_contiguous() else tensor.contiguous()
