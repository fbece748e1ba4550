"""Sharding with FSDP2: weights in the loaded dtype, arithmetic in the compute dtype, gradient reduction in float32."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from verl import dist
from verl.engine.scorers import Scorer


@dataclass(frozen=True)
class Sharding:
    """Settings of FSDP2.

    Attributes:
        size: consecutive ranks that share one copy of the weights; the groups hold replicas of each other (HSDP). None: all ranks.
        reshard_after_forward: free a layer's gathered weights after its forward pass, and gather them again for the backward pass.
        cpu_offload: keep parameters, gradients and optimizer state in host memory.
        pin: pin the offloaded parameters and gradients, which makes copies to a GPU faster; PyTorch then rounds each tensor up to a
            power of two.
    """

    size: int | None = None
    reshard_after_forward: bool = True
    cpu_offload: bool = False
    pin: bool = True

    def describe(self) -> str:
        size, everyone = self.size or dist.world_size(), dist.world_size()
        groups = f", in {everyone // size} groups" if size < everyone else ""
        return f"sharded over {size}{groups}" + (" in host memory" if self.cpu_offload else "") if everyone > 1 else "in host memory"


def shard(scorer: Scorer, device: torch.device, sharding: Sharding, *, compute_dtype: torch.dtype) -> FSDPModule:
    """Shard each decoder layer separately, and the rest (embeddings, last norm, output layer) together.

    While a layer computes, the weights of the next one are prefetched.

    Returns:
        the same module, sharded.
    """
    mesh = dist.mesh(device, sharding.size)
    # With one rank, resharding would only cost copies.
    alone = mesh.size() == 1 and not sharding.cpu_offload
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32),
        "offload_policy": CPUOffloadPolicy(pin_memory=sharding.pin) if sharding.cpu_offload and device.type != "cpu" else OffloadPolicy(),
        "reshard_after_forward": sharding.reshard_after_forward and not alone,
    }
    layers: list[Any] = [fully_shard(layer, **options) for layer in decoder_layers(scorer.model)]
    for layer, following in pairwise(layers):
        layer.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([layer])
    sharded: FSDPModule = fully_shard(scorer, **{**options, "reshard_after_forward": False})
    return sharded


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Return the modules in the architecture's `_no_split_modules`: its repeated blocks."""
    names = set(getattr(model, "_no_split_modules", None) or [])
    return [module for module in model.modules() if type(module).__name__ in names]
