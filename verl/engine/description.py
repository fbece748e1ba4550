"""The engine of a run in words, for the first lines of its log."""

import torch
from transformers import PreTrainedModel

from verl import dist
from verl.engine.decisions import Decisions
from verl.engine.engine import Engine
from verl.models.attention.packed import describe_attention
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
