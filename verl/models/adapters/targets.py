"""Which weights of a model get adapters: linear layers and experts, without routers and without what cannot have one.

Experts are parameters with three dimensions, [experts, outputs, inputs] or [experts, inputs, outputs], and not modules. peft adapts them
by the name of the parameter (`target_parameters`).
"""

import functools
import inspect
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.pytorch_utils import Conv1D

from verl.errors import UserError
from verl.models.adapters.routers import has_experts, kind_of, router_weights

try:
    conversion: Any = import_module("peft.utils.transformers_weight_conversion")
except ImportError:  # an older release, which takes names as they are
    conversion = None

ALL_LINEAR = "all-linear"
FUSED = "gate_up_proj"  # two layers in one parameter: peft gives it twice the rank, the same as an adapter on each
ROUTER = "routers"
OWN_PRODUCT = "that are no plain product"
READ_DIRECTLY = "whose weight is used without the layer"
DORA = "experts, which have neither DoRA nor dropout"
SHARED = "that share their weight"  # an adapter on one of them could not be merged
RENAMED = "whose adapters peft would look for under other names"  # transformers' patterns for older files match them
GATE = "with one output"  # a low rank saves nothing there: shared_expert_gate
OTHER = "experts that are not stacked matrices"


@dataclass(frozen=True)
class Targets:
    """Modules and parameters that get adapters, as peft names them.

    Attributes:
        modules: names, or the last parts of names; "all-linear" if peft finds the same.
        parameters: names of parameters of experts, likewise.
        left_out: names of weights that all-linear leaves out, by the reason.
    """

    modules: Any
    parameters: list[str] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def describe_left_out(self) -> str:
        """Return one line about what is left out, with kinds of names and counts; "" if nothing is."""
        parts = []
        for reason, names in self.left_out.items():
            kinds = sorted({kind_of(name) for name in names})
            shown = ", ".join(kinds[:4]) + (f" and {len(kinds) - 4} more" if len(kinds) > 4 else "")
            parts.append(f"{len(names)} {reason} ({shown})")
        return f"{ALL_LINEAR} leaves out: {'; '.join(parts)}" if parts else ""


def all_linear(model: PreTrainedModel, settings: LoraConfig) -> Targets:
    """Choose the linear layers, without the output layer, and the experts.

    Left out are routers, gates with one output, and layers that are no plain product with their weight.

    Args:
        model: model without adapters, also on the meta device.
        settings: dropout and use_dora are read.
    Raises:
        UserError: nothing is left.
    """
    head = model.get_output_embeddings()
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D) and module is not head}
    routers = router_weights(model)
    shared = shared_weights(model)
    reasons = {name: reason for name in linear if (reason := _why_not(model, name, routers, shared))}
    reasons |= dict.fromkeys(not_found_again(model, [name for name in linear if name not in reasons]), RENAMED)
    chosen = [name for name in linear if name not in reasons]
    experts = dict(expert_weights(model))
    if settings.use_dora or settings.lora_dropout:
        reasons |= dict.fromkeys(experts, DORA)
    reasons |= dict.fromkeys(routers, ROUTER)
    reasons |= {name: OTHER for name in _other_experts(model, {*linear, *experts}) if name not in reasons}
    left_out: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        if reason != ROUTER or name in routers:  # a router that is a linear layer is told once, by its weight
            left_out.setdefault(reason, []).append(name)
    if not experts and not left_out:
        return Targets(ALL_LINEAR)
    names = [name for name, _ in model.named_modules()]
    parameters = [name for name in experts if name not in reasons]
    if not chosen and not parameters:
        what = Targets(ALL_LINEAR, left_out=left_out).describe_left_out() + "; nothing is left"
        raise UserError(
            what, where="model.target_modules", fix="name the layers that get adapters, or train all weights (model.lora_rank=0)"
        )
    return Targets(shortest(chosen, names), shortest(parameters, [name for name, _ in model.named_parameters()]), left_out)


def expert_weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield name and parameter of the stacked matrices of experts."""
    for name, module in model.named_modules():
        for part, parameter in module.named_parameters(recurse=False):
            is_of_experts = getattr(module, "num_experts", None) == len(parameter) or "experts" in type(module).__name__.lower()
            if is_of_experts and parameter.dim() == 3 and len(parameter) > 1:
                yield f"{name}.{part}", parameter


def is_plain_product(module: nn.Module) -> bool:
    """Return whether the output of a linear layer is its input times its weight, as an adapter beside it supposes."""
    kind: Any = type(module)
    return kind.forward in (nn.Linear.forward, Conv1D.forward) or kind.__module__.startswith("bitsandbytes.") or _multiplies(kind)


def shortest(chosen: Iterable[str], names: Iterable[str]) -> list[str]:
    """Return the fewest last parts of names that stand for these names, and for no other one of `names`."""
    wanted = set(chosen)
    suffixes: dict[str, set[str]] = {}
    for name in names:
        parts = name.split(".")
        for start in range(len(parts)):
            suffixes.setdefault(".".join(parts[start:]), set()).add(name)
    found: set[str] = set()
    for name in wanted:
        parts = name.split(".")
        ends = (".".join(parts[start:]) for start in reversed(range(len(parts))))
        found.add(next((end for end in ends if suffixes[end] <= wanted), name))
    return sorted(found)


def fused_ranks(settings: LoraConfig, parameters: Sequence[str]) -> None:
    """Give the parameters that hold two layers twice the rank and alpha, as peft does."""
    if any(name.rpartition(".")[2] == FUSED for name in parameters):
        settings.rank_pattern = {**(settings.rank_pattern or {}), rf".*\.{FUSED}": 2 * settings.r}
        settings.alpha_pattern = {**(settings.alpha_pattern or {}), rf".*\.{FUSED}": 2 * settings.lora_alpha}


@contextmanager
def without_false_warnings() -> Iterator[None]:
    """Ignore in this context what peft says of ranks of experts, whose names it looks for among modules only, and which it applies.

    Nor does it say what it does not find in a file, which is checked with the names that it would change (`files.read_values`), or that
    it takes the transposed weights of GPT-2 for such.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to", category=UserWarning)
        warnings.filterwarnings("ignore", message="Found missing adapter keys", category=UserWarning)
        warnings.filterwarnings("ignore", message=r"The following (rank|alpha)_pattern keys", category=RuntimeWarning)
        yield


@contextmanager
def names_as_they_are() -> Iterator[None]:
    """Keep peft from reading `gate_proj` and the like as names of an older release in this context.

    In mixtures of experts it takes them for experts, and leaves the linear layers of that name, as in shared experts, without adapters.
    """
    if conversion is None:
        yield
        return
    before = conversion.convert_peft_config_for_transformers
    conversion.convert_peft_config_for_transformers = lambda *args, **kwargs: None
    try:
        yield
    finally:
        conversion.convert_peft_config_for_transformers = before


def read_by_peft(model: PreTrainedModel, settings: LoraConfig) -> None:
    """Change the settings of an adapter in memory so that peft finds the same modules in the file, in place.

    A linear layer whose name peft would take for that of experts is named by its weight.
    """
    if isinstance(settings.target_modules, str) or not settings.target_modules:
        return
    taken = {name for name in settings.target_modules if is_renamed(model, name)}
    if taken:
        settings.target_modules = sorted(set(settings.target_modules) - taken)
        settings.target_parameters = sorted({*(settings.target_parameters or []), *(f"{name}.weight" for name in taken)})
    if settings.target_parameters:
        settings.lora_dropout = 0.0  # peft has no dropout for parameters, and does not read such settings


def as_read(model: PreTrainedModel, settings: LoraConfig) -> None:
    """Change the settings of an adapter from a file to names of this model, in place: what peft does, and `read_by_peft` backwards."""
    if conversion is not None:
        conversion.convert_peft_config_for_transformers(settings, model=model, conversions=None)
    given = set(settings.target_parameters or [])
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    weights = {name for name in given if any(f".{layer}.weight".endswith(f".{name}") for layer in linear)}
    if weights and not isinstance(settings.target_modules, str):
        settings.target_modules = sorted({*(settings.target_modules or []), *(name.removesuffix(".weight") for name in weights)})
        settings.target_parameters = sorted(given - weights) or None


def names_today(model: PeftModel | PreTrainedModel, weights: dict[str, Tensor]) -> list[str]:
    """Return the names that the tensors of an adapter, which may be of an older release, have in this model."""
    if conversion is None:
        return list(weights)
    settings = model.peft_config["default"] if isinstance(model, PeftModel) else LoraConfig()
    return list(conversion.convert_peft_adapter_state_dict_for_transformers(model, settings, weights))


def names_for_peft(model: PeftModel | PreTrainedModel, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of an adapter under names from which peft finds them again.

    peft and transformers rename what they read as they rename a model's files, and some of their patterns change a name of today:
    `mlp.shared_expert.` also stands for `mlp.shared_experts`. Such a tensor gets the name that it has in the model's files.
    """
    lost = set(weights) - set(names_today(model, weights))
    if not lost:
        return weights
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    used = getattr(base, "_weight_conversions", None) or get_model_conversion_mapping(base, add_legacy=False)  # type: ignore[arg-type]
    back = [one.reverse_transform() for one in reversed(used) if isinstance(one, WeightRenaming)]
    prefix = "base_model.model."
    older = {name: prefix + _renamed(name.removeprefix(prefix), back) for name in lost}
    found = set(names_today(model, {older[name]: weights[name] for name in lost}))
    return {older[name] if name in lost and name in found else name: tensor for name, tensor in weights.items()}


def not_found_again(model: PreTrainedModel, layers: Sequence[str]) -> list[str]:
    """Return the layers whose adapters peft would not find in a file, because transformers' patterns for older files match their names."""
    weights = {f"base_model.model.{name}.lora_A.weight": torch.zeros(1, 1) for name in layers}
    found = set(names_today(model, names_for_peft(model, weights)))
    return [name for name, tensor in zip(layers, weights, strict=True) if tensor not in found]


def _renamed(name: str, renamings: Iterable[Any]) -> str:
    for renaming in renamings:
        name, _ = renaming.rename_source_key(name)
    return name


def is_renamed(model: PreTrainedModel, name: str) -> bool:
    """Return whether peft takes the name of a module for that of experts in an older release."""
    tried = LoraConfig(target_modules=[name])
    if conversion is None:
        return False
    try:
        conversion.convert_peft_config_for_transformers(tried, model=model, conversions=None)
    except ValueError:  # one of two names that it wants together
        return True
    return name not in (tried.target_modules or ())


def shared_weights(model: nn.Module) -> set[int]:
    """Return the ids of the weights of linear layers that are at several places of the model."""
    layers = [module for _, module in model.named_modules(remove_duplicate=False) if isinstance(module, nn.Linear | Conv1D)]
    counts = Counter(id(layer.weight) for layer in layers)
    return {one for one, count in counts.items() if count > 1}


def _why_not(model: PreTrainedModel, name: str, routers: Sequence[str], shared: set[int]) -> str | None:
    module: Any = model.get_submodule(name)
    if f"{name}.weight" in routers:
        return ROUTER
    if not is_plain_product(module):
        return OWN_PRODUCT
    if id(module.weight) in shared:
        return SHARED
    parent: Any = type(model.get_submodule(name.rpartition(".")[0]))
    if _is_read_directly(parent, name.rpartition(".")[2]):
        return READ_DIRECTLY
    return GATE if min(module.weight.shape) == 1 else None


@functools.cache
def _multiplies(kind: type[nn.Module]) -> bool:
    """Return whether a class of linear layers with a forward pass of its own computes what `nn.Linear` does, as a small one of it shows."""
    with torch.device("cpu"), torch.random.fork_rng([]):
        try:
            layer: Any = kind(5, 3)
            inputs_TI = torch.randn(4, 5)
            return torch.allclose(layer(inputs_TI), F.linear(inputs_TI, layer.weight, layer.bias))
        except Exception:  # routers, say, are made from a config
            return False


@functools.cache  # reading the code of a class is slow, and a model has hundreds of its layers
def _is_read_directly(parent: type[nn.Module], child: str) -> bool:
    """Return whether a class's code uses the weight of a layer without calling the layer, as fused kernels of state-space models do."""
    try:
        code = inspect.getsource(parent)
    except (OSError, TypeError):
        return False
    return re.search(rf"self\.{re.escape(child)}\.weight\b(?!\[|\.(dtype|device|shape|size|is_))", code) is not None


def _other_experts(model: nn.Module, known: set[str]) -> Iterator[str]:
    """Yield the names of matrices of experts that are neither linear layers nor stacked."""
    if not has_experts(model):
        return
    for name, module in model.named_modules():
        if "expert" in name.lower() or "expert" in type(module).__name__.lower():
            for part, parameter in module.named_parameters(recurse=False):
                whole = f"{name}.{part}" if name else part
                if parameter.dim() > 1 and name not in known and whole not in known and not part.endswith("bias"):
                    yield whole
