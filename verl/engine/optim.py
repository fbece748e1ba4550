"""The optimizer of `optim.name`, its learning-rate schedule, and the update step with gradient clipping by global norm."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from verl.config.plugin_settings import settings_of
from verl.config.shared import OptimConfig
from verl.errors import UserError

if TYPE_CHECKING:
    from verl.engine.fused_adamw import FusedAdamW
    from verl.engine.weights import Weights


class Optimizer(Protocol):
    """The part of `torch.optim.Optimizer` that the engine uses.

    The optimizer also has `state`, a dict of tensors per parameter, or a method `state_of(parameter)` that returns one. The state exists
    right after construction, so that a checkpoint can be loaded into it. Its tensors have the shape and sharding of the parameter, or are
    scalars.

    Attributes:
        param_groups: parameter groups; the engine sets their "lr" before each step.
    """

    param_groups: list[dict[str, Any]]

    def step(self) -> Any: ...

    def zero_grad(self, *, set_to_none: bool = True) -> None: ...


def build_optimizer(
    parameters: Iterable[nn.Parameter], config: OptimConfig, copies: Mapping[nn.Parameter, Tensor] | None = None
) -> "Optimizer | FusedAdamW":
    """Build the optimizer of the trained parameters. Biases and norms (one dimension) get no weight decay.

    bfloat16 weights need stochastic rounding, because nearly every update is smaller than the spacing of bfloat16 numbers.

    Args:
        copies: copies of some parameters in another dtype; an optimizer may update them together with the parameters.
    Raises:
        UserError: no such optimizer, or it cannot update these parameters.
    """
    module = config.plugins.load("optim.name", config.name)
    trained = [p for p in parameters if p.requires_grad]
    if any(p.dtype == torch.bfloat16 for p in trained) and not getattr(module, "rounds_bfloat16", False):
        where = f"model.param_dtype=bfloat16 with optim.name={config.name}"
        raise UserError("it does not round stochastically", where=where, fix="set model.param_dtype=float32, or optim.name=adamw")
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    optimizer: Optimizer | FusedAdamW = module.build(groups, settings_of(config, module), lr=config.lr, copies=copies or {})
    _check_state(optimizer, trained, config.name)
    return optimizer


def _check_state(optimizer: Any, trained: Sequence[nn.Parameter], name: str) -> None:
    """Raise UserError if the optimizer's state cannot be saved in a checkpoint."""
    states = [] if hasattr(optimizer, "state_of") else [optimizer_state(optimizer, p) for p in trained]
    if not all(state and all(isinstance(value, Tensor) for value in state.values()) for state in states):
        fix = "fill self.state[parameter] with tensors in __init__, as examples/optimizers/lion.py does"
        raise UserError("has no state that a checkpoint can hold", where=f"optim.name={name}", fix=fix)


def state_bytes(config: OptimConfig) -> float:
    """Return the memory of the optimizer state per weight, in bytes. Raises UserError: no such optimizer."""
    return float(config.plugins.load("optim.name", config.name).state_bytes())


def optimizer_state(optimizer: Any, parameter: nn.Parameter) -> dict[str, Tensor]:
    """Return the optimizer's state of one parameter; the tensors are not copied."""
    if hasattr(optimizer, "state_of"):
        state: dict[str, Tensor] = optimizer.state_of(parameter)
        return state
    return dict(optimizer.state.get(parameter, {}))


def learning_rate(config: OptimConfig, total_steps: int) -> Callable[[int], float]:
    """Return the learning rate as a function of the optimizer step, counted from 0.

    The schedules are those of transformers with one more step, without their first point, so that neither the first nor the last step has
    a learning rate of zero.
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
    """Warmup-stable-decay: the full rate for `stable_ratio` of the steps after warmup, then cosine decay."""
    if progress <= config.stable_ratio:
        return 1.0
    return _cosine((progress - config.stable_ratio) / (1 - config.stable_ratio), config)


_AFTER_WARMUP = {"cosine": _cosine, "linear": _linear, "constant": _constant, "wsd": _wsd}


def set_learning_rate(optimizer: Any, rate: float) -> None:
    """Set the learning rate of the next step of an `Optimizer` or a `FusedAdamW`."""
    if _is_fused(optimizer):
        optimizer.lr = rate
        return
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def update(optimizer: Any, weights: "Weights", max_norm: float, loss: Tensor) -> tuple[Tensor, Tensor]:
    """Clip the gradients, take an optimizer step, and free the gradients.

    If the gradient norm or the loss is not finite, the step is skipped: weights, moments and step count do not change.

    Args:
        max_norm: limit for the norm of the gradient over all parameters and ranks.
        loss: a scalar on the device, the same on all ranks.
    Returns:
        the norm before clipping, and whether the step was taken; scalars on the device of the gradients.
    """
    trained = list(weights.trained.values())
    if _is_fused(optimizer):
        norm = _whole(_gradient_norm(trained))
        finite = (norm + loss).isfinite()
        optimizer.step((max_norm / (norm + 1e-6)).clamp(max=1.0), finite)
    else:
        norm = _whole(clip_gradients(trained, max_norm))
        finite = (norm + loss.to(norm.device)).isfinite()
        if finite:  # no synchronization on a CPU
            optimizer.step()
            weights.publish()
    optimizer.zero_grad(set_to_none=True)
    return norm, finite


def _is_fused(optimizer: Any) -> bool:
    """Return whether the optimizer clips, skips non-finite steps and publishes the weights itself, as `FusedAdamW` does."""
    return bool(getattr(optimizer, "is_fused", False))


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """Cast gradients to the dtype of their parameters, clip them in place, and return their norm before clipping."""
    for p in parameters:
        p.grad = None if p.grad is None else p.grad.to(p.dtype)
    norm = _gradient_norm(parameters)
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def _gradient_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    gradients = [p.grad for p in parameters if p.grad is not None]
    # Not torch's clip_grad_norm_: for bfloat16 gradients it computes the norm in bfloat16, to three digits.
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2.0, dtype=torch.float32)))
    return norm


def _whole(norm: Tensor) -> Tensor:
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
