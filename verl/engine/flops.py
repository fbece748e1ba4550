"""Arithmetic of a training step, and what the chip can do, for the model-FLOPs utilisation."""

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

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
    """FLOP of forward and backward as a function of (tokens, trained tokens): 6 for each weight that a token meets.

    The output layer meets the trained tokens only. Attention's own products and recomputed activations are not counted,
    nor is it taken off that adapters leave a part undone.
    """
    every = sum(p.numel() for p in model.parameters())
    output = model.get_output_embeddings()  # None where scores take its place
    parts = [model.get_input_embeddings(), *([output] if output is not None else [])]
    embeddings = {id(p): p.numel() for part in parts for p in part.parameters()}
    inner, head = every - sum(embeddings.values()), 0 if output is None else max(embeddings.values())

    def flops(tokens: int, trained_tokens: int) -> float:
        return 6.0 * (inner * tokens + head * trained_tokens)

    return flops


def peak_flops(device: torch.device) -> float | None:
    """The device's matrix rate in FLOP/s; None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)
