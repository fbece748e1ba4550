"""The engine of a run in words, for the first lines of its log."""

import torch
from transformers import PreTrainedModel

from verl import dist
from verl.engine.decisions import Decisions
from verl.engine.engine import Engine
from verl.models.attention import flash
from verl.models.attention.packed import AttentionChoice, has_flash
from verl.models.experts import describe_experts, describe_parameters
from verl.models.load import numel


def describe(engine: Engine, decisions: Decisions, model: PreTrainedModel) -> list[str]:
    """Describe the device, attention kernel, model size and dtypes, a line each for device and model."""
    path, attention = decisions.path, decisions.path.describe()
    if path.packed and path.fused:
        attention = describe_attention(decisions.attention, engine.device.type, engine.compute_dtype)
    rule = "" if decisions.rule is None else f"; delta rule: {decisions.rule.describe()}"
    trained, everything = sum(p.numel() for p in engine.trained), sum(numel(p) for p in engine.scorer.parameters())
    return [
        f"device: {dist.describe_device(engine.device)}; attention: {attention}{rule}",
        f"model: {type(model).__name__}, {describe_parameters(everything, model)}, {trained:,} trained, "
        f"weights in {_name(engine.trained[0].dtype)} {engine.weights.place}, arithmetic in {_name(engine.compute_dtype)}, "
        f"layers {'compiled' if decisions.compiled else 'not compiled'} ({decisions.why_compiled}){describe_experts(model)}",
    ]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def describe_attention(choice: AttentionChoice, device_type: str, dtype: torch.dtype) -> str:
    """Describe the attention kernel of a run on this device, and why other kernels are not used."""
    if not has_flash(device_type, dtype):
        reason = "no GPU" if device_type != "cuda" else "it needs bfloat16 or float16"
        return f"PyTorch's scaled dot product, one document at a time (no FlashAttention: {reason})"
    if choice.kernel == "sdpa":
        return "PyTorch's scaled dot product, one document at a time (model.attn_implementation=sdpa)"
    refused = "; ".join(f"{flash.PACKAGES[kernel].name}: {reason}" for kernel, reason in choice.refused.items())
    if choice.too_large:
        sizes = " and ".join(map(str, choice.too_large))
        slow = f"PyTorch's scaled dot product, one document at a time, for heads of {sizes} numbers"
        refused = f"{slow}; {refused}" if refused else slow
    return flash.version(choice.kernel) + (f" ({refused})" if refused else "")
