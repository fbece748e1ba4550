"""Run on several ranks by test_examples: training with an optimizer of one's own, whole and resumed: own_optimizer.py MODEL FOLDER FILE."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from tiny import RandomDocuments

from verl import dist
from verl.algorithms import sft
from verl.config.shared import OptimConfig
from verl.data.loader import Loader, Packing
from verl.engine import checkpoint, restore
from verl.engine.checkpoint import Position
from verl.engine.engine import Engine
from verl.engine.scorers import TokenScorer
from verl.engine.weights import Spread
from verl.models.load import load_for_training
from verl.models.saved import export_model


def build(model: str, file: str, strategy: Literal["ddp", "fsdp2"]) -> tuple[Engine, Any]:
    loaded = load_for_training(model)
    options: dict[str, Any] = {"total_steps": 8, "device": torch.device("cpu"), "compute_dtype": torch.float32, "spread": Spread(strategy)}
    return Engine(TokenScorer(loaded.model), OptimConfig(file, lr=1e-4), **options), loaded


def losses(engine: Engine, start: int, stop: int) -> list[float]:
    loader = Loader(RandomDocuments(), Packing(2, 120), rows_per_step=8, seed=1, rank=dist.rank(), world_size=dist.world_size())
    return [float(engine.train_step(step.micro_batches, sft, step.number)["loss"]) for step in loader.steps(start, stop)]


def main(model: str, folder: str, file: str) -> None:
    dist.start()
    found = {}
    strategies: tuple[Literal["ddp", "fsdp2"], ...] = ("ddp", "fsdp2")
    for strategy in strategies:
        engine, loaded = build(model, file, strategy)
        begun, where = losses(engine, 0, 3), Position(3, 0, 0, rows=24, rows_per_step=8, seed=1, data_fingerprint="f")
        export = partial(export_model, model=loaded.model, saved_dtypes=loaded.saved_dtypes)
        saved = checkpoint.save(Path(folder) / strategy, engine, where, export)
        whole = losses(engine, 3, 6)
        resumed, _ = build(model, file, strategy)
        restore.load(saved, resumed)
        found[strategy] = {"begun": begun, "whole": whole, "resumed": losses(resumed, 3, 6)}
    if dist.is_main():
        (Path(folder) / "found.json").write_text(json.dumps(found))
    dist.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
