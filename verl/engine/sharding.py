"""FSDP2: which parts of a model are sharded together, and how."""

from collections import Counter
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from verl import dist
from verl.engine.layers import decoder_layers
from verl.engine.scorers import Scorer


def shard(
    scorer: Scorer,
    device: torch.device,
    *,
    compute_dtype: torch.dtype,
    size: int | None = None,
    reshard_after_forward: bool = True,
    cpu_offload: bool = False,
    pin: bool = False,
) -> FSDPModule:
    """Shard each decoder layer separately, and the rest (embeddings, last norm, output layer, layers that share weights) together.

    While a layer computes, the weights of the next one are prefetched. The settings are those of `verl.engine.weights.Sharding`.

    Returns:
        the same module, sharded.
    """
    mesh = dist.mesh(device, size)
    # With one rank, resharding would only add copies.
    alone = mesh.size() == 1 and not cpu_offload
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32),
        "offload_policy": CPUOffloadPolicy(pin_memory=pin) if cpu_offload and device.type != "cpu" else OffloadPolicy(),
        "reshard_after_forward": reshard_after_forward and not alone,
    }
    separate = _separate(decoder_layers(scorer.model), scorer)
    if not scorer.path.packed:
        from verl.engine.one_by_one import use_all_weights  # as in Scorer.hidden

        use_all_weights(separate)
    layers: list[Any] = [fully_shard(layer, **options) for layer in separate]
    for layer, following in pairwise(layers):
        layer.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([layer])
    sharded: FSDPModule = fully_shard(scorer, **{**options, "reshard_after_forward": False})
    return sharded


def _separate(layers: list[nn.Module], whole: nn.Module) -> list[nn.Module]:
    """Return the layers that share no weight with another one, or with a part of the whole outside them, such as the output layer."""
    inside = {module for layer in layers for module in layer.modules()}
    uses = Counter(p for layer in layers for p in layer.parameters())
    uses.update(p for module in whole.modules() if module not in inside for p in module.parameters(recurse=False))
    return [layer for layer in layers if all(uses[p] == 1 for p in layer.parameters())]
