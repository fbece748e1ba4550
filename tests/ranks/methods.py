"""Each method's loss with a scorer and a batch for it, cut up in several ways, on one process or several. For test_algorithms.

On several ranks it saves every method's gradient: methods.py MODEL FILE, the processes first taking other rows, then parts of the same.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields as dataclass_fields
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tiny import VOCABULARY, RandomDocuments, sharp
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from verl import dist
from verl.algorithms import (
    bradley_terry,
    dapo,
    distill,
    dpo,
    dpo_norm,
    dr_grpo,
    grpo,
    gspo,
    ipo,
    kto,
    odpo,
    orpo,
    ppo,
    reinforce,
    rloo,
    robust_dpo,
    sft,
    simpo,
)
from verl.config.shared import OptimConfig, TeacherConfig
from verl.data.batch import VALUES, Batch
from verl.data.numbered import NumberedBatch
from verl.data.pack import Document, collate
from verl.engine.contract import LossOut
from verl.engine.divergence import Divergence
from verl.engine.engine import Engine
from verl.engine.moments import local
from verl.engine.scorers import Scorer, TokenScorer
from verl.engine.teachers import Teacher, TeacherScorer
from verl.engine.value_scorers import RewardScorer, ValueScorer
from verl.engine.weights import Spread
from verl.models.attention.packed import PACKED, PACKED_PATH
from verl.models.heads import load_critic, load_reward_model
from verl.models.load import load_for_training

ANSWERS, LONGEST = 8, 60
CUTS: Mapping[str, Sequence[Sequence[int]]] = {"1 x 8": [range(8)], "2 x 4": [range(4), range(4, 8)], "8 x 1": [[i] for i in range(8)]}
PAIR_CUTS: Mapping[str, Sequence[Sequence[int]]] = {
    "1 x 8": [range(8)],
    "2 x 4": [range(4), range(4, 8)],
    "4 x 2": [[i, i + 1] for i in range(0, 8, 2)],
}
IN_LOSS = {"kl_coef": 0.1, "entropy_coef": 0.01, "dual_clip": 3.0}
POLICIES = {module.__name__.rpartition(".")[2]: module for module in (ppo, grpo, dr_grpo, rloo, reinforce, dapo, gspo)}
METHODS: dict[str, Any] = {name: module.Loss(module.Settings(**IN_LOSS), LONGEST) for name, module in POLICIES.items()}
KEPT: dict[str, Any] = {**IN_LOSS, "entropy_coef": 0.0, "keep_reference": True, "loss_aggregation": "sequence-mean"}
TAUGHT: dict[str, Any] = {
    "distill": distill.Loss(distill.Settings(), LONGEST, TeacherConfig()),
    "distill beside a reward": distill.Loss(distill.Settings(**KEPT), LONGEST, TeacherConfig(weight=0.6)),
    "distill on given answers": distill.FixedLoss(TeacherConfig(weight=0.7)),
}
COMPARED = dict(zip(TAUGHT, (Divergence(1.0), Divergence(0.3, temperature=0.7), Divergence(0.0, top_k=5)), strict=True))
METHODS |= TAUGHT
METHODS |= {"value": ppo.ValueLoss(ppo.Settings()), "bradley_terry": bradley_terry.Loss(None), "sft": sft}
PREFERENCES = {module.__name__.rpartition(".")[2]: module for module in (dpo, dpo_norm, ipo, kto, odpo, orpo, robust_dpo, simpo)}
METHODS |= {name: module.Loss(module.Settings()) for name, module in PREFERENCES.items()}
PAIRED = ("bradley_terry", *(name for name in PREFERENCES if name != "kto"))
SHARING = {name: method for name, method in METHODS.items() if name != "kto"}  # single answers have no prompt in common


def scorer_of(method: str, model: Path) -> Scorer:
    """The head of a critic or reward model is random but the same everywhere."""
    if method not in ("value", "bradley_terry"):
        token_scorer = TokenScorer(load_for_training(str(model)).model, entropy="gradient")
        token_scorer.teacher = teacher_of(COMPARED[method]).scores if method in COMPARED else None
        return token_scorer
    scorer: Scorer = ValueScorer(load_critic(str(model)).model) if method == "value" else RewardScorer(load_reward_model(str(model)).model)
    head: Any = scorer.model.score
    with torch.no_grad():
        head.weight.copy_(torch.sin(torch.arange(head.weight.numel())).view_as(head.weight))
    return scorer


def teacher_of(kind: Divergence) -> Teacher:
    """A teacher of another architecture and width, the same on all processes."""
    shape: dict[str, Any] = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    shape["attn_implementation"] = PACKED
    model = sharp(LlamaForCausalLM, LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=False, **shape))
    cpu = torch.device("cpu")
    engine = Engine(TeacherScorer(model, kind, PACKED_PATH), None, total_steps=1, device=cpu, compute_dtype=torch.float32)
    return Teacher("a teacher", engine)


def engine_of(method: str, model: Path) -> Engine:
    cpu = torch.device("cpu")
    return Engine(scorer_of(method, model), OptimConfig(clip_grad=1e9), total_steps=10, device=cpu, compute_dtype=torch.float32)


def fields_of_answers(model: Path, answers: Sequence[Document] | None = None) -> dict[str, list[np.ndarray]]:
    """A value for each trained token of each answer: log-probabilities near the model's own, so that some are clipped."""
    answers = documents() if answers is None else answers
    with torch.no_grad():
        logprobs = TokenScorer(load_for_training(str(model)).model)(collate(answers, range(len(answers)))).logprob_M.numpy()
    random, lengths = np.random.default_rng(0), [int(mask[1:].sum()) for _, mask in answers]
    near = [logprobs + 0.2 * random.standard_normal(len(logprobs)) for _ in range(3)]
    other = [random.standard_normal(len(logprobs)) for _ in range(3)]
    ends = np.cumsum(lengths)[:-1]
    order = ("old_logprob_M", "ref_logprob_M", "rollout_logprob_M", "advantage_M", "value_M", "return_M")
    return {name: np.split(values.astype(np.float32), ends) for name, values in zip(order, near + other, strict=True)}


def documents() -> list[tuple[np.ndarray, np.ndarray]]:
    rows = RandomDocuments(longest=LONGEST)
    return [(ids, np.arange(len(ids)) >= 1 + len(ids) // 3) for ids, _ in map(rows.document, range(ANSWERS))]


def batches(groups: Sequence[Sequence[int]], fields: dict[str, list[np.ndarray]]) -> list[Batch]:
    """A micro-batch of the answers of each group, all filled up a little; an empty group is filler alone."""
    found = [
        collate(
            [documents()[i] for i in group],
            list(group),
            multiple_of_tokens=8,
            values={name: [arrays[i] for i in group] for name, arrays in fields.items()},
        )
        for group in groups
    ]
    return [with_numbers(batch) for batch in found]


def with_numbers(batch: Batch) -> NumberedBatch:
    """Labels of the answers, or margins of the pairs, some of them 0; and what was estimated before the step."""
    number_S = torch.where(batch.sample_ids_S >= 0, batch.sample_ids_S // 2 % 3 % 2, 0).float()
    values = {field.name: getattr(batch, field.name) for field in dataclass_fields(batch)}
    return NumberedBatch(**values, number_S=number_S, mean_number=torch.tensor(0.25), estimate=torch.tensor(0.3))


def gradient(engine: Engine, micro_batches: Sequence[Batch], algorithm: Any) -> Tensor:
    engine.backward(micro_batches, algorithm)
    gradients = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in engine.trained if p.grad is not None]
    return torch.cat([g.flatten() for g in gradients])


class BrokenOnLastRank:
    """Its loss is finite, and the gradient of the last rank is not."""

    def loss(self, out: Any, batch: Batch) -> LossOut:
        total = -out.logprob_M.sum()
        return LossOut(total + (total - total.detach()) * (math.nan if dist.rank() == dist.world_size() - 1 else 1.0), {})

    def slope(self, batch: Batch) -> None:
        return None


def step_that_is_broken_on_one_rank(model: Path, strategy: Literal["fsdp2", "ddp"], rows: Sequence[Batch]) -> Tensor:
    """Whether it was skipped, and how far it moved the weights, on this rank and the farthest on any."""
    scorer, cpu = scorer_of("sft", model), torch.device("cpu")
    engine = Engine(scorer, OptimConfig(lr=0.1), total_steps=1, device=cpu, compute_dtype=torch.float32, spread=Spread(strategy))
    before = [local(p).detach().clone() for p in engine.trained]
    skipped = float(engine.train_step(rows, BrokenOnLastRank(), 0)["skipped"])
    moved = not all(torch.equal(local(p), b) for p, b in zip(engine.trained, before, strict=True))
    return torch.tensor([skipped, float(dist.any_rank(moved))])


def ratio_after_scoring(model: Path, rows: Sequence[Batch]) -> Tensor:
    """The largest ratio of an update with log-probabilities scored just before, in two steps, and whether weights are sharded after."""
    engine, ratios = engine_of("grpo", model), []
    for step in range(2):
        known = [replace(batch, old_logprob_M=out.logprob_M) for batch, out in zip(rows, engine.score(rows), strict=True)]
        is_sharded = all(isinstance(p, DTensor) for p in engine.scorer.parameters())
        ratios.append(float(engine.train_step(known, grpo.Loss(grpo.Settings(), LONGEST), step)["largest_ratio"]))
    return torch.tensor([*ratios, float(is_sharded)])


def main(model: str, saved: str) -> None:
    dist.start()
    fields = fields_of_answers(Path(model))
    assert set(fields) == set(VALUES)
    found: dict[str, dict[str, Tensor]] = {}
    rows = batches([[[0, 1, 2, 3, 4, 5], []], [[6, 7], []]][dist.rank()], fields)  # 6 answers here, 2 there
    found["rows"] = {name: gradient(engine_of(name, Path(model)), rows, method) for name, method in METHODS.items()}
    dist.share_micro_batches(dist.world_size())
    tokens = [batch.part(dist.context_rank(), dist.context_size()) for batch in batches([range(ANSWERS)], fields)]
    found["tokens"] = {name: gradient(engine_of(name, Path(model)), tokens, method) for name, method in METHODS.items()}
    dist.share_micro_batches(1)
    found["steps"] = {spread: step_that_is_broken_on_one_rank(Path(model), spread, rows) for spread in ("fsdp2", "ddp")}
    found["ratios"] = {"grpo": ratio_after_scoring(Path(model), rows)}
    if dist.is_main():
        torch.save(found, saved)
    dist.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
