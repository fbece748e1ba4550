"""The optimizer of `optim.name`, its learning-rate schedule, and its step along gradients that are clipped by their global norm."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from verl.config.own_keys import settings_of
from verl.config.shared import OptimConfig
from verl.engine.fused_adamw import FusedAdamW
from verl.errors import UserError

if TYPE_CHECKING:
    from verl.engine.weights import Weights


class Optimizer(Protocol):
    """What the engine needs of an optimizer: what `torch.optim.Optimizer` has.

    `state` by parameter, tensors alone, is there from the beginning, so that a checkpoint can be read into it; or it is what
    `state_of(parameter)` gives. Its tensors are the parameter's alike, sharded as it is, or scalars.

    Attributes:
        param_groups: of each, "lr" is set before each step.
    """

    param_groups: list[dict[str, Any]]

    def step(self) -> Any: ...

    def zero_grad(self, *, set_to_none: bool = True) -> None: ...


def build_optimizer(
    parameters: Iterable[nn.Parameter], config: OptimConfig, copies: Mapping[nn.Parameter, Tensor] | None = None
) -> Optimizer | FusedAdamW:
    """The optimizer over the trained parameters; biases and norms (one dimension) are not decayed.

    Weights in bfloat16 need one that rounds stochastically, since nearly every step of theirs is smaller than what lies between two
    of its numbers.

    Args:
        copies: of some parameters in another dtype, which an optimizer that can writes along with them.
    Raises:
        UserError: no such optimizer, or one that cannot update these parameters.
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
    """Raises UserError: a checkpoint could not hold the state of an optimizer."""
    states = [] if hasattr(optimizer, "state_of") else [optimizer_state(optimizer, p) for p in trained]
    if not all(state and all(isinstance(value, Tensor) for value in state.values()) for state in states):
        fix = "fill self.state[parameter] with tensors in __init__, as examples/optimizers/lion.py does"
        raise UserError("has no state that a checkpoint can hold", where=f"optim.name={name}", fix=fix)


def state_bytes(config: OptimConfig) -> float:
    """Memory of the optimizer's state for one weight. Raises UserError: no such optimizer."""
    return float(config.plugins.load("optim.name", config.name).state_bytes())


def optimizer_state(optimizer: Any, parameter: nn.Parameter) -> dict[str, Tensor]:
    """One parameter's part of the optimizer's state, in plain tensors that are the optimizer's own."""
    if hasattr(optimizer, "state_of"):
        state: dict[str, Tensor] = optimizer.state_of(parameter)
        return state
    return dict(optimizer.state.get(parameter, {}))


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


def set_learning_rate(optimizer: Optimizer | FusedAdamW, rate: float) -> None:
    if isinstance(optimizer, FusedAdamW):
        optimizer.lr = rate
        return
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def update(optimizer: Optimizer | FusedAdamW, weights: "Weights", largest: float, loss: Tensor) -> tuple[Tensor, Tensor]:
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
        if finite:  # on a CPU asking costs nothing
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
