"""Low-memory AdamW on a CPU, through torchao: 8-bit moments, and bfloat16 weights with stochastic rounding.

On a GPU, `verl.engine.fused_adamw` is used instead, with the same state (`verl.engine.moments`). The arithmetic is float32, one tensor at
a time.

Importing this module needs torchao.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torchao.optim import AdamW8bit
from torchao.optim.subclass_8bit import OptimState8bit, get_qmap_signed, get_qmap_unsigned

from verl.engine.layers import uncompiled
from verl.engine.moments import BLOCK, MOMENTS, fits_blocks, local, sharded_like, zeros


class CompactAdamW:
    """AdamW over whole parameters, or over this rank's shards of them.

    Attributes:
        param_groups: as in torch.optim, but "lr" is a tensor that is changed in place.
    """

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eight_bit: bool):
        """
        Args:
            groups: parameter groups with "params" and "weight_decay".
            eight_bit: use 8-bit moments; else float32.
        """
        parameters: list[nn.Parameter] = [p for group in groups for p in group["params"]]
        self._state = {p: zeros(local(p), eight_bit=eight_bit and fits_blocks(p)) for p in parameters}
        self._blocks = {p: nn.Parameter(_as_blocks(local(p))) for p in parameters}
        block_groups = [{**group, "params": [self._blocks[p] for p in group["params"]]} for group in groups]
        self._torchao = AdamW8bit(block_groups, lr=lr, betas=betas, bf16_stochastic_round=True)
        self.param_groups = self._torchao.param_groups
        for p, blocks in self._blocks.items():
            self._torchao.state[blocks] = _state_as_blocks(self._state[p])

    @torch.no_grad()
    def step(self) -> None:
        for p, blocks in self._blocks.items():
            blocks.data = _as_blocks(local(p))  # in every step, because FSDP may move it
            blocks.grad = None if p.grad is None or not blocks.numel() else _as_blocks(local(p.grad))
        with uncompiled():  # compiling takes a minute on a CPU, longer than a step
            self._torchao.step()

    def zero_grad(self, *, set_to_none: bool = True) -> None:
        assert set_to_none
        for p, blocks in self._blocks.items():
            p.grad = blocks.grad = None

    def state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return a parameter's state, sharded like the parameter. Loading into these tensors loads the optimizer, which owns them."""
        return sharded_like(parameter, self._state[parameter])


def _as_blocks(tensor: Tensor) -> Tensor:
    """View a tensor for torchao with one block per row, if its rows are multiples of a block."""
    return tensor.reshape(tensor.numel() // BLOCK, BLOCK) if tensor.ndim and tensor.shape[-1] % BLOCK == 0 else tensor


def _state_as_blocks(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """View a parameter's state in torchao's form, sharing its memory."""
    blocks = {"step": state["step"]}
    for name, signed in MOMENTS.items():
        codes = state.get(f"{name}_codes")
        if codes is None:
            blocks[name] = _as_blocks(state[name])
        elif codes.numel():  # an empty shard needs none, and torchao would divide by its number of blocks, 0
            levels = torch.tensor(get_qmap_signed() if signed else get_qmap_unsigned(), device=codes.device)
            blocks[name] = OptimState8bit(_as_blocks(codes), state[f"{name}_scales"].view(-1), levels, signed, dtype=torch.float32)
    return blocks
