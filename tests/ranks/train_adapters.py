"""Run on several ranks by test_lora: adapters trained, saved, resumed and written by several processes; rank 0 keeps the losses."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tiny import RandomDocuments

from verl import dist
from verl.algorithms import sft
from verl.config.shared import ModelConfig, OptimConfig
from verl.data.loader import Loader, Packing
from verl.engine import checkpoint, restore
from verl.engine.checkpoint import Position
from verl.engine.engine import Engine
from verl.engine.scorers import TokenScorer
from verl.models.adapters.lora import add_adapters
from verl.models.adapters.operators import use_operators
from verl.models.load import load_for_training, load_tokenizer
from verl.models.saved import export_adapter

WHERE = Position(step=3, tokens=100, supervised_tokens=50, rows=24, rows_per_step=4, seed=1, data_fingerprint="f")
CPU = torch.device("cpu")


class Run:
    def __init__(self, model: str, dropout: float):
        loaded = load_for_training(model)
        config = ModelConfig(lora_rank=4, lora_alpha=8, lora_dropout=dropout, use_dora=True, trainable_tokens="stop")
        tokenizer = load_tokenizer(model)
        self.adapted = add_adapters(loaded.model, config, compute_dtype=torch.float32, seed=1, tokenizer=tokenizer, stop_ids=[7])
        use_operators(self.adapted)
        torch.manual_seed(5)
        optim = OptimConfig(lr=1e-2)
        self.engine = Engine(TokenScorer(loaded.model), optim, total_steps=8, device=CPU, compute_dtype=torch.float32)

    def train(self, start: int, stop: int) -> list[float]:
        ranks: dict[str, Any] = {"rank": dist.rank(), "world_size": dist.world_size()}
        loader = Loader(RandomDocuments(), Packing(4, 240), rows_per_step=4, seed=1, **ranks)
        return [float(self.engine.train_step(step.micro_batches, sft, step.number)["loss"]) for step in loader.steps(start, stop)]


def main(model: str, folder: str) -> None:
    dist.start()
    losses: dict[str, list[float]] = {}
    for dropout in (0.0, 0.1):
        run, root = Run(model, dropout), Path(folder) / f"dropout_{dropout}"
        losses[f"begun {dropout}"] = run.train(0, 3)
        saved = checkpoint.save(root, run.engine, WHERE, partial(export_adapter, adapted=run.adapted))
        losses[f"gone on {dropout}"] = run.train(3, 5)
        resumed = Run(model, dropout)
        restore.load(saved, resumed.engine)
        losses[f"resumed {dropout}"] = resumed.train(3, 5)
    if dist.is_main():
        (Path(folder) / "losses.json").write_text(json.dumps(losses))
    dist.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
