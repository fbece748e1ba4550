"""Save a trained model as a Hugging Face directory, with the keys, shapes and dtypes of the original."""

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_NAME

from verl import dist

if TYPE_CHECKING:
    from peft import PeftModel


def export_model(directory: Path, model: PreTrainedModel, saved_dtypes: dict[str, torch.dtype], *, max_shard_size: str = "50GB") -> None:
    """Write config and safetensors. Every rank calls it; rank 0 writes.

    Args:
        model: model to save, which may be sharded; its weights are gathered and cast one at a time.
        saved_dtypes: dtype on disk of each tensor, by its name in the model.
        max_shard_size: maximum size of a weight file, such as "50GB".
    """
    write_model(directory, model, gather(model, saved_dtypes), saved_dtypes, max_shard_size=max_shard_size)


def write_model(
    directory: Path,
    model: PreTrainedModel,
    weights: dict[str, Tensor],
    saved_dtypes: Mapping[str, torch.dtype],
    *,
    max_shard_size: str = "50GB",
) -> None:
    """Write config and safetensors of gathered weights. It waits for no other rank, and does not use the model's own weights."""
    from verl.models.on_disk import write_weights

    if dist.is_main():
        original = copy.deepcopy(model.config)
        model.save_pretrained(directory, state_dict={})  # all but the weights
        (directory / SAFE_WEIGHTS_NAME).unlink(missing_ok=True)
        write_weights(directory, model, weights, saved_dtypes, max_shard_size)
        # save_pretrained writes the dtype of the weights in memory, but the config must have that of the weights on disk.
        original.architectures = model.config.architectures
        original.save_pretrained(directory)
        model.config.dtype = original.dtype
        if hasattr(model, "absent"):
            from verl.models.multimodal import copy_processor  # few models have one

            copy_processor(model, directory)


def export_adapter(directory: Path, adapted: "PeftModel") -> None:
    """Write a LoRA adapter in peft's format. Every rank calls it; rank 0 writes."""
    write_adapter(directory, adapted, gather(adapted, {}, only_trained=True))


def write_adapter(directory: Path, adapted: "PeftModel", weights: dict[str, Tensor]) -> None:
    """Write gathered weights of an adapter, as `write_model` does."""
    from peft import get_peft_model_state_dict

    from verl.models.adapters.targets import names_for_peft, read_by_peft

    if dist.is_main():
        # The embeddings were not resized, so peft need not compare them with those of the base model.
        adapter = names_for_peft(adapted, get_peft_model_state_dict(adapted, state_dict=weights, save_embedding_layers=False))
        save_file(
            {_name_for_both(name): tensor.contiguous() for name, tensor in adapter.items()},
            directory / "adapter_model.safetensors",
            metadata={"format": "pt"},
        )
        config: Any = copy.deepcopy(adapted.peft_config["default"])
        config.inference_mode = True
        model: Any = adapted.get_base_model()
        read_by_peft(model, config)
        if hasattr(model, "absent"):
            from verl.models.multimodal import name_in_full  # few models need it

            name_in_full(model, config)
        config.save_pretrained(str(directory))


def _name_for_both(name: str) -> str:
    """Return the name under which both peft and transformers read a tensor: transformers needs a suffix on DoRA's magnitudes."""
    return f"{name}.weight" if name.endswith("lora_magnitude_vector") else name


def export_tokenizer(
    directory: Path, tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig | None, stop_ids: Iterable[int]
) -> None:
    """Write the tokenizer with its chat template, and a generation config that stops at every trained stop token."""
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


def gather(
    model: torch.nn.Module,
    saved_dtypes: dict[str, torch.dtype],
    *,
    only_trained: bool = False,
    copies: Mapping[int, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Gather full tensors by name in rank 0's host memory; other ranks get an empty dict. Every rank calls it. Tied ones share memory.

    Args:
        copies: copies of parameters in host memory, by the parameter's id. With them, no tensor of the result is the model's own, so that
            training may go on. A copy keeps its dtype, and is cast by `cast` when it is written.
    """
    gathered: dict[str, Tensor] = {}
    seen: dict[int, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if only_trained and not tensor.requires_grad:
            continue
        if id(tensor) not in seen:
            seen[id(tensor)] = _in_host_memory(tensor, saved_dtypes.get(name, tensor.dtype), copies)
        gathered[name] = seen[id(tensor)]
    return gathered if dist.is_main() else {}


def _in_host_memory(tensor: Tensor, dtype: torch.dtype, copies: Mapping[int, Tensor] | None) -> Tensor:
    """Return a full tensor in host memory, on rank 0, and an empty one on others."""
    if copies is not None and id(tensor) in copies and not isinstance(tensor, DTensor):
        return copies[id(tensor)]
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor  # a collective, called by every rank
    if not dist.is_main():
        return torch.empty(0)
    found = whole.detach().to(dtype).cpu()
    is_own = copies is not None and tensor.requires_grad and found.data_ptr() == whole.data_ptr()
    return found.clone() if is_own else found


def cast(weights: Mapping[str, Tensor], saved_dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """Return gathered weights in their dtypes on disk. Tied ones still share memory."""
    seen: dict[int, Tensor] = {}
    for name, tensor in weights.items():
        if id(tensor) not in seen:
            seen[id(tensor)] = tensor.to(saved_dtypes.get(name, tensor.dtype))
    return {name: seen[id(tensor)] for name, tensor in weights.items()}
