"""Run by test_compact_adamw: train, save, train on; then resume from what was saved. On one process: only resume."""

import hashlib
import json
import sys
from pathlib import Path

import torch
from tiny import RandomDocuments
from torch.distributed.tensor import DTensor

from verl import dist
from verl.algorithms import sft
from verl.config.shared import OptimConfig
from verl.data.loader import Loader, Packing
from verl.engine import checkpoint, restore
from verl.engine.checkpoint import Position
from verl.engine.engine import Engine
from verl.engine.optim import optimizer_state
from verl.engine.scorers import TokenScorer
from verl.models.load import load_for_training


def engine_of(model: str, device: torch.device) -> Engine:
    loaded = load_for_training(model, dtype=torch.bfloat16).model
    config = OptimConfig(name="adamw_8bit", lr=1e-3)
    return Engine(TokenScorer(loaded), config, total_steps=6, device=device, compute_dtype=torch.float32)


def train(engine: Engine, start: int, stop: int) -> list[float]:
    loader = Loader(
        RandomDocuments(vocabulary=64), Packing(4, 240), rows_per_step=4, seed=1, rank=dist.rank(), world_size=dist.world_size()
    )
    return [float(engine.train_step(step.micro_batches, sft, step.number)["loss"]) for step in loader.steps(start, stop)]


def digest_of_moments(engine: Engine) -> tuple[str, int]:
    """One number for all moments, gathered, and how many tensors of codes there are."""
    digest, codes = hashlib.sha256(), 0
    for p in engine.trained:
        for key, tensor in optimizer_state(engine.optimizer, p).items():
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            digest.update(whole.numpy().tobytes())
            codes += key.endswith("_codes")
    return digest.hexdigest(), codes


def main(model: str, folder: str, name: str) -> None:
    device, root = dist.start(), Path(folder)
    result: dict[str, object] = {}
    if name == "two":
        torch.manual_seed(dist.rank())
        engine = engine_of(model, device)
        train(engine, 0, 3)
        checkpoint.save(root, engine, Position(3, 0, 0, 24, 4, 1, "f"), lambda directory: None)
        result["whole"] = train(engine, 3, 6)
    engine = engine_of(model, device)
    restore.load(root / "global_step_3", engine)
    result["moments"], result["codes"] = digest_of_moments(engine)
    result["resumed"] = train(engine, 3, 6)
    if dist.is_main():
        (root / f"{name}.json").write_text(json.dumps(result))
    dist.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
