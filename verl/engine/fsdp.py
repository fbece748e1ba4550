"""Sharding with FSDP2: weights as they were loaded, arithmetic in the compute dtype, gradients reduced in float32."""

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from verl.engine.logprobs import TokenScorer


def shard(scorer: TokenScorer, mesh: DeviceMesh, *, compute_dtype: torch.dtype, cpu_offload: bool) -> FSDPModule:
    """Shard every decoder layer by itself, and what is left (embeddings, last norm, output layer) together.

    Args:
        mesh: one dimension, all processes; a mesh of one runs the same code.
        cpu_offload: keep parameters, gradients and optimizer state in host memory.
    Returns:
        the same module, now sharded.
    """
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    offload = CPUOffloadPolicy() if cpu_offload else OffloadPolicy()
    # With one process there is nobody to get a layer back from, so giving it away would only cost copies.
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": policy,
        "offload_policy": offload,
        "reshard_after_forward": mesh.size() > 1 or cpu_offload,
    }
    for layer in decoder_layers(scorer.model):
        fully_shard(layer, **options)
    sharded: FSDPModule = fully_shard(scorer, **{**options, "reshard_after_forward": False})
    return sharded


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks that the architecture names as not to be split."""
    names = set(getattr(model, "_no_split_modules", None) or [])
    return [module for module in model.modules() if type(module).__name__ in names]
