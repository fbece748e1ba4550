"""Run on several ranks by test_engine: the gradient of eight documents spread over the ranks, saved by rank 0."""

import sys

import torch
from tiny import RandomDocuments
from torch.distributed.tensor import DTensor

from verl import dist
from verl.algorithms import sft
from verl.config.shared import OptimConfig
from verl.data.batch import Batch
from verl.data.loader import Packing, micro_batches
from verl.engine.contract import LossOut, TokenOut
from verl.engine.engine import Engine
from verl.engine.scorers import TokenScorer
from verl.models.load import load_for_training


def mean_of_rank(out: TokenOut, batch: Batch) -> LossOut:
    """The known wrong way: this rank's mean, which FSDP then averages over ranks."""
    return LossOut(-out.logprob_M.mean(), {"loss": out.logprob_M.detach().mean()})


def main(model: str, saved: str, formula: str) -> None:
    device = dist.start()
    engine = Engine(TokenScorer(load_for_training(model).model), OptimConfig(), total_steps=1, device=device, compute_dtype=torch.float32)
    rows = torch.arange(8).numpy()
    batches = micro_batches(RandomDocuments(), rows, Packing(1, 8 * 60), rank=dist.rank(), world_size=dist.world_size())
    if formula == "right":
        engine.backward(batches, sft)
    else:
        assert len(batches) == 1
        mean_of_rank(engine.scorer(batches[0]), batches[0]).sum.backward()
    gradients = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in engine.trained]
    gradient = torch.cat([g.flatten() for g in gradients])
    if dist.is_main():
        torch.save(gradient, saved)
    dist.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
