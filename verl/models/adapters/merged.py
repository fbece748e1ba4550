"""Merge the adapters of a model one tensor at a time, for a rollout engine with its own copy of the weights.

Dimensions: R rank of the adapter, I inputs and O outputs of an adapted layer.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from verl.errors import UserError

if TYPE_CHECKING:
    from peft import PeftModel

ADAPTER = "default"


def merged_tensors(adapted: "PeftModel") -> Iterator[tuple[str, Tensor]]:
    """Yield the base model's parameters by name, with adapters merged. Every rank calls it, because sharded parameters are gathered.

    Raises:
        UserError: an adapter is not plain LoRA of a linear layer, as with DoRA, 4-bit layers or trainable tokens.
    """
    from peft.tuners.lora import Linear, LoraLayer

    layers = {name: module for name, module in adapted.get_base_model().named_modules() if isinstance(module, LoraLayer)}
    wrong = next((name for name, module in layers.items() if not isinstance(module, Linear) or module.use_dora.get(ADAPTER)), None)
    added = next((name for name, _ in adapted.named_parameters() if "trainable_tokens" in name), None)
    if wrong or added:
        raise UserError(
            f"{wrong or added} cannot be merged into the weights for the rollout",
            where="model.use_dora, model.trainable_tokens or model.load_in_4bit",
            fix="remove it, or use one process or model.strategy=ddp with rollout.name=native, which needs no merged weights",
        )
    for name, parameter in adapted.get_base_model().named_parameters():
        owner, _, kind = name.partition(".base_layer.")
        if ".lora_" in name:
            continue
        layer: Any = layers.get(owner)
        if layer is None or kind != "weight":
            yield name.replace(".base_layer.", "."), _whole(parameter)
        else:
            yield f"{owner}.weight", _merged(layer)


@torch.no_grad()
def _merged(layer: Any) -> Tensor:
    """Compute W + scaling × B A in float32, and cast it to the dtype of W."""
    weight_OI, a_RI, b_OR = (_whole(p.weight) for p in (layer.base_layer, layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]))
    product_OI = b_OR.float() @ a_RI.float() * layer.scaling[ADAPTER]
    merged_OI: Tensor = weight_OI.float() + product_OI
    return merged_OI.to(weight_OI.dtype)


def _whole(parameter: Tensor) -> Tensor:
    tensor = parameter.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
