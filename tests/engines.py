"""Engines of small models, and what tests compare of them."""

from pathlib import Path
from typing import Any

import torch
from tiny import RandomDocuments
from torch import Tensor

from verl.algorithms import sft
from verl.config.shared import OptimConfig
from verl.data.batch import Batch
from verl.data.pack import collate
from verl.engine.engine import Engine
from verl.engine.layers import recompute_activations
from verl.engine.scorers import TokenScorer
from verl.models.load import load_for_training


def engine_of(path: Path, *, config: OptimConfig | None = None, checkpointing: bool | str = False) -> Engine:
    model = load_for_training(str(path)).model
    if checkpointing:
        recompute_activations(model, selective=checkpointing == "selective")
    return Engine(
        TokenScorer(model),
        config or OptimConfig(clip_grad=1e9),
        total_steps=10,
        device=torch.device("cpu"),
        compute_dtype=torch.float32,
    )


def gradient(engine: Engine, batches: list[Batch], algorithm: Any = sft) -> Tensor:
    engine.backward(batches, algorithm)
    return torch.cat([p.grad.flatten() for p in engine.trained])


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def largest_difference(scorer: torch.nn.Module, alone: torch.nn.Module) -> float:
    documents = [RandomDocuments().document(i) for i in range(4)]
    with torch.no_grad():
        packed = scorer(collate(documents, range(4))).logprob_M
        expected = []
        for ids, mask in documents:
            ids_T = torch.from_numpy(ids).long()
            logprob_TV = alone(ids_T[None], use_cache=False).logits[0].log_softmax(-1)
            expected.append(logprob_TV[:-1].gather(1, ids_T[1:, None]).squeeze(1)[torch.from_numpy(mask[1:])])
    return (packed - torch.cat(expected)).abs().max().item()
