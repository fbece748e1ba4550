"""The decoder layers of a model: which modules they are, how they are compiled, and how they recompute their activations.

Layers are compiled one by one, with dynamic shapes: the number of tokens differs between steps, and the same kernels serve all of them
without padding. Layers of one class share compiled code, so compile time does not grow with depth.
"""

import os
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch._dynamo.utils import calculate_time_spent, counters
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext, checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

MATRIX_PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}
if hasattr(torch.ops.mkldnn, "_linear_pointwise"):  # the chunks of verl/models/linear.py
    MATRIX_PRODUCTS.add(torch.ops.mkldnn._linear_pointwise.default)
# Parts of operator names, because the operators that exist depend on the release of PyTorch and on installed packages.
KEPT = ("varlen_attn", "flash_attention", "verl.flash", "verl.short", "verl.adapted_linears", "efficient_attention", "cudnn_attention")


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Return the modules in the architecture's `_no_split_modules`: its repeated blocks."""
    names = set(getattr(model, "_no_split_modules", None) or [])
    return [module for module in model.modules() if type(module).__name__ in names]


# Compiling


class Compiler:
    """Compiles the layers of a model if `on`, and reports what that took."""

    def __init__(self, on: bool, model: PreTrainedModel):
        self.on = on
        self._graphs, self._said = counters["stats"]["unique_graphs"], False  # an earlier run of this process counts for itself
        if on:
            compile_layers(model)

    def note(self) -> str | None:
        """What a step that has just ended compiled, if that is worth a line: expected of a run's first step, a warning later."""
        before, self._graphs = self._graphs, counters["stats"]["unique_graphs"]
        first, self._said = not self._said, True
        if not self.on or (self._graphs == before and not first):
            return None
        if not first:
            return "warning: the layers were compiled again in this step; if that goes on, model.compile=false may be faster"
        if self._graphs == before:
            return "warning: torch.compile made nothing of these layers, which run as they are written (TORCH_LOGS=graph_breaks says why)"
        seconds = calculate_time_spent().get("total_wall_time", 0.0)
        kept = os.environ.get("TORCHINDUCTOR_CACHE_DIR")  # PyTorch sets it where a person has not
        return f"compiled the layers in {seconds:.1f} s{f', kept for the next run in {kept}' if kept else ''}"


def compile_layers(model: PreTrainedModel, backend: Any = "inductor") -> None:
    """Let each decoder layer be compiled when it is first called, in place and before it is sharded."""
    # A layer's numbers, such as a norm's epsilon, never change. Taken for variables, they are tensors in host
    # memory, and a checkpointed layer gets kernels for the CPU, which take longest of all to compile.
    torch._dynamo.config.specialize_float = True
    for layer in decoder_layers(model):
        layer.compile(dynamic=True, backend=backend)


def uncompiled() -> AbstractContextManager[object]:
    """While this lasts, layers run as they are written: what is run a few times does not earn back its compiling."""
    stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance


# Activation checkpointing


def recompute_activations(model: PreTrainedModel, *, selective: bool = False) -> None:
    """Let each decoder layer keep only its input, or also its expensive outputs, and recompute the rest in the backward pass.

    Args:
        selective: also keep the outputs of attention and of every second matmul. About half of the matmuls are recomputed, and no
            attention.
    """
    for layer in decoder_layers(model):
        layer.forward = _recomputed(layer.forward, {"context_fn": _selective} if selective else {})


def _recomputed(forward: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **options, **kwargs)

    return run


def _selective() -> Any:
    products: Counter[bool] = Counter()  # separate counts for the forward pass and its recomputation

    def policy(context: SelectiveCheckpointContext, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if operator in MATRIX_PRODUCTS:
            products[context.is_recompute] += 1
            return CheckpointPolicy.MUST_SAVE if products[context.is_recompute] % 2 else CheckpointPolicy.PREFER_RECOMPUTE
        if any(part in str(operator) for part in KEPT):
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
