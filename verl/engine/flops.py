"""Arithmetic of a training step, and what the chip can do, for the model-FLOPs utilisation."""

from collections.abc import Callable, Iterable

import torch
from torch import nn
from transformers import PreTrainedModel

from verl.models.quantize import numel

# Dense bfloat16 matrix rate by the vendor's data sheet, FLOP/s.
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
    """FLOP of forward and backward as a function of (tokens, trained tokens), for each weight that a token meets.

    That is 6 for a trained weight, and 4 for a frozen one, which takes no gradient and hands one on. The output layer meets
    the trained tokens only. Attention's own products and recomputed activations are not counted.
    """
    output = model.get_output_embeddings()  # None where scores take its place
    head = 0.0 if output is None else _flops(output.parameters())
    parts = [model.get_input_embeddings(), *([output] if output is not None else [])]
    embeddings = {id(p) for part in parts for p in part.parameters()}
    inner = _flops(p for p in model.parameters() if id(p) not in embeddings)
    return lambda tokens, trained_tokens: inner * tokens + head * trained_tokens


def _flops(parameters: Iterable[nn.Parameter]) -> float:
    matrices = (p for p in parameters if p.ndim > 1)
    return sum((6.0 if p.requires_grad else 4.0) * numel(p) for p in matrices)


def peak_flops(device: torch.device) -> float | None:
    """The device's matrix rate in FLOP/s; None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)
