"""Mixtures of experts: which share of their weights each token uses."""

from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from verl.models.per_layer import layer_value

CHOSEN = ("top_k", "num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk", "moe_k", "top_k_experts")
NUMBERS = ("num_experts", "moe_num_experts", "num_local_experts", "n_routed_experts")
NOT_CHOSEN = {"router", "gate", "shared_expert", "shared_experts"}  # every token uses these


def active_shares(model: PreTrainedModel) -> dict[int, float]:
    """Return, for each parameter of which a token uses only a share, that share by the parameter's `id`. Empty without experts.

    Experts are recognised by the name or class of their module, and shared ones, which all tokens use, by their name.
    """
    modules = dict(model.named_modules())
    found: dict[int, float] = {}
    for path, module in modules.items():
        parent = modules.get(path.rpartition(".")[0])
        if not _are_experts(path, module) or parent is None:
            continue
        number, chosen = _number(module), _chosen(parent, model.config.get_text_config())
        for name, parameter in module.named_parameters():
            if NOT_CHOSEN.isdisjoint(name.split(".")) and number and chosen and parameter.ndim > 1:
                found[id(parameter)] = min(1.0, chosen / number)
    return found


def active_parameters(model: PreTrainedModel) -> int:
    """Return the number of weights that a token uses: all but those of the experts that it is not sent to."""
    from verl.models.load import numel

    shares = active_shares(model)
    return round(sum(numel(p) * shares.get(id(p), 1.0) for p in model.parameters()))


def describe_parameters(number: int, model: PreTrainedModel) -> str:
    """Return the number of a model's parameters as text, such as "494,032,768 parameters"; with experts, also of those that are active."""
    text = f"{number:,} parameters"
    return f"{text} ({_short(number)}, {_short(active_parameters(model))} active)" if active_shares(model) else text


def describe_experts(model: PreTrainedModel) -> str:
    """Return ", " and how a model's experts are computed: in one grouped product of matrices, or one after another; "" without experts."""
    experts = [module for path, module in model.named_modules() if _are_experts(path, module)]
    if not experts:
        return ""
    # transformers marks the classes whose forward pass it may replace.
    grouped = model.config.get_text_config()._experts_implementation == "grouped_mm" and any(hasattr(e, "is_transposed") for e in experts)
    return ", experts in one grouped product" if grouped else f", experts by the code of {type(model).__name__}, which has no grouped form"


def _short(number: float) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.1f}{letter}"
    return f"{number:.0f}"


def _are_experts(path: str, module: nn.Module) -> bool:
    name = path.rpartition(".")[2]
    return (name == "experts" or "Experts" in type(module).__name__) and "shared" not in name


def _number(module: nn.Module) -> int | None:
    """Return the number of experts in a module."""
    if isinstance(module, nn.ModuleList):
        return len(module)
    stacked = (len(p) for p in module.parameters() if p.ndim == 3)
    return next(stacked, None) or _first((part for part in module.modules()), NUMBERS)


def _chosen(parent: nn.Module, config: Any) -> int | None:
    """Return the number of experts that a token is sent to, from the router beside them, or else from the config."""
    return _first((parent, *parent.children()), CHOSEN) or next(filter(None, (layer_value(config, name) for name in CHOSEN)), None)


def _first(places: Iterable[Any], names: tuple[str, ...]) -> int | None:
    values = (getattr(place, name, None) for place in places for name in names)
    return next((value for value in values if isinstance(value, int) and not isinstance(value, bool) and value > 0), None)
