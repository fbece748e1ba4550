"""Fused AdamW on a GPU: clipping, moments, weights and their working copies in one pass, with one launch for all tensors of a kind.

Small steps are bound by the host, so a step sends the device only the addresses that changed. The moments are float32 or 8-bit
(`verl.engine.moments`); bfloat16 weights are rounded stochastically.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from verl.engine import moments
from verl.engine.adamw_launch import ALIGNMENT, Kind, Rates, Tables, Tiling

# Each is the fastest of eight tilings on an H200: 4.1 TB/s, and 36 ms for 7.6e9 elements, bound by arithmetic.
FLOAT_MOMENTS = Tiling(rows=16, tiles=1, vector=4, warps=4)
EIGHT_BIT_MOMENTS = Tiling(rows=8, tiles=8, vector=8, warps=4)


class FusedAdamW:
    """AdamW over whole parameters, or over this rank's shards of them.

    Attributes:
        lr: learning rate of the next step.
        skipped: number of steps that were skipped, up to the last one that `settle` has waited for.
        is_fused: marks an optimizer that clips, skips non-finite steps and publishes the weights itself.
    """

    is_fused = True

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
            groups: parameter groups with "params" and "weight_decay".
            eight_bit: use 8-bit moments; else float32.
            copies: working copies of some parameters, which each step updates too, in their own dtype.
        """
        self.lr, self._betas, self.skipped = lr, betas, 0
        decays = {p: float(group["weight_decay"]) for group in groups for p in group["params"]}
        self._steps = torch.zeros(len(decays))  # on the CPU; each parameter's "step" is an element of it
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
        """Update the parameters that have a gradient, of any dtype, and their copies.

        Args:
            factor: scalar on the device that multiplies the gradients in the update; `.grad` itself is unchanged.
            finite: flag on the device; if it is false, nothing is updated.
        """
        self.settle()
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

    def settle(self) -> int:
        """Undo the count of the latest step if it was not finite. Return the number of steps that were skipped so far.

        This waits for the device. It is called when the next step's forward and backward pass are queued, so the device never idles.
        """
        if self._latest is not None and not self._latest.was_taken():
            self._steps -= self._latest.moved
            self.skipped += 1
        self._latest = None
        return self.skipped

    def zero_grad(self, *, set_to_none: bool = True) -> None:
        assert set_to_none
        for p in self._state:
            p.grad = None

    def state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return a parameter's state, sharded like the parameter. Loading into these tensors loads the optimizer, which owns them."""
        self.settle()
        return moments.sharded_like(parameter, self._state[parameter])


class _Latest:
    """A step that the device may skip.

    Attributes:
        moved: per parameter, 1 if it had a gradient, else 0.
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
    """One parameter of a launch: `number` is its index among all parameters, `size` its number of elements on this rank."""

    number: int
    parameter: nn.Parameter
    size: int
    decay: float
    copy: Tensor | None
    state: dict[str, Tensor]


class _Update(NamedTuple):
    """Members that one launch can update together: `addresses` of weights and gradients, zero for the other members."""

    kind: Kind
    rates: Rates
    addresses: list[int]


class _Launch:
    """Parameters of one kind, and the tables of their launch."""

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
        """Update the members that have a gradient, in one launch per step count, gradient dtype and alignment: nearly always one.

        Args:
            gradients, rates: one entry for each parameter of the optimizer, by number.
        """
        updates: dict[tuple[int, torch.dtype, bool], _Update] = {}
        for place, member in enumerate(self._members):
            gradient, rate = gradients[member.number], rates[member.number]
            if gradient is None or member.size == 0:
                continue
            weight = moments.local(member.parameter).data_ptr()  # in every step, because FSDP may move it
            aligned = (weight | gradient.data_ptr() | member.size) % ALIGNMENT == 0
            key = (rate.step, gradient.dtype, aligned)
            if key not in updates:
                updates[key] = _Update(self._kind(gradient.dtype, aligned), rate, [0] * (2 * len(self._members)))
            updates[key].addresses[2 * place : 2 * place + 2] = weight, gradient.data_ptr()
        for kind, rate, addresses in updates.values():
            self._run(kind, rate, self._on_device(addresses), self._neutral if factor is None else factor)

    def _kind(self, gradient: torch.dtype, aligned: bool) -> Kind:
        weight, copy = self._members[0].parameter.dtype, self._members[0].copy
        return Kind(weight, gradient, None if copy is None else copy.dtype, self._eight_bit, aligned)

    def _run(self, kind: Kind, rates: Rates, moving: Tensor, factor: Tensor) -> None:
        from verl.engine.adamw_triton import update

        # From the generator whose state is saved in checkpoints, so that a resumed run rounds like an uninterrupted one.
        seed = torch.randint(2**62, (), device=self._device) if kind.weight == torch.bfloat16 else None
        update(Tables(self._fixed, moving, self._decay, self._chunks), kind, rates, factor, seed, self._tiling)

    def _on_device(self, addresses: list[int]) -> Tensor:
        if addresses != self._addresses:
            # The pinned tensor is freed at once, but PyTorch does not reuse its memory before the copy has finished.
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
    """Return for each program the index of its tensor and of the chunk in it, int32 [programs, 2]."""
    counts = torch.tensor([-(-size // tiling.chunk) for size in sizes])
    tensors = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    numbers = torch.arange(len(tensors)) - (counts.cumsum(0) - counts)[tensors]
    return torch.stack([tensors, numbers], dim=1).int()


def _contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_contiguous() else tensor.contiguous()
