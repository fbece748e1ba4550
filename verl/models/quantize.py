"""Frozen weights in 4 bits, as QLoRA has them: NF4 in blocks, with scales that are quantized themselves, through bitsandbytes."""

import importlib.util
from typing import Any

import torch
from torch import Tensor
from transformers import BitsAndBytesConfig, PreTrainedModel

from verl import dist
from verl.config.shared import ModelConfig
from verl.errors import UserError


def four_bit(config: ModelConfig, compute_dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """How transformers is to load the linear layers; None where the config asks for no such thing.

    The arithmetic is in float32 until `set_compute_dtype`, so that a loaded model can be checked as any other.

    Raises:
        UserError: bitsandbytes is missing, or there are many processes.
    """
    if not config.load_in_4bit:
        return None
    where = "model.load_in_4bit=true"
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("needs bitsandbytes", where=where, fix='pip install "verl[4bit]"')
    if dist.world_size() > 1:
        raise UserError("weights in 4 bits are not sharded", where=where, fix="use one process, or set model.load_in_4bit=false")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        # Four or eight codes stand in one number of the dtype that the rest of the model has, so that nothing casts them.
        bnb_4bit_quant_storage=compute_dtype,
    )


def keep_layout(model: PreTrainedModel) -> None:
    """On a CPU, bitsandbytes would lay codes out anew for evaluation, and could not train with them afterwards."""
    module: Any
    for module in model.modules():
        if is_quantized(getattr(module, "weight", None)) and hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def set_compute_dtype(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """The dtype that layers in 4 bits compute in."""
    module: Any
    for module in model.modules():
        if is_quantized(getattr(module, "weight", None)) and hasattr(module, "compute_dtype"):
            module.compute_dtype, module.compute_type_is_set = dtype, True


def is_quantized(parameter: Tensor | None) -> bool:
    """Whether a parameter holds codes in place of numbers, so that it must not be cast."""
    return getattr(parameter, "quant_state", None) is not None


def numel(parameter: Tensor) -> int:
    """The number of weights that a parameter stands for."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(torch.Size(state.shape).numel())
