"""LoRA adapters through peft: small trained matrices beside frozen weights."""

from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from verl.config import ModelConfig
from verl.errors import UserError


def add_adapters(model: PreTrainedModel, config: ModelConfig, *, compute_dtype: torch.dtype, seed: int) -> PeftModel:
    """Freeze the model and put adapters beside its linear layers, which are changed in place.

    Args:
        model: in float32; what is frozen is kept in the compute dtype from here on, since it never takes an update.
        seed: of the adapters' first values, equal on all ranks.
    Raises:
        UserError: no module has one of the given names.
    """
    targets: Any = config.target_modules if isinstance(config.target_modules, str) else list(config.target_modules)
    torch.manual_seed(seed)
    try:
        adapted = get_peft_model(
            model,
            LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=targets, task_type="CAUSAL_LM"),  # type: ignore[arg-type]
            autocast_adapter_dtype=False,
        )
    except ValueError as error:
        linear = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)})
        raise UserError(
            f"no module matches {targets!r}", where="model.target_modules", fix=f"all-linear, or some of {', '.join(linear)}"
        ) from error
    for parameter in adapted.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(compute_dtype)
    return adapted
