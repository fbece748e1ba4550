"""Run by test_router_loss on each process: the router loss and the gradient of its share of the rows. router_loss.py MODEL FILE."""

import sys
from pathlib import Path

import numpy as np
import torch
from engines import engine_of
from tiny import RandomDocuments
from torch.distributed.tensor import DTensor

from verl import dist
from verl.algorithms import sft
from verl.data.loader import Packing, micro_batches
from verl.engine.router_loss import find_router_loss

if __name__ == "__main__":
    dist.start()
    engine = engine_of(Path(sys.argv[1]), checkpointing=True)
    engine.router_loss, _ = find_router_loss(engine.scorer.model, None)
    batches = micro_batches(RandomDocuments(), np.arange(8), Packing(1, 60), rank=dist.rank(), world_size=dist.world_size())
    assert len(batches) > 1
    found = engine.backward(batches, sft)
    gradients = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in engine.trained]
    if dist.is_main():
        torch.save(
            {"loss": found["router_aux_loss"], "gradient": torch.cat([g.flatten() for g in gradients if g is not None])}, sys.argv[2]
        )
    dist.stop()
