"""The decoder layers of a model: find them, compile them, and checkpoint their activations.

Each layer is compiled separately, with dynamic shapes, so that batches with different numbers of tokens use the same kernels without
padding. Layers of the same class share compiled code, so compile time does not grow with depth.
"""

import os
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import calculate_time_spent, counters
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext, checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

MATMULS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}
if hasattr(torch.ops.mkldnn, "_linear_pointwise"):  # the chunks of verl/models/linear.py
    MATMULS.add(torch.ops.mkldnn._linear_pointwise.default)
# Operators whose outputs selective checkpointing saves. These are parts of operator names, because the operators that exist depend on the
# release of PyTorch and on installed packages.
SAVED = "varlen_attn flash_attention verl.flash verl.short verl.shared verl.adapted_linears efficient_attention cudnn_attention".split()


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Return the modules in the architecture's `_no_split_modules`: its repeated blocks, without those inside another one."""
    names, found, inside = set(getattr(model, "_no_split_modules", None) or []), list[nn.Module](), set[nn.Module]()
    for module in model.modules():
        if type(module).__name__ in names and module not in inside:
            found.append(module)
            inside.update(module.modules())
    return found


def require_input_gradient(model: PreTrainedModel) -> None:
    """Let the input of the first layer require a gradient in place, though the embeddings are frozen."""
    model.get_input_embeddings().register_forward_hook(_require_gradient)


def _require_gradient(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    # The copy may be changed in place, as CTRL does, which a tensor may not be of which a gradient is required.
    return output.requires_grad_().clone() if torch.is_grad_enabled() and not output.requires_grad else output


# Compiling


class Compiler:
    """Compile the decoder layers of a model if `on`, and report compile times and recompilations."""

    def __init__(self, on: bool, model: PreTrainedModel):
        self.on = on
        self._graphs = counters["stats"]["unique_graphs"]  # the counter also includes graphs of earlier runs in this process
        self._has_reported = False
        if on:
            compile_layers(model)

    def note(self) -> str | None:
        """Return a line for the log about compilation in the step that has just ended; None if there is nothing to report.

        In the first step this is the compile time. In a later step it is a warning that the layers were compiled again.
        """
        before, self._graphs = self._graphs, counters["stats"]["unique_graphs"]
        first, self._has_reported = not self._has_reported, True
        if not self.on or (self._graphs == before and not first):
            return None
        if not first:
            return "warning: the layers were recompiled in this step; if this happens often, model.compile=false may be faster"
        if self._graphs == before:
            return "warning: torch.compile compiled none of the layers, so they run eagerly (TORCH_LOGS=graph_breaks shows why)"
        seconds = calculate_time_spent().get("total_wall_time", 0.0)
        cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR")  # PyTorch sets it if the user has not
        return f"compiled the layers in {seconds:.1f} s{f', cached for the next run in {cache}' if cache else ''}"


def compile_layers(model: PreTrainedModel, backend: Any = "inductor") -> None:
    """Wrap each decoder layer with torch.compile in place. It is compiled at its first call. Call this before sharding."""
    # Treat floats of a layer, such as a norm's epsilon, as constants, because they never change. As variables they would be CPU tensors,
    # and a checkpointed layer would get CPU kernels, which take longest to compile.
    torch._dynamo.config.specialize_float = True
    torch.compiler.config.cache_key_tag = operator_schemas()
    for layer in decoder_layers(model):
        layer.compile(dynamic=True, backend=backend)


def operator_schemas() -> str:
    """Return the schemas of verl's custom operators.

    They are a part of the key of PyTorch's cache of compiled code, which does not contain them by itself: code that another release of verl
    compiled would call an operator with other arguments.
    """
    return "\n".join(sorted(str(schema) for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("verl::")))


def uncompiled() -> AbstractContextManager[object]:
    """Run compiled layers eagerly in this context, for code that runs too rarely to repay its compile time."""
    stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance


# Activation checkpointing


def recompute_activations(model: PreTrainedModel, *, selective: bool = False) -> None:
    """Apply activation checkpointing to each decoder layer in place: save its input, and recompute the activations in the backward pass.

    Args:
        selective: also save the outputs of attention and of every second matmul, so that only about half of the matmuls are recomputed,
            and no attention.
    """
    for layer in decoder_layers(model):
        layer.forward = _recomputed(layer.forward, {"context_fn": _selective} if selective else {})


def _recomputed(forward: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **options, **kwargs)

    return run


def _selective() -> Any:
    matmuls: Counter[bool] = Counter()  # separate counts for the forward pass and its recomputation

    def policy(context: SelectiveCheckpointContext, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if operator in MATMULS:
            matmuls[context.is_recompute] += 1
            return CheckpointPolicy.MUST_SAVE if matmuls[context.is_recompute] % 2 else CheckpointPolicy.PREFER_RECOMPUTE
        if any(part in str(operator) for part in SAVED):
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
