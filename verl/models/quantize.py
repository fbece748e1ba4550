"""4-bit frozen weights as in QLoRA: blockwise NF4 with double quantization, through bitsandbytes."""

import importlib.util
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from verl import dist
from verl.config.shared import ModelConfig
from verl.errors import UserError
from verl.models.attention.packed import PACKED
from verl.models.load import Loaded, is_quantized, load_for_training


def four_bit(config: ModelConfig, compute_dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """Return the quantization config for transformers, or None if `load_in_4bit` is false.

    Layers compute in float32 until `set_compute_dtype` is called, so that the loaded model can be checked in float32 like any other.

    Raises:
        UserError: bitsandbytes is not installed, or there is more than one process.
    """
    if not config.load_in_4bit:
        return None
    where = "model.load_in_4bit=true"
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("needs bitsandbytes", where=where, fix='pip install "verl[4bit]"')
    if dist.world_size() > 1:
        raise UserError("4-bit weights cannot be sharded", where=where, fix="use one process, or set model.load_in_4bit=false")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        # The 4-bit codes are stored in elements of the compute dtype, four or eight per element, so that nothing casts them.
        bnb_4bit_quant_storage=compute_dtype,
    )


def load_in_4bit(config: ModelConfig, *, device: torch.device | str = "cpu", compute_dtype: torch.dtype, attention: str = PACKED) -> Loaded:
    """Load the model of `config` for training; each linear layer is quantized when it is read.

    Raises:
        UserError: the model cannot be loaded or quantized.
    """
    quantization = four_bit(config, compute_dtype)
    path, trusted = config.partial_pretrain, config.trust_remote_code
    loaded = load_for_training(path, device=device, trust_remote_code=trusted, quantization=quantization, attention=attention)
    keep_layout(loaded.model)
    return loaded


def keep_layout(model: PreTrainedModel) -> None:
    """Prevent bitsandbytes from repacking the codes for inference on a CPU, because repacked codes cannot be trained with."""
    module: Any
    for module in model.modules():
        if is_quantized(getattr(module, "weight", None)) and hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def set_compute_dtype(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Set the dtype in which 4-bit layers compute."""
    module: Any
    for module in model.modules():
        if is_quantized(getattr(module, "weight", None)) and hasattr(module, "compute_dtype"):
            module.compute_dtype, module.compute_type_is_set = dtype, True
