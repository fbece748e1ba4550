"""What a model's files hold, beside the names and values that it has in memory.

transformers renames some tensors while it loads them, stacks those of experts, and passes over others, such as heads that predict several
tokens. A saved model has the names, the dtypes and all tensors of its files again.
"""

import copy
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from verl.pace import counted

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # by name in safetensors
SHARDS = "model{suffix}.safetensors"


@dataclass(frozen=True)
class Entry:
    """A tensor in a file.

    Attributes:
        dtype: None for one that transformers does not train, such as integers.
        size: number of bytes.
    """

    file: Path
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    size: int

    def read(self, name: str) -> Tensor:
        with safe_open(self.file, "pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor


class OnDisk(dict[str, torch.dtype]):
    """dtype on disk of each of a model's tensors, by its name in the model; of one that is stacked of several, the widest.

    Attributes:
        dtypes: dtype of each tensor in the files, by its name there.
        passed_over: tensors in the files that the model does not load and that are saved again as they are, by name.
    """

    def __init__(self, by_name: Mapping[str, torch.dtype], dtypes: Mapping[str, torch.dtype], passed_over: Mapping[str, Entry]):
        super().__init__(by_name)
        self.dtypes, self.passed_over = dict(dtypes), dict(passed_over)

    @property
    def extra_bytes(self) -> int:
        """Bytes of the tensors that are saved beside the model's."""
        return sum(entry.size for entry in self.passed_over.values())

    def describe(self) -> str:
        """Describe in one line what is saved as it is; "" if nothing is."""
        if not self.passed_over:
            return ""
        kinds = sorted({re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in self.passed_over})
        shown = ", ".join(kinds[:3]) + (f" and {counted(len(kinds) - 3, 'more kind')}" if len(kinds) > 3 else "")
        size = f"{self.extra_bytes / 1e9:,.2f} GB" if self.extra_bytes >= 1e7 else f"{self.extra_bytes:,} bytes"
        many = counted(len(self.passed_over), "tensor")
        return f"not trained, and saved as in the model's files: {many} ({size}): {shown}"


def look(model: PreTrainedModel, source: str, *, keeps: bool) -> OnDisk:
    """Find out what the files of a loaded model hold. Only their headers are read.

    Tied tensors have the same dtype. A tensor that is not in the files has the dtype of most elements there.

    Args:
        source: local directory or Hub name.
        keeps: whether tensors that the model does not load are to be saved again.
    """
    entries = dict(_headers(weight_files(source)))
    elements: Counter[torch.dtype] = Counter()
    for entry in entries.values():
        if entry.dtype is not None:
            elements[entry.dtype] += entry.size // entry.dtype.itemsize
    usual = max(elements, key=elements.__getitem__, default=None)
    tensors = model.state_dict(keep_vars=True)
    sources = _sources(model, tensors, entries)
    found: dict[int, torch.dtype] = {}
    for name, names in sources.items():
        if dtypes := [dtype for one in names if (dtype := entries[one].dtype) is not None]:
            found[id(tensors[name])] = max(dtypes, key=lambda dtype: dtype.itemsize)
    by_name = {
        name: found.get(id(tensor), usual or tensor.dtype) if tensor.is_floating_point() else tensor.dtype
        for name, tensor in tensors.items()
    }
    placed = {one for names in sources.values() for one in names}
    computed = {name for name, _ in model.named_buffers()}  # older releases wrote them
    others = [name for name in entries if keeps and name not in placed and name not in computed]
    kept = {name: entries[name] for name in others if _is_passed_over(model, name)}
    return OnDisk(by_name, {name: entry.dtype for name, entry in entries.items() if entry.dtype is not None}, kept)


def weight_files(source: str) -> list[Path]:
    """Return the safetensors files of a model that has been loaded from a directory or the Hub."""
    config = cached_file(source, "config.json")
    assert config is not None  # the model was loaded with it
    folder = Path(config).parent
    whole, index = folder / SAFE_WEIGHTS_NAME, folder / SAFE_WEIGHTS_INDEX_NAME
    if whole.is_file():
        return [whole]
    if index.is_file():
        return [folder / name for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))]
    return sorted(folder.glob("*.safetensors"))  # the files may have other names


def _headers(paths: Iterable[Path]) -> Iterable[tuple[str, Entry]]:
    for path in paths:
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, about in header.items():
            if name != "__metadata__":
                start, end = about["data_offsets"]
                yield name, Entry(path, DTYPES.get(about["dtype"]), tuple(about["shape"]), end - start)


def _is_passed_over(model: PreTrainedModel, name: str) -> bool:
    """Return whether transformers says of a name in the files that the model does not load it."""
    if getattr(model.config, "quantization_config", None) is not None:
        return False  # scales, say, which belong to weights that are no longer quantized
    patterns = model._keys_to_ignore_on_load_unexpected or ()
    return name in getattr(model, "unexpected_keys", ()) or any(re.search(pattern, name) for pattern in patterns)


def _sources(model: PreTrainedModel, tensors: Mapping[str, Tensor], entries: Mapping[str, Entry]) -> dict[str, list[str]]:
    """Return the names in the files that each of a model's tensors is made from, by its name in the model."""
    sources = {name: [name] for name in tensors if name in entries}
    if others := [name for name in entries if name not in tensors]:
        names_in_memory = _names_in_memory(model, dict(tensors))
        for name in others:
            for target in names_in_memory(name):
                if target in tensors:
                    sources.setdefault(target, []).append(name)
    return sources


def _names_in_memory(model: PreTrainedModel, tensors: dict[str, Tensor]) -> Callable[[str], list[str]]:
    """Return a function from a name in the files to the names of what transformers makes of it."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    used = getattr(model, "_weight_conversions", None)
    # A copy, because a conversion remembers whether it was used.
    conversions = copy.deepcopy(used if used is not None else get_model_conversion_mapping(model))
    renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
    converters = [one for one in conversions if isinstance(one, WeightConverter)]
    of_pattern = {pattern: one for one in converters for pattern in one.source_patterns}

    def names(name: str) -> list[str]:
        first, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, tensors)
        if pattern is None:
            return [first]
        targets = of_pattern[pattern].target_patterns
        return [first.replace(targets[0], target, 1) for target in targets]

    return names


def write_weights(
    directory: Path, model: PreTrainedModel, weights: dict[str, Tensor], on_disk: Mapping[str, torch.dtype], max_shard_size: str
) -> None:
    """Write gathered weights as safetensors, with the names and dtypes of the original files, and what was passed over there.

    Args:
        weights: full tensors by their names in the model; tied ones share memory.
        on_disk: result of `look`; with a plain dictionary, the weights keep their dtypes.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    weights = {name: tensor for name, tensor in weights.items() if name not in (model._keys_to_ignore_on_save or ())}
    state = revert_weight_conversion(model, remove_tied_weights_from_state_dict(weights, model))
    del weights
    dtypes = on_disk.dtypes if isinstance(on_disk, OnDisk) else {}
    passed_over = {name: entry for name, entry in on_disk.passed_over.items() if name not in state} if isinstance(on_disk, OnDisk) else {}
    planned = {name: torch.empty_like(tensor, dtype=dtypes.get(name, tensor.dtype), device="meta") for name, tensor in state.items()}
    planned |= {name: torch.empty(entry.size, dtype=torch.uint8, device="meta") for name, entry in passed_over.items()}
    plan = split_torch_state_dict_into_shards(planned, filename_pattern=SHARDS, max_shard_size=max_shard_size)
    for file, names in plan.filename_to_tensors.items():
        shard: dict[str, Tensor] = {}
        for name in names:
            tensor = passed_over[name].read(name) if name in passed_over else state.pop(name)
            shard[name] = tensor.to(dtypes.get(name, tensor.dtype)).contiguous()
        save_file(shard, directory / file, metadata={"format": "pt"})
    if plan.is_sharded:
        about = {"total_parameters": model.num_parameters(), **plan.metadata}
        index = json.dumps({"metadata": about, "weight_map": plan.tensor_to_filename}, indent=2, sort_keys=True)
        (directory / SAFE_WEIGHTS_INDEX_NAME).write_text(index + "\n", encoding="utf-8")


def with_dtypes(on_disk: Mapping[str, torch.dtype], by_name: Mapping[str, torch.dtype]) -> OnDisk:
    """Return the same for a model that has other names in memory."""
    return OnDisk(by_name, on_disk.dtypes, on_disk.passed_over) if isinstance(on_disk, OnDisk) else OnDisk(by_name, {}, {})


def without_dtypes(on_disk: OnDisk, by_name: Mapping[str, torch.dtype]) -> OnDisk:
    """Return the same with dtypes by names in memory alone: those of the files no longer hold."""
    return OnDisk(by_name, {name: entry.dtype for name, entry in on_disk.passed_over.items() if entry.dtype}, on_disk.passed_over)
