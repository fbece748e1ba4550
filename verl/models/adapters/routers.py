"""Find the routers of a mixture of experts: the weights whose product decides which experts a token goes to.

No name says which weights these are (`gate`, `router`, `router.layer`, `classifier`), so the model is run on the meta device, without
values, and each choice (`topk`, `argmax`, `sort`) is followed back to the product before it.
"""

import copy
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedModel

TOKENS = 8
CHOICES = ("topk", "sort", "argsort", "argmax")
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul", "convolution", "embedding", "_grouped_mm")


def router_weights(model: PreTrainedModel) -> list[str]:
    """Return the names of the parameters from which experts are chosen; of a model without experts none.

    Args:
        model: model without adapters, on any device; it is not run, but a copy without values.
    """
    blocks = tuple(f"{name}." for name in _blocks(model))
    if not blocks:
        return []
    followed, is_whole = _followed_back(model)
    chosen = {name for name in followed if name.startswith(blocks)}  # other choices are of positions, for attention
    if not is_whole:
        chosen |= _beside_experts(model)
    kinds = {kind_of(name) for name in chosen}
    return [name for name, _ in model.named_parameters() if kind_of(name) in kinds]


def has_experts(model: nn.Module) -> bool:
    """Return whether the model is a mixture of experts."""
    return any(True for _ in _blocks(model))


def _blocks(model: nn.Module) -> Iterator[str]:
    """Yield the names of the modules that have experts inside them."""
    for name, module in model.named_modules():
        count = getattr(module, "num_experts", None)
        if "expert" in f"{type(module).__name__} {name.rpartition('.')[2]}".lower() and "." in name:
            yield name.rpartition(".")[0]
        elif isinstance(count, int) and count > 1 and name:
            yield name


def kind_of(name: str) -> str:
    """Return a name with each number replaced by a star: the same for each layer."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)", "*", name)


def _followed_back(model: PreTrainedModel) -> tuple[set[str], bool]:
    """Return the parameters behind each choice, and whether the whole model could be run without values."""
    config = copy.deepcopy(model.config)
    try:
        with torch.device("meta"):
            twin: Any = type(model)._from_config(config, dtype=torch.float32, attn_implementation="eager")
            ids = torch.zeros(1, TOKENS, dtype=torch.long)
        if hasattr(twin, "set_experts_implementation"):
            twin.set_experts_implementation("eager")
    except Exception:  # a model's own code may raise anything; the structure decides then
        return set(), False
    trace = _Trace(twin)
    try:
        with torch.no_grad(), trace:
            twin.eval()(input_ids=ids, use_cache=False)
    except Exception:  # what depends on values cannot be run; what was chosen before is known
        return trace.chosen, False
    return trace.chosen, bool(trace.chosen)


class _Trace(TorchDispatchMode):
    """Keeps for each tensor the parameters that it consists of (`pure`), or whose product it comes from (`made`)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.pure: Any = WeakIdKeyDictionary()
        self.made: Any = WeakIdKeyDictionary()
        self.chosen: set[str] = set()
        for name, parameter in model.named_parameters():
            self.pure[parameter] = {name}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = list(_tensors([*args, *(kwargs or {}).values()]))
        kind = str(func).removeprefix("aten.").partition(".")[0]
        if kind == "nonzero":  # loops over the chosen experts then end at once
            result: Any = args[0].new_empty((0, args[0].dim()), dtype=torch.long)
        elif kind in ("_local_scalar_dense", "item"):
            return 0
        else:
            result = func(*args, **(kwargs or {}))
        if kind in CHOICES:
            self.chosen |= self.made.get(args[0], set())
        pure = set().union(*(self.pure.get(one, set()) for one in given))
        is_pure = bool(given) and all(one in self.pure for one in given)
        made = pure if kind in PRODUCTS else pure.union(*(self.made.get(one, set()) for one in given))
        for one in _tensors([result]):
            if is_pure:
                self.pure[one] = pure
            elif made:
                self.made[one] = made
        return result


def _tensors(values: Iterable[Any]) -> Iterable[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _beside_experts(model: PreTrainedModel) -> set[str]:
    """Return the matrices with one row for each expert, in the block that has the experts."""
    found: set[str] = set()
    for name, module in model.named_modules():
        count = getattr(module, "num_experts", None) or (len(module) if isinstance(module, nn.ModuleList) else 0)
        if "expert" not in f"{type(module).__name__}{name.rpartition('.')[2]}".lower() or not isinstance(count, int) or count < 2:
            continue
        block = model.get_submodule(name.rpartition(".")[0])
        inside = {id(p) for p in module.parameters()}
        for inner, parameter in block.named_parameters():
            if id(parameter) not in inside and parameter.dim() == 2 and len(parameter) == count:
                found.add(f"{name.rpartition('.')[0]}.{inner}")
    return found
