"""Run on several ranks by test_spread: one training, its weights spread in several ways; rank 0 saves what came of each."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
from tiny import RandomDocuments
from torch import Tensor
from torch.distributed.tensor import DTensor

from verl import dist
from verl.algorithms import sft
from verl.config.shared import OptimConfig
from verl.data.loader import Loader, Packing, micro_batches
from verl.engine import checkpoint, restore, weights
from verl.engine.checkpoint import Position
from verl.engine.engine import Engine
from verl.engine.scorers import TokenScorer
from verl.engine.weights import ReplicatedWeights, Sharding, Spread
from verl.models.load import load_for_training
from verl.models.saved import export_model
from verl.models.shards import load_without_values

SPREADS = {
    "fsdp2": Spread("fsdp2"),
    "fsdp2 kept": Spread("fsdp2", Sharding(reshard_after_forward=False)),
    "groups": Spread("fsdp2", Sharding(size=1)),
    "ddp": Spread("ddp"),
    "offload": Spread("fsdp2", Sharding(cpu_offload=True)),
}


def build(model: str, spread: Spread, *, empty: bool = False) -> tuple[Engine, Any]:
    loaded = load_without_values(model, dtype=torch.float32) if empty else load_for_training(model)
    assert loaded is not None
    options: dict[str, Any] = {"total_steps": 20, "device": torch.device("cpu"), "compute_dtype": torch.float32}
    engine = Engine(TokenScorer(loaded.model), OptimConfig(lr=1e-3), **options, spread=spread, fill=loaded.fill)
    return engine, loaded


def losses(engine: Engine, start: int, stop: int) -> list[float]:
    # One or two micro-batches a rank and step, in the first step two.
    loader = Loader(RandomDocuments(), Packing(2, 120), rows_per_step=8, seed=1, rank=dist.rank(), world_size=dist.world_size())
    return [float(engine.train_step(step.micro_batches, sft, step.number)["loss"]) for step in loader.steps(start, stop)]


def gradient(engine: Engine, rows: int = 8) -> Tensor:
    batches = micro_batches(
        RandomDocuments(), np.arange(rows), Packing(1, 8 * 60 // dist.world_size()), rank=dist.rank(), world_size=dist.world_size()
    )
    engine.backward(batches, sft)
    whole = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in engine.trained]
    engine.optimizer.zero_grad(set_to_none=True)
    return torch.cat([g.flatten() for g in whole])


def save(root: Path, engine: Engine, loaded: Any, step: int) -> None:
    where = Position(step=step, tokens=0, supervised_tokens=0, rows=24, rows_per_step=8, seed=1, data_fingerprint="f")
    checkpoint.save(root, engine, where, partial(export_model, model=loaded.model, saved_dtypes=loaded.saved_dtypes))


def main(model: str, folder: str) -> None:
    dist.start()
    found: dict[str, Any] = {}
    for name, spread in SPREADS.items():
        shards = spread.strategy == "fsdp2" and (dist.world_size() > 1 or spread.sharding.cpu_offload)
        for empty in (False, True) if shards else (False,):
            engine, loaded = build(model, spread, empty=empty)
            key = f"{name}{', read by shards' if empty else ''}"
            found[key] = {"gradient": gradient(engine), "losses": losses(engine, 0, 6)}
            if name == "fsdp2" and empty == shards:
                save(Path(folder) / "sharded", engine, loaded, 6)
                found["rest"] = losses(engine, 6, 10)
    weights.BUCKET = 1
    engine, loaded = build(model, Spread("ddp"))
    assert isinstance(engine.weights, ReplicatedWeights) == (dist.world_size() > 1)
    found["ddp, many buckets"] = {"gradient": gradient(engine), "losses": losses(engine, 0, 6)}
    save(Path(folder) / "replicated", engine, loaded, 6)
    restore.load(Path(folder) / "sharded" / "global_step_6", engine)
    found["ddp after fsdp2"] = losses(engine, 6, 10)
    engine, _ = build(model, SPREADS["groups"], empty=dist.world_size() > 1)
    restore.load(Path(folder) / "replicated" / "global_step_6", engine)
    found["fsdp2 after ddp"] = losses(engine, 6, 10)
    sent, send = 0, torch.distributed.all_reduce

    def count(*words: Any, **options: Any) -> Any:
        nonlocal sent
        sent += options.get("async_op", False)
        return send(*words, **options)

    torch.distributed.all_reduce = count
    weights.BUCKET = 2**25
    engine, _ = build(model, Spread("ddp"))
    losses(engine, 0, 1)
    found["messages a step"] = sent
    if dist.is_main():
        torch.save(found, Path(folder) / "found.pt")
    dist.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
