"""Adapter directories: what is in them, whether they fit a model, and a model with one of them on it."""

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
_PREFIX = "base_model.model."  # of peft's names for the modules of a model


def read_config(path: str, *, key: str | None = None) -> LoraConfig:
    """The settings of the LoRA adapter in a directory.

    Args:
        key: the setting that named it, for errors.
    Raises:
        UserError: there is none, or one of another kind.
    """
    place = f"{key}={path}" if key else path
    folder = Path(path).expanduser()
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            fix = "give the directory of a LoRA adapter, such as global_step_N of a LoRA run"
            raise UserError(f"holds no {name}", where=place, fix=fix)
    try:
        found: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        kind = found.get("peft_type")
        settings: LoraConfig | None = LoraConfig.from_pretrained(str(folder)) if kind == "LORA" else None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{CONFIG} cannot be read: {error}", where=place, fix="write the adapter again") from error
    if settings is None:
        raise UserError(f"is an adapter of kind {kind}", where=place, fix="give a LoRA adapter")
    return settings


def read_weights(path: str) -> dict[str, Tensor]:
    """The tensors of an adapter directory by peft's names. Raises UserError if the file is damaged."""
    try:
        return load_file(Path(path).expanduser() / WEIGHTS)
    except SafetensorError as error:
        raise UserError(f"damaged weights: {error}", where=path, fix="copy or save the adapter again") from error


def names_module(target: str, name: str) -> bool:
    """Whether a target of an adapter, which may be the end of a name, is a module's."""
    return name == target or name.endswith(f".{target}")


def targeted(model: PreTrainedModel, targets: Any) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a model without adapters that get one, as peft chooses them."""
    for name, module in model.named_modules():
        if targets == ALL_LINEAR:
            chosen = isinstance(module, (nn.Linear, Conv1D)) and module is not model.get_output_embeddings()
        elif isinstance(targets, str):
            chosen = re.fullmatch(targets, name) is not None
        else:
            chosen = any(names_module(target, name) for target in targets or ())
        if chosen:
            yield name, module


def put_on(model: PreTrainedModel, path: str) -> PeftModel:
    """A model with the adapter of a directory on it, to be used or merged.

    An adapter on one of two tied embeddings makes them two: a merge would else change both.

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
    """Give the output layer a weight of its own, equal to the input embedding's."""
    model.config.tie_word_embeddings = False
    head: Any = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    model.all_tied_weights_keys = {}  # or saving would leave the output layer out


def check_base(path: str, model: PreTrainedModel, settings: LoraConfig) -> None:
    """Whether an adapter was made for this model, by the name of its base and by the shapes of its tensors.

    Raises:
        UserError: it was not.
    """
    base, name = settings.base_model_name_or_path or "a base without a name", str(model.config.name_or_path)
    fix = "set model.partial_pretrain to the adapter's base, or give an adapter of this model"
    if settings.base_model_name_or_path and not _same_model(base, name):
        raise UserError(f"was made for {base}, and the model is {name}", where=path, fix=fix)
    modules = dict(model.named_modules())
    with safe_open(Path(path).expanduser() / WEIGHTS, "pt") as file:
        for tensor in file.keys():  # noqa: SIM118, it is no dictionary
            module, _, part = tensor.removeprefix(_PREFIX).partition(".lora_")
            if not part:
                continue
            if module not in modules:
                raise UserError(f"has a part for {module}, made for {base}; the model {name} has no such module", where=path, fix=fix)
            there, here = file.get_slice(tensor).get_shape(), modules[module]
            if isinstance(here, nn.Linear) and (
                (part.startswith("A.") and there[1] != here.in_features) or (part.startswith("B.") and there[0] != here.out_features)
            ):
                size = f"{here.in_features} to {here.out_features}"
                what = f"has lora_{part} of shape {there} for {module}, made for {base}; in the model {name} that goes from {size} numbers"
                raise UserError(what, where=path, fix=fix)


def _same_model(base: str, name: str) -> bool:
    """Two directories are the same one; a directory and a Hub name, or one that is gone, may have the same last part."""
    here, there = Path(base).expanduser(), Path(name).expanduser()
    if here.is_dir() and there.is_dir():
        return here.resolve() == there.resolve()
    return here.name.lower() == there.name.lower()
