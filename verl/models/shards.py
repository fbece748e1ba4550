"""A model that never exists whole: made without values, sharded, and then read from safetensors, each process its own part.

Adapters are small, and have values from the start.

Dimensions: as in `verl.engine.fsdp`, weights are cut along their first dimension.
"""

import copy
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
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from verl import dist
from verl.models.attention.packed import PACKED
from verl.models.load import Loaded, cannot_load, find_saved_dtypes, resolve, restore_stated_dtype, weight_files

TWIN_VOCABULARY = 1024


def load_without_values(
    path: str,
    *,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    kind: Any = AutoModelForCausalLM,
    head: Callable[[PreTrainedModel], nn.Module] | None = None,
) -> Loaded | None:
    """A model whose parameters have shapes alone, and `fill`, which reads them once they are sharded.

    Args:
        kind: transformers' class of such models.
        head: the part of the model that gives one number, and is zero where the files have none; None: it has no such part.
    Returns:
        None where the files hold other tensors than the model has (an older layout, say), which only transformers can read.
    Raises:
        UserError: no such model.
    """
    folder = _fetched(path)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, **({} if head is None else {"num_labels": 1}))
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = kind.from_config(config, dtype=dtype, attn_implementation=PACKED, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise cannot_load("model", path, error) from error
    model.tie_weights()
    model.name_or_path = path
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    places = _places(folder)
    own = set() if head is None else {id(parameter) for parameter in head(model).parameters()}
    new = {name for name, tensor in model.state_dict(keep_vars=True).items() if id(tensor) in own and name not in places}
    if not all(_is_there(model, name, places) for name in model.state_dict() if name not in new):
        return None
    dtypes = find_saved_dtypes(model, str(folder))
    restore_stated_dtype(model, path, dtypes, trust_remote_code=trust_remote_code)
    return Loaded(model, dtypes, partial(_fill, places=places, zeros=new), partial(_read_whole, places=places))


def small_twin(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """The same architecture with as few layers as have one of each kind, a small vocabulary and random weights, in float32."""
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    text.num_hidden_layers = max(2, 1 + max(map(kinds.index, set(kinds)))) if kinds else 2
    if kinds:
        text.layer_types = kinds[: text.num_hidden_layers]
    text.vocab_size = TWIN_VOCABULARY
    text.pad_token_id = text.bos_token_id = text.eos_token_id = None
    with torch.device(device), torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        twin: PreTrainedModel = type(model)._from_config(config, dtype=torch.float32, attn_implementation=PACKED)
    with torch.no_grad():
        for parameter in twin.parameters():  # far enough from zero that a token that sees too much shows in the logits
            parameter.mul_(4)
    return twin


@torch.no_grad()
def _fill(scorer: nn.Module, device: torch.device, *, places: dict[str, Path], zeros: set[str]) -> None:
    """Read a sharded model's values, each process those of its shards. What has values, such as buffers and adapters, keeps them."""
    kept = {name: tensor.clone() for name, tensor in _tensors(scorer).items() if not tensor.is_meta}
    scorer.to_empty(device=device)
    model: Any = scorer.model
    model.tie_weights()
    for name, tensor in _tensors(scorer).items():
        if name in kept:
            tensor.copy_(kept[name])
    seen: set[int] = set()
    with ExitStack() as stack:
        files = {path: stack.enter_context(safe_open(path, "pt")) for path in set(places.values())}
        for name, tensor in model.state_dict(keep_vars=True).items():
            on_disk = name.replace(".base_layer.", ".")  # peft puts a layer with an adapter one deeper
            if name in zeros:
                tensor.zero_()
            elif id(tensor) not in seen and on_disk in places:
                seen.add(id(tensor))
                _read(tensor, files[places[on_disk]].get_slice(on_disk))


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _read_whole(name: str, *, places: dict[str, Path]) -> Tensor:
    with safe_open(places[name], "pt") as file:
        tensor: Tensor = file.get_tensor(name)
        return tensor


def _read(tensor: Tensor, values: Any) -> None:
    if not isinstance(tensor, DTensor):
        tensor.copy_(values[:])
        return
    local, first = tensor.to_local(), _first_row(tensor)
    if local.numel():
        local.copy_(values[first : first + len(local)])


def _first_row(tensor: DTensor) -> int:
    """Of this process's shard; the last shards may be smaller, or empty."""
    (dimension,) = (number for number, placement in enumerate(tensor.placements) if not isinstance(placement, Replicate))
    size = tensor.device_mesh.size(dimension)
    return min(tensor.device_mesh.get_local_rank(dimension) * -(-len(tensor) // size), len(tensor))


def _fetched(path: str) -> Path:
    """The folder with the model's files; from the Hub, each node's first process brings them."""
    source = resolve(path)
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(dist.main_first(lambda: snapshot_download(source, allow_patterns=["*.json", "*.safetensors", "*.py"])))
    except (OSError, ValueError) as error:
        raise cannot_load("model", path, error) from error


def _places(folder: Path) -> dict[str, Path]:
    """The file of each tensor."""
    places: dict[str, Path] = {}
    for path in weight_files(str(folder)):
        with safe_open(path, "pt") as file:
            places |= dict.fromkeys(file.keys(), path)
    return places


def _is_there(model: PreTrainedModel, name: str, places: dict[str, Path]) -> bool:
    """Whether a tensor is on disk in its shape, or is another one's second name."""
    tensors = model.state_dict(keep_vars=True)
    if name not in places:
        return any(other is tensors[name] and key in places for key, other in tensors.items())
    with safe_open(places[name], "pt") as file:
        return bool(file.get_slice(name).get_shape() == list(tensors[name].shape))
