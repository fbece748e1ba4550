"""Models of reinforcement learning hold still: nothing in them is random, so that ratios are 1 before an update."""

import torch

from verl import dist
from verl.data.pack import collate
from verl.engine.engine import Engine
from verl.engine.layers import uncompiled
from verl.engine.scorers import TokenScorer
from verl.engine.trial import probe_documents
from verl.errors import UserError
from verl.models.randomness import random_settings

# Largest difference of two scores that is only rounding. On a GPU, sums may be taken in another order each time.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}


@torch.no_grad()
def hold_still(engine: Engine, *, where: str) -> dict[str, float]:
    """Leave a model for reinforcement learning in evaluation mode for good, and check that it gives the same numbers twice.

    Ratios of new to old probability must be 1 before an update. Evaluation mode switches off whatever transformers' models have at random:
    modules, functions, jitter in routers, and layers that are left out. Gradients do not depend on the mode. Every rank calls it.

    Args:
        where: the config's key with the model, for the message.
    Returns:
        the model's `random_settings`, which are now off.
    Raises:
        UserError: on all ranks, if two scores of the same tokens differ.
    """
    engine.scorer.eval()
    found = random_settings(engine.scorer.model.config)
    difference = _difference_of_two_scores(engine) if dist.context_size() == 1 else 0.0
    if dist.any_rank(not difference < TOLERANCES[engine.compute_dtype]):
        named = f"set {', '.join(f'{name}=0' for name in found)} in its config.json" if found else "choose another model"
        what = f"{type(engine.scorer.model).__name__} gives other numbers each time, by {difference:.2g}, also in evaluation mode"
        raise UserError(f"{what}: ratios of new to old probability would be wrong", where=where, fix=named)
    return found


def _difference_of_two_scores(engine: Engine) -> float:
    vocabulary = len(next(engine.scorer.model.get_input_embeddings().parameters()))
    batch = collate(probe_documents(vocabulary), [0, 1])
    name = "logprob_M" if isinstance(engine.scorer, TokenScorer) else "value_M"
    with uncompiled():
        first, second = (getattr(engine.score([batch])[0], name) for _ in range(2))
    return float((first - second).abs().max())
