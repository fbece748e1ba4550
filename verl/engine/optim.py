"""AdamW, its learning-rate schedule, and the clipping of gradients by their global norm."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from verl.config import OptimConfig


def build_optimizer(parameters: Iterable[nn.Parameter], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the trained parameters; biases and norms (one dimension) are not decayed."""
    trained = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=(config.betas[0], config.betas[1]), fused=True)


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


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def clip_gradients(parameters: Iterable[nn.Parameter], largest: float) -> Tensor:
    """Scale gradients so that their norm over all parameters and ranks is at most `largest`.

    Returns:
        that norm before clipping, a scalar on the device.
    """
    norm = nn.utils.clip_grad_norm_(parameters, largest)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
