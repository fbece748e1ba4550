"""FLOP of a training step and peak FLOP/s of the GPU, for the model FLOPs utilization (MFU)."""

import re
from collections.abc import Callable, Iterable

import torch
from torch import nn
from transformers import PreTrainedModel

from verl.models.quantize import numel

# Dense bfloat16 peak from the data sheets, FLOP/s.
PEAKS = {
    "H200": 989e12,
    "H100": 989e12,
    "H800": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "4090": 165e12,
}


def training_flops(model: PreTrainedModel) -> Callable[[int, int], float]:
    """Return a function of (tokens, trained tokens) that gives the FLOP of forward and backward pass.

    Each token costs 6 FLOP per trained weight, and 4 per frozen weight, which has no gradient of its own but passes one on. The output
    layer sees the trained tokens only. Attention scores and recomputed activations are not counted.
    """
    output = model.get_output_embeddings()  # None for a model with a scalar head
    head = 0.0 if output is None else _flops(output.parameters())
    parts = [model.get_input_embeddings(), *([output] if output is not None else [])]
    embeddings = {id(p) for part in parts for p in part.parameters()}
    inner = _flops(p for p in model.parameters() if id(p) not in embeddings)
    return lambda tokens, trained_tokens: inner * tokens + head * trained_tokens


def _flops(parameters: Iterable[nn.Parameter]) -> float:
    matrices = (p for p in parameters if p.ndim > 1)
    return sum((6.0 if p.requires_grad else 4.0) * numel(p) for p in matrices)


def peak_flops(device: torch.device) -> float | None:
    """Return the device's peak bfloat16 FLOP/s; None if unknown."""
    if device.type != "cuda":
        return None
    words = re.split(r"[\s-]", torch.cuda.get_device_name(device))  # whole words: an L40 is no L4
    return next((peak for part, peak in PEAKS.items() if part in words), None)
