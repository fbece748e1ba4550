"""Load sharded models: create them on the meta device, shard them, and read the weights from safetensors. No rank holds a whole model.

Adapters are small and are not on the meta device. As in `verl.engine.weights`, weights are sharded along their first dimension.
"""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from verl import dist
from verl.models.attention.packed import PACKED
from verl.models.load import Loaded, find_saved_dtypes, language_class, loading, resolve, restore_stated_dtype
from verl.models.on_disk import weight_files

TWIN_VOCABULARY = 1024


def load_without_values(
    path: str,
    *,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    kind: Any = None,
    head: Callable[[PreTrainedModel], nn.Module] | None = None,
    attention: str = PACKED,
    labels: int = 1,
) -> Loaded | None:
    """Load a model on the meta device, with `Loaded.fill` to read its weights once they are sharded.

    Args:
        dtype: dtype of the parameters.
        kind: transformers' Auto class of the model; None: a causal language model.
        head: returns the model's scalar head, which starts at zero if the files lack it; None if the model has no scalar head.
        attention: name of the attention implementation in transformers.
        labels: number of the head's outputs.
    Returns:
        the model, or None if names or shapes of the tensors in the files differ from those of the model, as in an older layout that only
        transformers can read.
    Raises:
        UserError: no such model.
    """
    folder = _local_folder(path)
    with loading("model", path):
        own: dict[str, Any] = {} if head is None else {"num_labels": labels}
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, **own)
        kind = kind or language_class(config)
        with init_empty_weights(include_buffers=False):
            options = {"attn_implementation": attention, "trust_remote_code": trust_remote_code}
            model: PreTrainedModel = kind.from_config(config, dtype=dtype, **options)
    model.tie_weights()
    model.name_or_path = path
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    tensor_files = _file_of_each_tensor(folder)
    of_head = set() if head is None else {id(parameter) for parameter in head(model).parameters()}
    new = {name for name, tensor in model.state_dict(keep_vars=True).items() if id(tensor) in of_head and name not in tensor_files}
    if not all(_is_on_disk(model, name, tensor_files) for name in model.state_dict() if name not in new):
        return None
    names = set(model.state_dict())
    vars(model)["unexpected_keys"] = sorted(name for name in tensor_files if name not in names)
    vars(model)["_weight_conversions"] = []  # names in the files are those of the model, and are kept
    dtypes = find_saved_dtypes(model, str(folder), keeps=head is None)
    restore_stated_dtype(model, path, dtypes, trust_remote_code=trust_remote_code)
    return Loaded(model, dtypes, partial(_fill, tensor_files=tensor_files, zeros=new), partial(_read_whole, tensor_files=tensor_files))


def small_twin(model: PreTrainedModel, device: torch.device, attention: str = PACKED) -> PreTrainedModel:
    """Build a small model of the same architecture in float32, with random weights, a small vocabulary and each type of layer."""
    from verl.models.twin import changed, drop_token_ids, keep_few_layers  # once a run

    config = changed(model.config, keep_few_layers)
    text = config.get_text_config()
    text.vocab_size = TWIN_VOCABULARY
    drop_token_ids(text)
    with torch.device(device), torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        twin: PreTrainedModel = type(model)._from_config(config, dtype=torch.float32, attn_implementation=attention)
    with torch.no_grad():
        for parameter in twin.parameters():  # large enough that attention to a wrong token shows in the logits
            parameter.mul_(4)
    return twin


@torch.no_grad()
def _fill(scorer: nn.Module, device: torch.device, *, tensor_files: dict[str, Path], zeros: set[str]) -> None:
    """Read this rank's shards of a model's weights. Tensors off the meta device, such as buffers and adapters, keep their values."""
    kept = {name: tensor.clone() for name, tensor in _tensors(scorer).items() if not tensor.is_meta}
    scorer.to_empty(device=device)
    model: Any = scorer.model
    model.tie_weights()
    for name, tensor in _tensors(scorer).items():
        if name in kept:
            tensor.copy_(kept[name])
    seen: set[int] = set()
    with ExitStack() as stack:
        files = {path: stack.enter_context(safe_open(path, "pt")) for path in set(tensor_files.values())}
        for name, tensor in model.state_dict(keep_vars=True).items():
            on_disk = name.replace(".base_layer", "")  # peft nests the layer inside its adapter, and experts in one for each matrix
            if name in zeros:
                tensor.zero_()
            elif id(tensor) not in seen and on_disk in tensor_files:
                seen.add(id(tensor))
                _read(tensor, files[tensor_files[on_disk]].get_slice(on_disk))


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _read_whole(name: str, *, tensor_files: dict[str, Path]) -> Tensor:
    with safe_open(tensor_files[name], "pt") as file:
        tensor: Tensor = file.get_tensor(name)
        return tensor


def _read(tensor: Tensor, values: Any) -> None:
    if not isinstance(tensor, DTensor):
        tensor.copy_(values[...])  # also one number
        return
    local, first = tensor.to_local(), _first_row(tensor)
    if local.numel():
        local.copy_(values[first : first + len(local)])


def _first_row(tensor: DTensor) -> int:
    """Return the first row of this rank's shard; the last shards may be smaller, or empty."""
    (dimension,) = (number for number, placement in enumerate(tensor.placements) if not isinstance(placement, Replicate))
    size = tensor.device_mesh.size(dimension)
    return min(tensor.device_mesh.get_local_rank(dimension) * -(-len(tensor) // size), len(tensor))


def _local_folder(path: str) -> Path:
    """Return the folder with the model's files; the first process of each node downloads them from the Hub."""
    source = resolve(path)
    if Path(source).is_dir():
        return Path(source)
    with loading("model", path):
        return Path(dist.main_first(lambda: snapshot_download(source, allow_patterns=["*.json", "*.safetensors", "*.py"])))


def _file_of_each_tensor(folder: Path) -> dict[str, Path]:
    """Return the path of each tensor's file, by tensor name."""
    tensor_files: dict[str, Path] = {}
    for path in weight_files(str(folder)):
        with safe_open(path, "pt") as file:
            tensor_files |= dict.fromkeys(file.keys(), path)
    return tensor_files


def _is_on_disk(model: PreTrainedModel, name: str, tensor_files: dict[str, Path]) -> bool:
    """Return whether a tensor is on disk with the right shape, or is tied to one that is on disk."""
    tensors = model.state_dict(keep_vars=True)
    if name not in tensor_files:
        return any(other is tensors[name] and key in tensor_files for key, other in tensors.items())
    with safe_open(tensor_files[name], "pt") as file:
        return bool(file.get_slice(name).get_shape() == list(tensors[name].shape))
