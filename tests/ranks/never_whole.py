"""Run on several ranks by test_never_whole: every kind of model from its files to an engine; rank 0 saves weights and first losses.

Four processes hold two copies of the weights, each in two shards, and none of them may read a model whole.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from decided import decided
from tiny import RandomDocuments
from torch import Tensor
from transformers import PreTrainedModel

from verl import dist
from verl.algorithms import sft
from verl.config.shared import FsdpConfig, ModelConfig, OptimConfig
from verl.data.loader import Loader, Packing
from verl.engine import build as building
from verl.engine import build_heads, references
from verl.engine.engine import Engine
from verl.models.load import load_tokenizer

ADAPTERS: dict[str, dict[str, object]] = {
    "all": {},
    "adapters": {"lora_rank": 4, "target_modules": "all-linear"},
    "adapters that drop": {"lora_rank": 4, "lora_dropout": 0.1},
    "an adapter to go on from": {"lora_adapter_path": "adapter"},
    "adapters whose base scored first": {"lora_rank": 4, "compute_dtype": "bfloat16"},
}


def losses(built: building.Built, *, scores: bool) -> list[float]:
    """Of three steps, before which the base may score what the first is to train on."""
    engine = built.engine
    loader = Loader(RandomDocuments(), Packing(1, 240), rows_per_step=8, seed=1, rank=dist.rank(), world_size=dist.world_size())
    steps = list(loader.steps(0, 3))
    if scores:
        references.AdapterOffReference(built).score(steps[0].micro_batches)
    return [float(engine.train_step(step.micro_batches, sft, step.number)["loss"]) for step in steps]


def whole(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in building.whole_tensors(model)}


def main(model: str, folder: str) -> None:
    dist.start()
    tokenizer, optim, found = load_tokenizer(model), OptimConfig(lr=1e-2), dict[str, Any]()
    options: dict[str, Any] = {"stop_ids": [7], "seed": 1}
    fsdp = FsdpConfig(shard_size=2 if dist.world_size() > 1 else None)
    if dist.world_size() > 1:
        PreTrainedModel.from_pretrained = None
    actors: list[building.Built] = []
    adapter = Path(folder).parent / "adapter"
    for name, changes in ADAPTERS.items():
        if "lora_adapter_path" in changes:
            changes = {"lora_adapter_path": str(adapter)}
        settings = ModelConfig(partial_pretrain=model, strategy="fsdp", fsdp_config=fsdp, use_liger=False, **changes)  # type: ignore[arg-type]
        built = building.build(settings, optim, tokenizer, decided(settings), **options)
        with built.engine.weights.in_model():
            start = whole(built.loaded.model)
        found[name] = {"start": start, "losses": losses(built, scores="scored" in name)}
        if name == "adapters" and dist.world_size() == 1:
            adapter.mkdir()
            built.export(adapter)
        actors.append(built)
    settings = ModelConfig(partial_pretrain=model, strategy="fsdp", fsdp_config=fsdp)
    reference = references.build_reference(settings, actors[0])
    critic = build_heads.build_critic(settings, optim, model, actors[0], decided(settings, scalar_head=True), seed=1)
    reward = build_heads.build_reward_model(settings, optim, tokenizer, decided(settings, scalar_head=True), padding=None, **options)
    assert isinstance(reference, Engine)
    for name, scorer in (("reference", reference.scorer), ("critic", critic.engine.scorer), ("reward model", reward.engine.scorer)):
        found[name] = {"start": whole(scorer.model), "losses": []}
    if dist.is_main():
        torch.save(found, Path(folder) / "found.pt")
    dist.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
