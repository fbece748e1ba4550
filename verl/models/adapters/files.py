"""Adapter directories: read them, check that they fit a model, and attach them to it."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from verl.errors import UserError

CONFIG, WEIGHTS, ALL_LINEAR = "adapter_config.json", "adapter_model.safetensors", "all-linear"
_PREFIX = "base_model.model."  # prefix of peft's module names


def read_config(path: str, *, key: str | None = None) -> LoraConfig:
    """Read the config of the LoRA adapter in a directory.

    Args:
        key: config key that names the directory, for errors.
    Raises:
        UserError: the directory has no adapter, or an adapter of another kind.
    """
    place = f"{key}={path}" if key else path
    folder = Path(path).expanduser()
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            fix = "give the directory of a LoRA adapter, such as global_step_N of a LoRA run"
            raise UserError(f"{name} is missing", where=place, fix=fix)
    try:
        found: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        kind = found.get("peft_type")
        settings: LoraConfig | None = LoraConfig.from_pretrained(str(folder)) if kind == "LORA" else None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{CONFIG} cannot be read: {error}", where=place, fix="save the adapter again") from error
    if settings is None:
        raise UserError(f"is an adapter of type {kind}, not LoRA", where=place, fix="give a LoRA adapter")
    return settings


def read_weights(path: str) -> dict[str, Tensor]:
    """Read the tensors of an adapter directory, by peft's names. Raises UserError if the file is damaged."""
    try:
        return load_file(Path(path).expanduser() / WEIGHTS)
    except SafetensorError as error:
        raise UserError(f"damaged weights: {error}", where=path, fix="copy or save the adapter again") from error


def names_module(target: str, name: str) -> bool:
    """Return whether `target` is the full name of a module, or its last parts."""
    return name == target or name.endswith(f".{target}")


def targeted(model: PreTrainedModel, targets: Any) -> Iterator[tuple[str, nn.Module]]:
    """Yield name and module of each module of a model without adapters to which peft would add one."""
    for name, module in model.named_modules():
        if targets == ALL_LINEAR:
            chosen = isinstance(module, (nn.Linear, Conv1D)) and module is not model.get_output_embeddings()
        elif isinstance(targets, str):
            chosen = re.fullmatch(targets, name) is not None
        else:
            chosen = any(names_module(target, name) for target in targets or ())
        if chosen:
            yield name, module


def attach(model: PreTrainedModel, path: str) -> PeftModel:
    """Attach the adapter of a directory to a model.

    If the adapter targets only one of two tied embeddings, they are untied, because merging would otherwise change both.

    Raises:
        UserError: the adapter does not fit the model.
    """
    settings = read_config(path)
    check_base(path, model, settings)
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    on_one = any(module in ends for _, module in targeted(model, settings.target_modules))
    if model.config.tie_word_embeddings and on_one and not getattr(settings, "ensure_weight_tying", False):
        untie(model)
    adapted = PeftModel.from_pretrained(model, str(Path(path).expanduser()))
    assert isinstance(adapted, PeftModel)
    return adapted


def untie(model: PreTrainedModel) -> None:
    """Give the output layer a copy of the input embedding's weight."""
    model.config.tie_word_embeddings = False
    head: Any = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    model.all_tied_weights_keys = {}  # otherwise the output layer would not be saved


def check_base(path: str, model: PreTrainedModel, settings: LoraConfig) -> None:
    """Check by the name of the base model and the shapes of the tensors that an adapter fits this model.

    Raises:
        UserError: it does not.
    """
    base, name = settings.base_model_name_or_path or "an unnamed base", str(model.config.name_or_path)
    fix = "set model.partial_pretrain to the adapter's base, or give an adapter of this model"
    if settings.base_model_name_or_path and not _same_model(base, name):
        raise UserError(f"the adapter was made for {base}, but the model is {name}", where=path, fix=fix)
    modules = dict(model.named_modules())
    with safe_open(Path(path).expanduser() / WEIGHTS, "pt") as file:
        for tensor in file.keys():  # noqa: SIM118, not a dictionary
            module, _, part = tensor.removeprefix(_PREFIX).partition(".lora_")
            if not part:
                continue
            if module not in modules:
                raise UserError(
                    f"the adapter, made for {base}, has weights for {module}; the model {name} has no such module", where=path, fix=fix
                )
            there, here = file.get_slice(tensor).get_shape(), modules[module]
            if isinstance(here, nn.Linear) and (
                (part.startswith("A.") and there[1] != here.in_features) or (part.startswith("B.") and there[0] != here.out_features)
            ):
                size = f"{here.in_features} to {here.out_features}"
                what = f"lora_{part} of {module}, made for {base}, has shape {there}; the layer of {name} maps {size} features"
                raise UserError(what, where=path, fix=fix)


def _same_model(base: str, name: str) -> bool:
    """Return whether two names mean the same model.

    Two existing directories must be the same one. Otherwise, as with a Hub name or a deleted directory, the last part decides.
    """
    here, there = Path(base).expanduser(), Path(name).expanduser()
    if here.is_dir() and there.is_dir():
        return here.resolve() == there.resolve()
    return here.name.lower() == there.name.lower()
