"""AdamW, its learning-rate schedule, and its step along gradients that are clipped by their global norm."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from verl.config.shared import OptimConfig
from verl.engine.fused_adamw import FusedAdamW
from verl.errors import UserError
from verl.kernels import HAS_TRITON

if TYPE_CHECKING:
    from verl.engine.compact_adamw import CompactAdamW
    from verl.engine.weights import Weights

AdamW: TypeAlias = "FusedAdamW | torch.optim.AdamW | CompactAdamW"


def build_optimizer(parameters: Iterable[nn.Parameter], config: OptimConfig, copies: Mapping[nn.Parameter, Tensor] | None = None) -> AdamW:
    """AdamW over the trained parameters; biases and norms (one dimension) are not decayed.

    Weights in bfloat16 are rounded stochastically, since nearly every step of theirs is smaller than what lies between two
    of its numbers.

    Args:
        copies: of some parameters in another dtype, which an optimizer that can writes along with them.
    Raises:
        UserError: 8-bit moments or bfloat16 weights on a CPU, and torchao is missing.
    """
    trained = [p for p in parameters if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    betas = (config.betas[0], config.betas[1])
    if HAS_TRITON and trained[0].device.type == "cuda":
        return FusedAdamW(groups, lr=config.lr, betas=betas, eight_bit=config.name == "adamw_8bit", copies=copies or {})
    rounded = any(p.dtype == torch.bfloat16 for p in trained)
    if config.name == "adamw" and not rounded:
        return torch.optim.AdamW(groups, lr=config.lr, betas=betas, fused=True)
    try:
        from verl.engine.compact_adamw import CompactAdamW
    except ImportError as error:
        where = "model.param_dtype=bfloat16" if config.name == "adamw" else f"optim.name={config.name}"
        raise UserError(f"needs torchao: {error}", where=where, fix='pip install "verl[8bit]"') from error
    return CompactAdamW(groups, lr=config.lr, betas=betas, eight_bit=config.name == "adamw_8bit")


def optimizer_state(optimizer: AdamW, parameter: nn.Parameter) -> dict[str, Tensor]:
    """One parameter's part of the optimizer's state, in plain tensors that are the optimizer's own.

    Before the first step torch's AdamW has none yet, and the zeros it would start from are made here.
    """
    if not isinstance(optimizer, torch.optim.AdamW):
        return optimizer.state_of(parameter)
    state: dict[str, Tensor] = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state["exp_avg"] = torch.zeros_like(parameter)
        state["exp_avg_sq"] = torch.zeros_like(parameter)
    return dict(state)


def learning_rate(config: OptimConfig, total_steps: int) -> Callable[[int], float]:
    """The learning rate of each optimizer step, counted from 0.

    The curves are those of transformers' schedules over one step more, without their first point: neither the first nor
    the last step is taken at a rate of zero.
    """
    warmup = int(total_steps * config.warmup_steps_ratio)
    after = _AFTER_WARMUP[config.lr_scheduler]

    def rate(step: int) -> float:
        if step + 1 < warmup:
            return config.lr * (step + 1) / warmup
        progress = (step + 1 - warmup) / (total_steps + 1 - warmup)
        return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * after(progress, config))

    return rate


def _cosine(progress: float, config: OptimConfig) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def _linear(progress: float, config: OptimConfig) -> float:
    return 1 - progress


def _constant(progress: float, config: OptimConfig) -> float:
    return 1.0


def _wsd(progress: float, config: OptimConfig) -> float:
    """Warm-up, stable, decay: full rate for `stable_ratio` of the steps, then a cosine down."""
    if progress <= config.stable_ratio:
        return 1.0
    return _cosine((progress - config.stable_ratio) / (1 - config.stable_ratio), config)


_AFTER_WARMUP = {"cosine": _cosine, "linear": _linear, "constant": _constant, "wsd": _wsd}


def set_learning_rate(optimizer: AdamW, rate: float) -> None:
    if isinstance(optimizer, FusedAdamW):
        optimizer.lr = rate
        return
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def update(optimizer: AdamW, weights: "Weights", largest: float, loss: Tensor) -> tuple[Tensor, Tensor]:
    """Step along the gradients, scaled so that their norm over all parameters and ranks is at most `largest`, and drop them.

    Where the norm or the loss is not finite, weights, moments and their count of steps stay as they are.

    Args:
        loss: a scalar on the device, the same on all ranks.
    Returns:
        that norm before clipping, and whether the step was taken; scalars where the gradients are.
    """
    trained = list(weights.trained.values())
    if isinstance(optimizer, FusedAdamW):
        norm = _whole(_gradient_norm(trained))
        finite = (norm + loss).isfinite()
        optimizer.step((largest / (norm + 1e-6)).clamp(max=1.0), finite)
    else:
        norm = _whole(clip_gradients(trained, largest))
        finite = (norm + loss.to(norm.device)).isfinite()
        if finite:  # the optimizers of a CPU, where asking costs nothing
            optimizer.step()
            weights.publish()
    optimizer.zero_grad(set_to_none=True)
    return norm, finite


def clip_gradients(parameters: Sequence[nn.Parameter], largest: float) -> Tensor:
    """The same by itself: gradients in the dtype of their parameters, scaled in place, and the norm they had."""
    for p in parameters:
        p.grad = None if p.grad is None else p.grad.to(p.dtype)
    norm = _gradient_norm(parameters)
    nn.utils.clip_grads_with_norm_(parameters, largest, norm)
    return norm


def _gradient_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    gradients = [p.grad for p in parameters if p.grad is not None]
    # Not torch's clip_grad_norm_: of bfloat16 gradients it would give a norm of three digits.
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2.0, dtype=torch.float32)))
    return norm


def _whole(norm: Tensor) -> Tensor:
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
