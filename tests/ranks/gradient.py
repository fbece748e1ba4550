"""Run on several ranks by test_engine: gradients of eight documents spread over the ranks, saved by rank 0."""

import sys
from typing import Any

import torch
from tiny import RandomDocuments, unequal_documents
from torch import Tensor
from torch.distributed.tensor import DTensor

from verl import dist
from verl.algorithms import sft
from verl.config.shared import OptimConfig
from verl.data.batch import Batch
from verl.data.loader import Packing, micro_batches
from verl.data.pack import collate
from verl.engine.contract import LossOut, TokenOut
from verl.engine.engine import Engine
from verl.engine.scorers import TokenScorer
from verl.engine.trial import choose_path
from verl.models.load import load_for_training, read_config


def mean_of_rank(out: TokenOut, batch: Batch) -> LossOut:
    """The known wrong way: this rank's mean, which FSDP then averages over ranks."""
    return LossOut(-out.logprob_M.mean(), {"loss": out.logprob_M.detach().mean()})


def gathered(engine: Engine) -> Tensor:
    gradients = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in engine.trained]
    return torch.cat([g.flatten() for g in gradients])


def unequal(engine: Engine) -> dict[str, Tensor]:
    """Rank 1 has one document with a single trained token; the others share seven documents."""
    documents, others = unequal_documents(), [rank for rank in range(dist.world_size()) if rank != 1]
    mine = documents[:1] if dist.rank() == 1 else documents[1:][others.index(dist.rank()) :: len(others)]
    batch = collate(mine, range(len(mine)))
    mean_of_rank(engine.scorer(batch), batch).sum.backward()
    wrong = gathered(engine)
    engine.optimizer.zero_grad()
    engine.backward([batch], sft)
    gradients: list[Any] = [p.grad for p in engine.trained]
    right, shards = gathered(engine), [gradient.to_local() for gradient in gradients]
    engine.optimizer.zero_grad()
    norm = engine.train_step([batch], sft, 0)["grad_norm"]
    return {
        "gradient": right,
        "mean over ranks": wrong,
        "norm": norm,
        "norm of one shard": torch.cat([shard.flatten() for shard in shards]).norm(),
    }


def main(model: str, saved: str, formula: str) -> None:
    device = dist.start()
    path = choose_path(read_config(model), model)
    scorer = TokenScorer(load_for_training(model, attention=path.attention).model, path=path)
    engine = Engine(scorer, OptimConfig(), total_steps=1, device=device, compute_dtype=torch.float32)
    if formula == "unequal":
        found = unequal(engine)
        if dist.is_main():
            torch.save(found, saved)
        dist.stop()
        return
    rows = torch.arange(8).numpy()
    batches = micro_batches(RandomDocuments(), rows, Packing(1, 8 * 60), rank=dist.rank(), world_size=dist.world_size())
    if formula == "right":
        engine.backward(batches, sft)
    else:
        assert len(batches) == 1
        mean_of_rank(engine.scorer(batches[0]), batches[0]).sum.backward()
    gradient = gathered(engine)
    if dist.is_main():
        torch.save(gradient, saved)
    dist.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
