"""Merge the adapters of a model one tensor at a time, for a rollout engine with its own copy of the weights.

Dimensions: R rank of the adapter, I inputs and O outputs of an adapted layer, E experts.
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
        UserError: an adapter is not plain LoRA of a linear layer or of experts, as with DoRA, 4-bit layers or trainable tokens.
    """
    from peft.tuners.lora import Linear, LoraLayer
    from peft.tuners.lora.layer import ParamWrapper

    layers = {name: module for name, module in adapted.get_base_model().named_modules() if isinstance(module, LoraLayer)}
    wrong = next((n for n, layer in layers.items() if not isinstance(layer, Linear | ParamWrapper) or layer.use_dora.get(ADAPTER)), None)
    added = next((name for name, _ in adapted.named_parameters() if "trainable_tokens" in name), None)
    if wrong or added:
        raise UserError(
            f"{wrong or added} cannot be merged into the weights for the rollout",
            where="model.use_dora, model.trainable_tokens or model.load_in_4bit",
            fix="remove it, or use one process or model.strategy=ddp with rollout.name=native, which needs no merged weights",
        )
    # Each adapted weight, by its name without adapters. Several matrices of the same experts are nested: experts.base_layer.base_layer.
    owners = {f"{_plain(name)}.{getattr(layer, 'parameter_name', 'weight')}": layer for name, layer in layers.items()}
    for name, parameter in adapted.get_base_model().named_parameters():
        if ".lora_" not in name:
            plain = _plain(name)
            yield plain, _merged(owners[plain], parameter) if plain in owners else _whole(parameter)


def _plain(name: str) -> str:
    return name.replace(".base_layer", "")


@torch.no_grad()
def _merged(layer: Any, parameter: Tensor) -> Tensor:
    """Compute W + scaling × B A in float32, and cast it to the dtype of W."""
    weight, a, b = _whole(parameter), _whole(layer.lora_A[ADAPTER].weight).float(), _whole(layer.lora_B[ADAPTER].weight).float()
    if weight.dim() == 2:
        product = (b @ a).T if layer.fan_in_fan_out else b @ a  # GPT-2's layers have their weights the other way round
    else:  # of E experts: a is [E × R, I], b is [O, R × E]
        experts = len(weight)
        a_ERI, b_EOR = a.view(experts, -1, a.shape[1]), b.view(len(b), -1, experts).permute(2, 0, 1)
        product = b_EOR @ a_ERI
        if getattr(layer.get_base_layer(), "is_transposed", False):
            product = product.transpose(1, 2)
    merged: Tensor = weight.float() + product * layer.scaling[ADAPTER]
    return merged.to(weight.dtype)


def _whole(parameter: Tensor) -> Tensor:
    tensor = parameter.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
