"""Losses and their gradients beside TRL's own code, which is called with given log-probabilities in place of a model's."""

import importlib.util
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from torch import Tensor

from verl.algorithms import dapo, dpo, dr_grpo, grpo, gspo, rloo
from verl.algorithms.answers import Answers
from verl.data.batch import Batch
from verl.data.pack import collate
from verl.engine.contract import TokenOut

# TRL takes seconds to import, so the tests import it, in the one process that runs them.
pytestmark = [
    pytest.mark.usefixtures("process_group"),
    pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed"),
]

ANSWERS, LONGEST, BETA = 6, 9, 0.04


class Drawn:
    """Random answers of 1 to 9 tokens, padded as TRL has them and side by side as we do."""

    def __init__(self, seed: int):
        random = torch.Generator().manual_seed(seed)
        self.lengths = torch.randint(1, LONGEST + 1, (ANSWERS,), generator=random)
        self.mask = torch.arange(LONGEST)[None] < self.lengths[:, None]
        self.new = -2 + 0.3 * torch.randn(ANSWERS, LONGEST, generator=random)
        self.old = self.new + 0.2 * torch.randn(ANSWERS, LONGEST, generator=random)
        self.reference = self.new + 0.5 * torch.randn(ANSWERS, LONGEST, generator=random)
        self.entropy = torch.rand(ANSWERS, LONGEST, generator=random)
        self.advantage = torch.randn(ANSWERS, generator=random)

    def trained(self, values: Tensor) -> Tensor:
        return values[self.mask]

    def batch(self, **values: Tensor) -> Batch:
        documents = [(np.arange(n + 2, dtype=np.int32), np.arange(n + 2) >= 2) for n in self.lengths.tolist()]
        split = {f"{name}_M": [v.numpy() for v in self.trained(x).split(self.lengths.tolist())] for name, x in values.items()}
        return collate(documents, range(ANSWERS), multiple_of_tokens=16, values=split)

    def theirs(self, trainer: Any, settings: dict[str, Any], logprob: Tensor, **more: Tensor) -> Tensor:
        """The loss that a trainer of TRL computes of log-probabilities."""
        stub = MagicMock()
        stub.configure_mock(**settings)
        stub._get_per_token_logps_and_entropies.return_value = logprob, self.entropy, None
        ids = torch.zeros(ANSWERS, LONGEST, dtype=torch.long)
        inputs = {"prompt_ids": ids, "prompt_mask": ids, "completion_ids": ids, "completion_mask": self.mask.long()}
        stub.accelerator.reduce.side_effect = lambda tensor, **_: tensor
        stub.accelerator.gather.side_effect = stub.accelerator.gather_for_metrics.side_effect = lambda tensor: tensor
        stub.accelerator.num_processes = 1
        total: Tensor = trainer._compute_loss(stub, None, {**inputs, "advantages": self.advantage, **more})
        return total


SETTINGS = {
    "top_entropy_quantile": 1.0,
    "off_policy_mask_threshold": None,
    "use_vllm": False,
    "beta": BETA,
    "epsilon_low": 0.2,
    "epsilon_high": 0.28,
    "aux_loss_enabled": False,
    "current_gradient_accumulation_steps": 1,
    "max_completion_length": 20,
    "importance_sampling_level": "token",
    "use_adaptive_entropy": False,
    "entropy_coef": 0.01,
    "_entropy_bonus_enabled": False,
    "args": SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("method", "theirs"),
    [
        (grpo, {"loss_type": "grpo"}),
        (dr_grpo, {"loss_type": "dr_grpo"}),
        (dapo, {"loss_type": "dapo", "_entropy_bonus_enabled": True}),
        (gspo, {"loss_type": "grpo", "importance_sampling_level": "sequence"}),
    ],
    ids=["grpo", "dr_grpo", "dapo with entropy", "gspo"],
)
def test_policy_losses_and_their_gradients_are_trls(method: Any, theirs: dict[str, Any], seed: int) -> None:
    from trl.trainer.grpo_trainer import GRPOTrainer

    drawn = Drawn(seed)
    logprob = drawn.new.clone().requires_grad_()
    more = {"old_per_token_logps": drawn.old, "ref_per_token_logps": drawn.reference, "num_items_in_batch": drawn.mask.sum()}
    expected = drawn.theirs(GRPOTrainer, SETTINGS | theirs, logprob, **more)
    (expected_gradient,) = torch.autograd.grad(expected, logprob)

    entropy = 0.01 if "_entropy_bonus_enabled" in theirs else 0.0
    settings = method.Settings(clip_ratio_low=0.2, clip_ratio_high=0.28, kl_coef=BETA, entropy_coef=entropy)
    advantage = drawn.advantage[:, None].expand(-1, LONGEST)
    batch = drawn.batch(advantage=advantage, old_logprob=drawn.old, ref_logprob=drawn.reference)
    mine = drawn.trained(drawn.new).requires_grad_()
    loss = method.Loss(settings, 20)
    found = loss.loss(TokenOut(mine, drawn.trained(drawn.entropy)), batch)
    mean = found.sum / loss.count(batch)
    torch.testing.assert_close(mean, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(mean, mine)[0], drawn.trained(expected_gradient), rtol=1e-4, atol=1e-6)
    assert found.metric_sums["clip_fraction"] > 0 or method is gspo, "a batch without clipped ratios would compare less"


@pytest.mark.parametrize("seed", range(3))
def test_rloos_loss_is_trls(seed: int) -> None:
    from trl.trainer.rloo_trainer import RLOOTrainer

    drawn = Drawn(seed)
    logprob = drawn.new.clone().requires_grad_()
    old = (drawn.old * drawn.mask).sum(1)
    expected = drawn.theirs(RLOOTrainer, SETTINGS, logprob, old_logps=old)
    (expected_gradient,) = torch.autograd.grad(expected, logprob)
    batch = drawn.batch(advantage=drawn.advantage[:, None].expand(-1, LONGEST), old_logprob=drawn.old)
    mine = drawn.trained(drawn.new).requires_grad_()
    loss = rloo.Loss(rloo.Settings(clip_ratio_high=0.28), 20)
    mean = loss.loss(TokenOut(mine), batch).sum / loss.count(batch)
    torch.testing.assert_close(mean, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(mean, mine)[0], drawn.trained(expected_gradient), rtol=1e-4, atol=1e-6)


def test_dpos_loss_is_trls() -> None:
    """TRL has the chosen answers first and then the rejected ones; we have them side by side."""
    from trl.trainer.dpo_trainer import DPOTrainer

    drawn = Drawn(0)
    order = torch.arange(ANSWERS).view(-1, 2).T.flatten()
    logprob = (drawn.new * drawn.mask)[order].requires_grad_()
    stub = MagicMock()
    kind = {"loss_types": ["sigmoid"], "loss_weights": [1.0], "f_divergence_type": "reverse_kl", "ld_alpha": None}
    stub.configure_mock(beta=0.3, **kind, precompute_ref_logps=False, aux_loss_enabled=False, use_weighting=False)
    stub.accelerator.device = torch.device("cpu")
    stub.accelerator.gather.side_effect = stub.accelerator.gather_for_metrics.side_effect = lambda tensor: tensor
    ids = torch.zeros(ANSWERS, LONGEST + 1, dtype=torch.long)
    is_top1 = torch.zeros(ANSWERS, LONGEST, dtype=torch.bool)
    stub.ref_model.return_value = SimpleNamespace(log_probs=(drawn.reference * drawn.mask)[order])
    model = MagicMock(return_value=MagicMock(log_probs=logprob, is_top1=is_top1, mean_logits=torch.zeros(ANSWERS, LONGEST)))
    mask = torch.cat([torch.zeros(ANSWERS, 1, dtype=torch.long), drawn.mask[order].long()], 1)
    expected = DPOTrainer._compute_loss(stub, model, {"input_ids": ids, "completion_mask": mask, "attention_mask": ids}, False)

    loss, batch = dpo.Loss(dpo.Settings(beta=0.3)), drawn.batch(ref_logprob=drawn.reference)
    mean = loss.loss(TokenOut(mine := drawn.trained(drawn.new).requires_grad_()), batch).sum / loss.count(batch)
    torch.testing.assert_close(mean, expected)
    (expected_gradient,) = torch.autograd.grad(expected, logprob)
    torch.testing.assert_close(torch.autograd.grad(mean, mine)[0], drawn.trained(expected_gradient[order.argsort()]))


def test_group_advantages_are_those_of_trls_published_formulas() -> None:
    """GRPOTrainer: (rewards - mean) / (std + 1e-4); RLOOTrainer: rewards - (sum - rewards) / (n - 1), less beta * sum of k1."""
    from trl.trainer.utils import nanstd

    random = np.random.default_rng(0)
    reward_A, n = random.standard_normal(12).astype(np.float32), 4
    old, ref = ([random.standard_normal(3).astype(np.float32) for _ in range(12)] for _ in range(2))
    given = Answers(reward_A, np.repeat([5, 1, 9], n), np.full(12, 3), np.zeros(12, dtype=bool), 10, old, ref)
    grouped = torch.from_numpy(reward_A).view(-1, n)
    mean, std = grouped.mean(1, keepdim=True), nanstd(grouped, dim=1)[:, None]
    found = {m: np.array([a[0] for a in m.advantages(given, m.Settings()).advantages]) for m in (grpo, dr_grpo)}
    assert found[grpo] == pytest.approx(((grouped - mean) / (std + 1e-4)).flatten().numpy(), abs=1e-5)
    assert found[dr_grpo] == pytest.approx((grouped - mean).flatten().numpy(), abs=1e-5)
    divergence = torch.tensor([float((a - b).sum()) for a, b in zip(old, ref, strict=True)]).view(-1, n)
    lessened = grouped - 0.05 * divergence
    expected = lessened - (lessened.sum(1, keepdim=True) - lessened) / (n - 1)
    learned = rloo.advantages(given, rloo.Settings(kl_coef=0.05, kl_in="reward"))
    assert [a[0] for a in learned.advantages] == pytest.approx(expected.flatten().tolist(), abs=1e-5)
