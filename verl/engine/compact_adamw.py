"""AdamW in less memory, through torchao: moments of one byte, and bfloat16 weights that are rounded stochastically.

A moment of two or more dimensions is kept in blocks of BLOCK values of one row: a code of 8 bits for each value, and the
block's largest magnitude in float32 (Dettmers et al., 8-bit Optimizers via Block-wise Quantization, 2021). Blocks end with
their row, so that a checkpoint can be cut up between any number of processes. All other moments are float32, whatever the
weights are. The arithmetic is float32 throughout, one tensor after another; on a GPU torch.compile makes one kernel of it.

Importing this module needs torchao.
"""

import warnings
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchao.optim import AdamW8bit
from torchao.optim.subclass_8bit import OptimState8bit, get_qmap_signed, get_qmap_unsigned

from verl.engine.compile import has_compiler, uncompiled
from verl.errors import UserError

BLOCK = 128  # values that share a scale; the hidden sizes of common models are multiples of it
LEAST_VALUES = 4096  # in a tensor whose moments are 8 bits; what is smaller saves nothing
MOMENTS = {"exp_avg": True, "exp_avg_sq": False}  # by AdamW's names: whether it has a sign


class CompactAdamW:
    """AdamW over whole parameters, or over this process's shards of them.

    Attributes:
        param_groups: as of any optimizer, but "lr" is a tensor, to be filled in place: another one would be compiled again.
    """

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eight_bit: bool):
        """
        Args:
            groups: "params" and "weight_decay" of each; weights in bfloat16 are rounded stochastically.
            eight_bit: the moments; otherwise they are float32.
        Raises:
            UserError: a GPU, and no compiler for its kernel.
        """
        parameters: list[nn.Parameter] = [p for group in groups for p in group["params"]]
        self._compiled = parameters[0].device.type == "cuda"  # a CPU's compiler takes a minute for what a step does in less
        if self._compiled:
            _prepare_compiler()
        self._state = {p: _zeros(_local(p), eight_bit and _fits_blocks(p)) for p in parameters}
        self._seen = {p: nn.Parameter(_as_blocks(_local(p))) for p in parameters}
        seen_groups = [{**group, "params": [self._seen[p] for p in group["params"]]} for group in groups]
        self._torchao = AdamW8bit(seen_groups, lr=lr, betas=betas, bf16_stochastic_round=True)
        self.param_groups = self._torchao.param_groups
        for p, seen in self._seen.items():
            self._torchao.state[seen] = _state_as_blocks(self._state[p])

    @torch.no_grad()
    def step(self) -> None:
        for p, seen in self._seen.items():
            seen.data = _as_blocks(_local(p))  # anew in each step: FSDP may have moved it
            seen.grad = None if p.grad is None or not seen.numel() else _as_blocks(_local(p.grad))
        with nullcontext() if self._compiled else uncompiled():
            self._torchao.step()

    def zero_grad(self, *, set_to_none: bool = True) -> None:
        assert set_to_none
        for p, seen in self._seen.items():
            p.grad = seen.grad = None

    def state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """A parameter's state as plain tensors, sharded as it is; they are the optimizer's own, so loading into them loads it."""
        state = self._state[parameter]
        if not isinstance(parameter, DTensor):
            return state
        return {name: tensor if name == "step" else _sharded_like(parameter, tensor) for name, tensor in state.items()}


def _prepare_compiler() -> None:
    if not has_compiler():
        raise UserError(
            "8-bit moments and bfloat16 weights are updated by a kernel that torch.compile makes, which needs a C compiler",
            where="optim.name",
            fix="install gcc, or set optim.name=adamw and model.param_dtype=float32",
        )
    warnings.filterwarnings("ignore", message="OptimState8bit does not implement _stable_hash_for_caching", category=UserWarning)


def _local(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor; all of one that is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def _as_blocks(tensor: Tensor) -> Tensor:
    """A tensor as torchao gets to see it: a block a row, where blocks fit, so that the kernel has no indices to work out."""
    return tensor.reshape(tensor.numel() // BLOCK, BLOCK) if tensor.ndim and tensor.shape[-1] % BLOCK == 0 else tensor


def _fits_blocks(parameter: Tensor) -> bool:
    return parameter.ndim >= 2 and parameter.shape[-1] % BLOCK == 0 and parameter.numel() >= LEAST_VALUES


def _zeros(shard: Tensor, eight_bit: bool) -> dict[str, Tensor]:
    """The state before the first step: AdamW's own names, or of an 8-bit moment its codes and its scales, one for a block."""
    state = {"step": torch.zeros(())}  # on the host, where its powers cost nothing
    for name in MOMENTS:
        if eight_bit:
            scales = (*shard.shape[:-1], shard.shape[-1] // BLOCK)
            state[f"{name}_codes"] = torch.zeros_like(shard, dtype=torch.uint8, requires_grad=False)
            state[f"{name}_scales"] = torch.zeros(scales, device=shard.device)
        else:
            state[name] = torch.zeros_like(shard, dtype=torch.float32, requires_grad=False)
    return state


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


def _sharded_like(parameter: DTensor, local: Tensor) -> DTensor:
    """A process's part of a tensor whose rows lie where the parameter's do."""
    shape = torch.Size((parameter.shape[0], *local.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, parameter.device_mesh, parameter.placements, run_check=False, shape=shape, stride=stride)
