"""Activation checkpointing: layers keep few activations, and recompute the others in the backward pass."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext, checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from verl.engine.fsdp import decoder_layers

MATRIX_PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}
if hasattr(torch.ops.mkldnn, "_linear_pointwise"):  # the chunks of verl/models/linear.py
    MATRIX_PRODUCTS.add(torch.ops.mkldnn._linear_pointwise.default)
# Parts of operator names, because the operators that exist depend on the release of PyTorch and on installed packages.
KEPT = ("varlen_attn", "flash_attention", "verl.flash", "verl.short", "verl.adapted_linears", "efficient_attention", "cudnn_attention")


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
