"""Writing a trained model as the Hugging Face directory that it came from: same keys, shapes and dtypes."""

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from verl import dist

if TYPE_CHECKING:
    from peft import PeftModel


def export_model(directory: Path, model: PreTrainedModel, saved_dtypes: dict[str, torch.dtype], *, max_shard_size: str = "50GB") -> None:
    """Write config and safetensors. Every rank calls it; rank 0 writes.

    Args:
        model: sharded or not; its weights are gathered and cast one by one.
        saved_dtypes: dtype of each tensor on disk, by its name in the model.
        max_shard_size: of a file of weights.
    """
    weights = _gather(model, saved_dtypes)
    if dist.is_main():
        original = copy.deepcopy(model.config)
        model.save_pretrained(directory, state_dict=weights, max_shard_size=max_shard_size)
        # save_pretrained names the dtype of the weights in memory; the file has that of the weights on disk.
        original.architectures = model.config.architectures
        original.save_pretrained(directory)
        model.config.dtype = original.dtype


def export_adapter(directory: Path, adapted: "PeftModel") -> None:
    """Write a LoRA adapter in peft's own format. Every rank calls it; rank 0 writes."""
    from peft import get_peft_model_state_dict

    weights = _gather(adapted, {}, only_trained=True)
    if dist.is_main():
        # The embeddings are never resized here, so that peft need not look for those of the base.
        adapter = get_peft_model_state_dict(adapted, state_dict=weights, save_embedding_layers=False)
        save_file(
            {_name_for_both(name): tensor.contiguous() for name, tensor in adapter.items()},
            directory / "adapter_model.safetensors",
            metadata={"format": "pt"},
        )
        config = copy.deepcopy(adapted.peft_config["default"])
        config.inference_mode = True
        config.save_pretrained(str(directory))


def _name_for_both(name: str) -> str:
    """DoRA's magnitudes by the name that peft and transformers both read; peft's own leaves out the last part, which the other needs."""
    return f"{name}.weight" if name.endswith("lora_magnitude_vector") else name


def export_tokenizer(
    directory: Path, tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig | None, stop_ids: Iterable[int]
) -> None:
    """Write the tokenizer, its template, and a generation config that ends at every trained stop token."""
    if not dist.is_main():
        return
    tokenizer.save_pretrained(directory)
    config = copy.deepcopy(generation) if generation is not None else GenerationConfig()
    before = config.eos_token_id
    known = [] if before is None else [before] if isinstance(before, int) else list(before)
    config.eos_token_id = list(dict.fromkeys([*stop_ids, *known]))
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else config.eos_token_id[0]
    config.save_pretrained(directory)


def _gather(model: torch.nn.Module, saved_dtypes: dict[str, torch.dtype], *, only_trained: bool = False) -> dict[str, Tensor]:
    """Full tensors in rank 0's host memory, a shared parameter once; nothing on the other ranks."""
    gathered: dict[str, Tensor] = {}
    seen: dict[int, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if only_trained and not tensor.requires_grad:
            continue
        if id(tensor) not in seen:
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor  # on every rank, one after another
            seen[id(tensor)] = whole.detach().to(saved_dtypes.get(name, tensor.dtype)).cpu() if dist.is_main() else torch.empty(0)
        gathered[name] = seen[id(tensor)]
    return gathered if dist.is_main() else {}
