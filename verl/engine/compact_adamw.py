"""AdamW in less memory, through torchao: moments of one byte, and bfloat16 weights that are rounded stochastically.

For the CPU; a GPU has `verl.engine.fused_adamw`. The state is that of `verl.engine.moments` in both. The arithmetic is float32
throughout, one tensor after another.

Importing this module needs torchao.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torchao.optim import AdamW8bit
from torchao.optim.subclass_8bit import OptimState8bit, get_qmap_signed, get_qmap_unsigned

from verl.engine.compile import uncompiled
from verl.engine.moments import BLOCK, MOMENTS, fits_blocks, local, sharded_like, zeros


class CompactAdamW:
    """AdamW over whole parameters, or over this process's shards of them.

    Attributes:
        param_groups: as of any optimizer, but "lr" is a tensor, to be filled in place.
    """

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eight_bit: bool):
        """
        Args:
            groups: "params" and "weight_decay" of each; weights in bfloat16 are rounded stochastically.
            eight_bit: the moments; otherwise they are float32.
        """
        parameters: list[nn.Parameter] = [p for group in groups for p in group["params"]]
        self._state = {p: zeros(local(p), eight_bit=eight_bit and fits_blocks(p)) for p in parameters}
        self._seen = {p: nn.Parameter(_as_blocks(local(p))) for p in parameters}
        seen_groups = [{**group, "params": [self._seen[p] for p in group["params"]]} for group in groups]
        self._torchao = AdamW8bit(seen_groups, lr=lr, betas=betas, bf16_stochastic_round=True)
        self.param_groups = self._torchao.param_groups
        for p, seen in self._seen.items():
            self._torchao.state[seen] = _state_as_blocks(self._state[p])

    @torch.no_grad()
    def step(self) -> None:
        for p, seen in self._seen.items():
            seen.data = _as_blocks(local(p))  # anew in each step: FSDP may have moved it
            seen.grad = None if p.grad is None or not seen.numel() else _as_blocks(local(p.grad))
        with uncompiled():  # a CPU's compiler takes a minute for what a step does in less
            self._torchao.step()

    def zero_grad(self, *, set_to_none: bool = True) -> None:
        assert set_to_none
        for p, seen in self._seen.items():
            p.grad = seen.grad = None

    def state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """A parameter's state as plain tensors, sharded as it is; they are the optimizer's own, so loading into them loads it."""
        return sharded_like(parameter, self._state[parameter])


def _as_blocks(tensor: Tensor) -> Tensor:
    """A tensor as torchao gets to see it: a block a row, where blocks fit."""
    return tensor.reshape(tensor.numel() // BLOCK, BLOCK) if tensor.ndim and tensor.shape[-1] % BLOCK == 0 else tensor


def _state_as_blocks(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same memory as torchao gets to see it."""
    seen = {"step": state["step"]}
    for name, signed in MOMENTS.items():
        codes = state.get(f"{name}_codes")
        if codes is None:
            seen[name] = _as_blocks(state[name])
        elif codes.numel():  # torchao divides by the number of blocks, and an empty shard takes no step
            levels = torch.tensor(get_qmap_signed() if signed else get_qmap_unsigned(), device=codes.device)
            seen[name] = OptimState8bit(_as_blocks(codes), state[f"{name}_scales"].view(-1), levels, signed, dtype=torch.float32)
    return seen
