"""Loads language models for generation, whole or as an adapter that is merged into its base model."""

from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel

from verl.errors import UserError
from verl.models.load import load_language_model, read_adapter_config, resolve


def load_for_inference(
    path: str, *, device: torch.device | str, dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load a causal language model for generation. An adapter is merged into its base model.

    Args:
        path: model directory, LoRA adapter directory, or Hub name.
        device: device of the weights.
        dtype: dtype of the weights in memory; None: the dtype on disk.
    Raises:
        UserError: no such model, or the base model of an adapter cannot be loaded.
    """
    adapter = read_adapter_config(path)
    base = path if adapter is None else adapter["base_model_name_or_path"]
    try:
        model = load_language_model(base, device=device, dtype=dtype or "auto", trust_remote_code=trust_remote_code)
    except UserError as error:
        if adapter is None:
            raise
        raise UserError(f"the adapter's base model cannot be loaded: {error.what}", where=path, fix=f"restore it at {base}") from error
    if adapter is not None:
        from verl.models.adapters.files import attach

        directory = resolve(path)
        attach(model, directory).merge_and_unload()
        if (Path(directory) / "generation_config.json").is_file():  # it has the stop tokens of the adapter's training
            model.generation_config = GenerationConfig.from_pretrained(directory)
    evaluated: PreTrainedModel = model.eval()
    return evaluated
