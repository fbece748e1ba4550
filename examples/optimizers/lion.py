"""An optimizer of your own: Lion (arXiv:2302.06675), which updates weights by the sign of a momentum.

    verl sft … optim.name=examples/optimizers/lion.py optim.lr=3e-6 optim.weight_decay=0.1

An optimizer is a module with `build(groups, settings, *, lr, copies)` and `state_bytes()`, see verl/engine/optimizers. It may return a
torch.optim.Optimizer. The state of a sharded weight is sharded like the weight.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Settings:
    # Decay rates of the momentum: for the direction of the update, and for the stored momentum.
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])

    def check(self) -> None:
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={list(self.betas)}: give two numbers from 0 to below 1")


def state_bytes() -> float:
    """Return the bytes of optimizer state per weight: a float32 momentum."""
    return 4.0


def build(groups: list[dict[str, Any]], settings: Settings, *, lr: float, copies: Mapping[nn.Parameter, Tensor]) -> "Lion":
    return Lion(groups, lr, settings.betas)


class Lion(torch.optim.Optimizer):
    def __init__(self, groups: Iterable[dict[str, Any]], lr: float, betas: list[float]):
        super().__init__(groups, {"lr": lr})
        self._betas = betas
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["momentum"] = torch.zeros_like(p)  # created here, so that a checkpoint can be loaded into it

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    momentum = self.state[p]["momentum"]
                    direction = momentum.lerp(p.grad, 1 - self._betas[0]).sign_()
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"])
                    momentum.lerp_(p.grad, 1 - self._betas[1])
