"""What the proofs read from an engine: log-probabilities, losses and gradients, by the names that the model's parameters have.

Dimensions: M trained positions.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from verl.data.batch import Batch
from verl.data.pack import Document, collate
from verl.engine.build import Built
from verl.prove.outcome import ROUNDING, TOLERANCE


def scores(built: Built, documents: Sequence[Document]) -> Tensor:
    """Return the log-probability of each trained token of packed documents, in their order."""
    (out,) = built.engine.score([collate(documents, range(len(documents)))])
    logprob_M: Tensor = out.logprob_M
    return logprob_M


def gradients(built: Built, batches: Sequence[Batch], algorithm: Any) -> tuple[float, dict[str, Tensor]]:
    """Return the loss of micro-batches and its gradient, by the parameters' names."""
    engine = built.engine
    for parameter in engine.trained:
        parameter.grad = None
    metrics = engine.backward(batches, algorithm)
    names = {id(parameter): name for name, parameter in built.loaded.model.named_parameters()}
    found = {names[id(p)]: p.grad.detach().clone() for p in engine.trained if p.grad is not None}
    return float(metrics["loss"]), found


def largest(found: Tensor, expected: Tensor) -> float:
    """Return the largest absolute difference."""
    return float((found - expected).abs().max())


def in_any_dtype(compare: Callable[[torch.dtype], dict[str, float]]) -> tuple[dict[str, float], str]:
    """Compare in float32, and again in float64 if the differences are small, but larger than the tolerance: rounding is then gone.

    Returns:
        the differences that count, and what to say of float32's. They are float32's where some are left in float64, because some models
        compute a part in float32.
    """
    found = compare(torch.float32)
    worst = max(found.values())
    if worst <= TOLERANCE or not worst < ROUNDING:
        return found, ""
    precise = compare(torch.float64)
    if max(precise.values()) > TOLERANCE:
        return found, f"in float64 {max(precise.values()):.1e}"
    return precise, f"in float64; in float32 {worst:.1e}, which is rounding"


def is_slower(built: Built) -> bool:
    """Return whether a model runs its own code, one document at a time, because it cannot be packed."""
    path = getattr(built.decisions, "path", None)
    return path is not None and not path.packed
