"""Run on two ranks by test_balance: how long each waits for the other's gradients, of which rank 1 is late."""

import json
import sys
import time
from types import SimpleNamespace

import torch
from tiny import RandomDocuments

from verl import dist
from verl.algorithms import sft
from verl.config.shared import OptimConfig
from verl.data.batch import Batch
from verl.data.loader import Packing, micro_batches
from verl.engine.contract import LossOut, TokenOut
from verl.engine.engine import Engine
from verl.engine.scorers import TokenScorer
from verl.engine.trial import choose_path
from verl.engine.weights import ReplicatedWeights, Spread
from verl.models.load import load_for_training, read_config
from verl.rl.clock import Clock


def late(out: TokenOut, batch: Batch) -> LossOut:
    time.sleep(0.5 * dist.rank())
    return sft.loss(out, batch)


def main(model: str, watched: str) -> None:
    device = dist.start()
    path = choose_path(read_config(model), model)
    scorer = TokenScorer(load_for_training(model, attention=path.attention).model, path=path)
    engine = Engine(scorer, OptimConfig(), total_steps=1, device=device, compute_dtype=torch.float32, spread=Spread("ddp"))
    clock = Clock(device)
    assert isinstance(engine.weights, ReplicatedWeights)
    if watched == "watched":
        engine.weights.waiting = clock.gradients
    batches = micro_batches(RandomDocuments(), torch.arange(8).numpy(), Packing(1, 8 * 60), rank=dist.rank(), world_size=dist.world_size())
    dist.barrier()
    clock.start()
    engine.backward(batches, SimpleNamespace(loss=late, slope=sft.slope))
    found = dist.gathered(clock.waiting()["update"])
    if dist.is_main():
        print(json.dumps(found))
    dist.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
