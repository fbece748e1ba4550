"""LoRA adapters through peft: small trainable matrices next to frozen weights."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from verl.config.shared import ModelConfig
from verl.errors import UserError
from verl.models.adapters import files, targets, trained_tokens
from verl.models.adapters.targets import ALL_LINEAR
from verl.models.load import is_quantized
from verl.models.quantize import four_bit, set_compute_dtype

ADAPTED = (nn.Linear, Conv1D, nn.Embedding)  # modules that peft has adapters for; 4-bit layers are subclasses of nn.Linear


def add_adapters(
    model: PreTrainedModel,
    config: ModelConfig,
    *,
    compute_dtype: torch.dtype,
    seed: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
    stop_ids: Sequence[int] = (),
    dropout: bool = True,
) -> PeftModel:
    """Freeze the model and add float32 adapters to its linear layers, in place. `left_out` of the result says in one line which have none.

    Args:
        model: model of any dtype, also on the meta device; its frozen weights are cast to the compute dtype, since they are never updated.
        seed: seed of the adapters' initial values, equal on all ranks.
        tokenizer: tokenizer for the tokens of `model.trainable_tokens`.
        stop_ids: the tokens that "stop" means there.
        dropout: whether to apply `lora_dropout`.
    Raises:
        UserError: the settings, or the adapter to continue from, do not fit the model.
    """
    notes: list[str] = []
    settings = lora_config(model, config, tokenizer, stop_ids, notes)
    settings.lora_dropout = settings.lora_dropout if dropout else 0.0
    torch.manual_seed(seed)
    with _on_cpu(model):
        adapted = inject(model, settings)
    for parameter in adapted.parameters():
        if not is_quantized(parameter):
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else compute_dtype)
    # After the cast to float32, because peft creates adapters in the base model's dtype, and bfloat16 would round the values.
    if config.lora_adapter_path is not None:
        with files.fits_or_is_refused(config.lora_adapter_path):
            set_peft_model_state_dict(adapted, files.read_weights(config.lora_adapter_path))
        files.check_attached(adapted, config.lora_adapter_path)
        files.read_values(adapted, config.lora_adapter_path)
    set_compute_dtype(model, compute_dtype)
    adapted.left_out = "\n".join(notes)  # type: ignore[assignment]
    return adapted


def inject(model: PreTrainedModel, settings: LoraConfig) -> PeftModel:
    """Add adapters in place. Names of modules mean what they say (`targets.names_as_they_are`)."""
    with targets.names_as_they_are(), targets.without_false_warnings():
        adapted = get_peft_model(model, settings, autocast_adapter_dtype=False)
    assert isinstance(adapted, PeftModel)
    return adapted


@contextmanager
def _on_cpu(model: PreTrainedModel) -> Iterator[None]:
    """Replace weights on the meta device by expanded CPU scalars in this context, so that peft creates real adapters for them."""
    places = [(module, name, p) for module in model.modules() for name, p in module._parameters.items() if p is not None and p.is_meta]
    numbers = {p: nn.Parameter(torch.zeros((), dtype=p.dtype).expand(p.shape)) for _, _, p in places}
    for module, name, p in places:
        module._parameters[name] = numbers[p]
    try:
        yield
    finally:
        for module, name, p in places:
            p.requires_grad = numbers[p].requires_grad
            module._parameters[name] = p


def check_adapters(model: PreTrainedModel, config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that the adapters of the config fit the model, before anything is loaded.

    Args:
        model: result of `verl.models.load.outline`.
    Raises:
        UserError: they do not fit.
    """
    four_bit(config, torch.float32)
    lora_config(model, config, tokenizer, ())


def lora_config(
    model: PreTrainedModel,
    config: ModelConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    stop_ids: Sequence[int],
    notes: list[str] | None = None,
) -> LoraConfig:
    """Build peft's config for a model, which may be on the meta device.

    Args:
        notes: list that gets a line about what has no adapter, if anything has none.
    Raises:
        UserError: the settings do not fit the model.
    """
    if config.lora_adapter_path is not None:
        settings = _of_adapter(model, config.lora_adapter_path, config)
        files.check_base(config.lora_adapter_path, model, settings)
        if settings.modules_to_save or settings.bias != "none":
            what = "the adapter also trains whole modules or biases (modules_to_save, bias), which is not supported"
            raise UserError(what, where=f"model.lora_adapter_path={config.lora_adapter_path}", fix="give an adapter without them")
        settings.base_model_name_or_path = None  # peft fills in the model's name
    else:
        settings = LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # peft accepts any number and divides it by the rank
            lora_dropout=config.lora_dropout,
            use_rslora=config.use_rslora,
            use_dora=config.use_dora,
            task_type="CAUSAL_LM",
        )
        chosen = _targets(model, config.target_modules, settings)
        settings.target_modules, settings.target_parameters = chosen.modules, chosen.parameters or None
        targets.fused_ranks(settings, chosen.parameters)
        if notes is not None and chosen.left_out:
            notes.append(chosen.describe_left_out())
    settings.lora_dropout = config.lora_dropout or settings.lora_dropout
    _check_modules(model, settings)
    tokens = trained_tokens.token_ids(config.trainable_tokens, tokenizer, stop_ids) if tokenizer is not None else []
    if tokens:
        settings.trainable_token_indices = _token_indices(model, tokens, settings)
    return settings


def _of_adapter(model: PreTrainedModel, path: str, config: ModelConfig) -> LoraConfig:
    """Read the config of the adapter to continue from.

    Raises:
        UserError: a config key that is not at its default differs from the adapter.
    """
    found = files.read_config(path, key="model.lora_adapter_path")
    targets.as_read(model, found)
    defaults = ModelConfig()
    asked: dict[str, tuple[Any, Any]] = {
        "lora_rank": (config.lora_rank, found.r),
        "lora_alpha": (config.lora_alpha, found.lora_alpha),
        "use_rslora": (config.use_rslora, found.use_rslora),
        "use_dora": (config.use_dora, found.use_dora),
    }
    for key, (here, there) in asked.items():
        if here not in (getattr(defaults, key), there):
            _refuse_other(path, key, here, there)
    wanted = config.target_modules if isinstance(config.target_modules, str) else sorted(config.target_modules)
    stacked = found.target_parameters or []
    there = found.target_modules if isinstance(found.target_modules, str) else sorted({*(found.target_modules or []), *stacked})
    if wanted not in (defaults.target_modules, there):
        _refuse_other(path, "target_modules", wanted, there)
    found.inference_mode = False
    return found


def _refuse_other(path: str, key: str, here: object, there: object) -> None:
    fix = f"remove model.{key}, or remove model.lora_adapter_path to start a new adapter"
    raise UserError(f"the adapter {path} has {there}", where=f"model.{key}={here}", fix=fix)


def _targets(model: PreTrainedModel, asked: Any, settings: LoraConfig) -> targets.Targets:
    """Return `model.target_modules` in peft's form, after checking that it matches modules or experts.

    Raises:
        UserError: a name or regular expression matches neither.
    """
    where, names = "model.target_modules", [name for name, _ in model.named_modules() if name]
    head = model.get_output_embeddings() if files.has_tied_embeddings(model) else None  # a tied output layer cannot have an adapter
    linear = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D)) and module is not head]
    existing = sorted({name.rpartition(".")[2] for name in [*linear, *(name for name, _ in targets.expert_weights(model))]})
    fix = f"{ALL_LINEAR}, some of [{','.join(existing)}], or a regular expression of whole names such as {_example(linear)}"
    if asked == ALL_LINEAR:
        return targets.all_linear(model, settings)
    experts = [name for name, _ in targets.expert_weights(model)]
    every = [*names, *experts]
    if isinstance(asked, str) and not any(files.names_module(asked, name) for name in every):
        try:
            matches = [name for name in every if re.fullmatch(asked, name)]
        except re.error as error:
            raise UserError(f"{asked!r} is neither a module nor a regular expression ({error})", where=where, fix=fix) from error
        if not matches:
            raise UserError(f"no module matches {asked!r}", where=where, fix=fix)
        if not experts:
            return targets.Targets(asked)
        asked = matches
    given = [asked] if isinstance(asked, str) else asked
    if not isinstance(given, Sequence) or not given or not all(isinstance(target, str) for target in given):
        raise UserError(f"found {asked!r}", where=where, fix=fix)
    missing = [target for target in given if not any(files.names_module(target, name) for name in every)]
    if missing:
        raise UserError(f"no module matches {', '.join(map(repr, missing))}", where=where, fix=fix)
    stacked = [target for target in given if any(files.names_module(target, name) for name in experts)]
    return targets.Targets([target for target in given if any(files.names_module(target, name) for name in names)], stacked)


def _example(linear: list[str]) -> str:
    return rf".*\.{linear[0].rpartition('.')[2]}" if linear else ".*_proj"


def _check_modules(model: PreTrainedModel, settings: LoraConfig) -> None:
    """Raise UserError if a targeted module cannot have the adapter."""
    where = "model.target_modules"
    if settings.target_parameters and (settings.use_dora or settings.lora_dropout):
        key, what = ("use_dora", "DoRA") if settings.use_dora else ("lora_dropout", "dropout")
        names = ", ".join(sorted(settings.target_parameters)[:4])
        fix = f"remove it, or set {where}={ALL_LINEAR}"
        raise UserError(f"experts ({names}) cannot have adapters with {what}", where=f"model.{key}", fix=fix)
    tied, ends = files.has_tied_embeddings(model), (model.get_input_embeddings(), model.get_output_embeddings())
    shared, targeted = targets.shared_weights(model), dict(files.targeted(model, settings.target_modules))
    if lost := targets.not_found_again(model, [name for name, module in targeted.items() if isinstance(module, nn.Linear)]):
        what = f"peft would look for the adapter of {lost[0]} under another name, so it could not be loaded again"
        raise UserError(what, where=where, fix=f"remove it, as {ALL_LINEAR} does")
    for name, module in targeted.items():
        if not isinstance(module, ADAPTED):
            fix = f"name the linear layers inside it, or {ALL_LINEAR}"
            raise UserError(f"{name} is a {type(module).__name__}, which cannot have an adapter", where=where, fix=fix)
        if isinstance(module, nn.Linear) and not targets.is_plain_product(module):
            what = f"{name} is a {type(module).__name__}, whose output is not its input times its weight, so an adapter cannot be merged"
            raise UserError(what, where=where, fix=f"remove it, as {ALL_LINEAR} does")
        if module not in ends and id(module.weight) in shared:
            what = f"{name} has its weight in common with other layers, so an adapter on one of them cannot be merged"
            raise UserError(what, where=where, fix=f"remove it, as {ALL_LINEAR} does")
        if module in ends and tied:
            raise UserError(
                f"{name} shares its weight with {'the output layer' if module is ends[0] else 'the input embedding'} (tied embeddings), "
                "so an adapter on one of them cannot be merged",
                where=where,
                fix=f"remove it, as {ALL_LINEAR} does; {trained_tokens.KEY} trains single embeddings",
            )
        if module is ends[1] and settings.use_dora:
            raise UserError("DoRA on the output layer is not supported", where=where, fix=f"remove {name}")


def _token_indices(model: PreTrainedModel, ids: list[int], settings: LoraConfig) -> list[int] | dict[str, list[int]]:
    """Return the trainable rows in peft's form: one list for tied embeddings, else one for each of input and output."""
    before = settings.trainable_token_indices
    if before and sorted({i for rows in (before.values() if isinstance(before, dict) else [before]) for i in rows}) != ids:
        _refuse_other("to continue from", "trainable_tokens", ids, before)
    head = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        what = "single rows of an output layer with a bias cannot be trained"
        raise UserError(what, where=trained_tokens.KEY, fix="remove it")
    if files.has_tied_embeddings(model):
        return ids
    ends = {id(model.get_input_embeddings()), id(head)}
    return {name.rpartition(".")[2]: ids for name, module in model.named_modules() if id(module) in ends}
