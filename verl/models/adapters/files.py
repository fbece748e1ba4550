"""Adapter directories: read them, check that they fit a model, and attach them to it."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.pytorch_utils import Conv1D

from verl.errors import UserError
from verl.models.adapter_settings import check_patterns, read_settings
from verl.models.adapters.targets import ALL_LINEAR, names_today, without_false_warnings
from verl.models.load import check_unchanged
from verl.pace import counted

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
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
            if name == WEIGHTS and (folder / "adapter_model.bin").is_file():
                fix = "load the adapter with peft and save it again: a .bin file, which can run code when it is read, is not read"
            raise UserError(f"{name} is missing", where=place, fix=fix)
    check_unchanged(path)
    try:
        kind = read_settings(folder / CONFIG).get("peft_type")
        settings: LoraConfig | None = LoraConfig.from_pretrained(str(folder)) if kind == "LORA" else None
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
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

    If the adapter targets or replaces tied embeddings, they are untied, because merging would otherwise change both.

    Raises:
        UserError: the adapter does not fit the model.
    """
    settings = read_config(path)
    fit_vocabulary(model, path)
    check_base(path, model, settings)
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    changed = [*targeted(model, settings.target_modules), *targeted(model, settings.modules_to_save)]
    on_one = any(module in ends for _, module in changed)
    if has_tied_embeddings(model) and on_one and not getattr(settings, "ensure_weight_tying", False):
        untie(model)
    with fits_or_is_refused(path), without_false_warnings():
        adapted = PeftModel.from_pretrained(model, str(Path(path).expanduser()))
    assert isinstance(adapted, PeftModel)
    check_attached(adapted, path)
    read_values(adapted, path)
    return adapted


def read_values(adapted: PeftModel, path: str) -> None:
    """Give each parameter of an adapter the tensor of its name in the adapter's file, which peft may have taken for another one's.

    Raises:
        UserError: the file has no tensor for a matrix of the adapter.
    """
    own, weights = get_peft_model_state_dict(adapted, save_embedding_layers=False), read_weights(path)
    for name, tensor in weights.items():
        if name in own and own[name].shape == tensor.shape:
            own[name].copy_(tensor)
    if missing := sorted(name for name in own.keys() - weights.keys() if ".lora_A." in name or ".lora_B." in name):
        missing = sorted(set(missing) - set(names_today(adapted, weights)))
    if missing:
        others = f", nor {counted(len(missing) - 1, 'other')}" if len(missing) > 1 else ""
        what = f"{WEIGHTS} has no {missing[0].removeprefix(_PREFIX)}{others}"
        raise UserError(what, where=path, fix="copy or save the adapter again")


@contextmanager
def fits_or_is_refused(path: str) -> Iterator[None]:
    """Raise a UserError in place of any exception of peft, which a wrong config, or a shape that `check_base` does not know, may raise."""
    try:
        yield
    except Exception as error:
        kind = "" if isinstance(error, RuntimeError | ValueError) else f"{type(error).__name__}: "
        what = f"the adapter does not fit the model: {kind}{' '.join(str(error).split())[:300]}"
        raise UserError(what, where=path, fix="give the adapter's own base model, or copy or save the adapter again") from error


def check_attached(adapted: PeftModel, path: str) -> None:
    """Raise UserError if the modules with adapters are not those for which the adapter's file has weights."""
    here = {name.removeprefix(_PREFIX) for name, module in adapted.named_modules() if _has_adapter(module)}
    with safe_open(Path(path).expanduser() / WEIGHTS, "pt") as file:
        tensors = set(file.keys())
    there = {tensor.removeprefix(_PREFIX).partition(".lora_")[0] for tensor in tensors if ".lora_" in tensor}
    if there != here and has_older_names(adapted.get_base_model()):
        tensors = {tensor for tensor in names_today(adapted, read_weights(path)) if ".lora_" in tensor}
        there = {tensor.removeprefix(_PREFIX).partition(".lora_")[0] for tensor in tensors}
    for found, what in ((there - here, "which its config does not name"), (here - there, "for which it has no weights")):
        if found:
            what = f"{CONFIG} and {WEIGHTS} do not belong together: {len(found)} modules such as {min(found)}, {what}"
            raise UserError(what, where=path, fix="copy or save the adapter again")


def has_older_names(model: Any) -> bool:
    """Return whether transformers and peft know other names of this model's modules, from before its experts were stacked."""
    return bool(get_model_conversion_mapping(model, add_legacy=False))


def _has_adapter(module: nn.Module) -> bool:
    return any(len(getattr(module, part, ())) > 0 for part in ("lora_A", "lora_embedding_A"))


def fit_vocabulary(model: PreTrainedModel, path: str) -> None:
    """Resize a model's embeddings to as many rows as the adapter's own, which were resized for new tokens; in place.

    The values of the new rows come with the adapter.

    Raises:
        UserError: the adapter's file does not have the resized embeddings, or has them in different sizes.
    """
    here, saved, adapted = _rows(model.get_input_embeddings()), *_resized(model, path)
    sizes = {rows for rows, _ in saved.values()} | adapted
    if sizes <= {here}:
        return
    is_tied, replaced = has_tied_embeddings(model), read_config(path).modules_to_save
    if len(sizes) > 1 or not (len(saved) == 2 or (saved and is_tied and not replaced)):
        what = f"the adapter was trained on embeddings resized to {max(sizes)} rows, and the model has {here}"
        fix = "save the adapter again with peft's save_embedding_layers=True, so that the embeddings of the new tokens are in its file"
        raise UserError(f"{what}; the resized embeddings are not all in the file", where=path, fix=fix)
    model.resize_token_embeddings(sizes.pop(), mean_resizing=False)
    if len(saved) == 1:  # the other one is tied to it, but may be untied before the adapter is loaded
        ((_, tensor),) = saved.values()
        weight: Any = model.get_input_embeddings().weight
        weight.data[here:] = read_weights(path)[tensor][here:].to(weight)


def _resized(model: PreTrainedModel, path: str) -> tuple[dict[str, tuple[int, str]], set[int]]:
    """Return the sizes of the embeddings and of the output layer in an adapter's file.

    Returns:
        the number of rows and the name of each whole weight, by module; and the numbers of rows of LoRA matrices.
    """
    ends = [name for name, module in model.named_modules() if module in (model.get_input_embeddings(), model.get_output_embeddings())]
    saved, adapted = {}, set()
    with safe_open(Path(path).expanduser() / WEIGHTS, "pt") as file:
        for tensor in file.keys():  # noqa: SIM118, not a dictionary
            name = tensor.removeprefix(_PREFIX)
            end = next((end for end in ends if name.startswith(f"{end}.")), None)
            shape = file.get_slice(tensor).get_shape() if end is not None else []
            if end is None or len(shape) != 2:
                continue
            if "lora_embedding_A" in name:
                adapted.add(shape[1])
            elif "lora_B" in name:
                adapted.add(shape[0])
            elif name.endswith(".weight") and ".lora_" not in name:
                saved[end] = shape[0], tensor
    return saved, adapted


def _rows(embedding: Any) -> int:
    return int(embedding.weight.shape[0])


def has_tied_embeddings(model: PreTrainedModel) -> bool:
    """Return whether the output layer has the weight of the input embedding. Some configs do not say, and then it does not."""
    return bool(getattr(model.config, "tie_word_embeddings", False))


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
    check_patterns(settings, [name for name, _ in model.named_modules()], path)
    fix = "set model.partial_pretrain to the adapter's base, or give an adapter of this model"
    if settings.base_model_name_or_path and not _same_model(base, name):
        raise UserError(f"the adapter was made for {base}, but the model is {name}", where=path, fix=fix)
    here_rows, (saved, adapted) = _rows(model.get_input_embeddings()), _resized(model, path)
    if resized := ({rows for rows, _ in saved.values()} | adapted) - {here_rows}:
        what = f"the adapter has embeddings resized to {max(resized)} rows for new tokens, and the model has {here_rows}"
        raise UserError(what, where=path, fix=f"merge it first with `verl export {path} NEW_DIR`, and give the result as the model")
    modules = dict(model.named_modules())
    reads_older_names = has_older_names(model)
    with safe_open(Path(path).expanduser() / WEIGHTS, "pt") as file:
        for tensor in file.keys():  # noqa: SIM118, not a dictionary
            module, _, part = tensor.removeprefix(_PREFIX).partition(".lora_")
            module = module.replace(".base_layer", "")  # of several matrices of the same experts
            if not part or (module not in modules and reads_older_names):
                continue
            if module not in modules:
                raise UserError(
                    f"the adapter, made for {base}, has weights for {module}; the model {name} has no such module", where=path, fix=fix
                )
            there, here = file.get_slice(tensor).get_shape(), modules[module]
            is_layer = isinstance(here, nn.Linear)
            if is_layer and (
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
