"""Preference losses and their gradients beside TRL's own code on the same log-probabilities, and beside written-out formulas."""

import importlib.util
from dataclasses import fields
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from verl.algorithms import dpo, dpo_norm, ipo, kto, odpo, orpo, robust_dpo, simpo
from verl.data.batch import Batch
from verl.data.numbered import NumberedBatch
from verl.data.pack import collate
from verl.engine.contract import LossOut, TokenOut
from verl.errors import UserError

pytestmark = pytest.mark.usefixtures("process_group")
with_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")

ANSWERS, LONGEST = 8, 9
PAIR_ORDER = torch.arange(ANSWERS).view(-1, 2).T.flatten()  # TRL has the chosen answers first; we have them beside the rejected ones


class Drawn:
    """Random answers of 1 to 9 tokens: padded as TRL has them, and side by side as we do."""

    def __init__(self, seed: int = 0):
        random = torch.Generator().manual_seed(seed)
        self.lengths = torch.randint(1, LONGEST + 1, (ANSWERS,), generator=random)
        self.mask = torch.arange(LONGEST)[None] < self.lengths[:, None]
        self.policy = (-1 - torch.rand(ANSWERS, LONGEST, generator=random)) * self.mask
        self.reference = self.policy + 0.3 * torch.randn(ANSWERS, LONGEST, generator=random) * self.mask

    def batch(self) -> Batch:
        documents = [(np.arange(n + 2, dtype=np.int32), np.arange(n + 2) >= 2) for n in self.lengths.tolist()]
        reference = [row[:n].numpy() for row, n in zip(self.reference, self.lengths.tolist(), strict=True)]
        return collate(documents, range(ANSWERS), multiple_of_tokens=16, values={"ref_logprob_M": reference})

    def ours(self, method: ModuleType, batch: Batch, **keys: Any) -> tuple[Tensor, Tensor, LossOut]:
        """Mean loss, its gradient by the log-probabilities, and all that the loss returned."""
        loss, logprob_M = method.Loss(method.Settings(**keys)), self.policy[self.mask].clone().requires_grad_()
        out = loss.loss(TokenOut(logprob_M), batch)
        mean = out.sum / loss.count(batch)
        return mean.detach(), torch.autograd.grad(mean, logprob_M)[0], out


def numbered(batch: Batch, number_S: Tensor, estimate: float | None = None) -> NumberedBatch:
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    padded_S = F.pad(number_S.float(), (0, len(batch.sample_ids_S) - len(number_S)))
    mean = number_S.float().mean()
    return NumberedBatch(**values, number_S=padded_S, mean_number=mean, estimate=None if estimate is None else torch.tensor(estimate))


def stub_of_trl(**settings: Any) -> MagicMock:
    stub = MagicMock()
    stub.configure_mock(precompute_ref_logps=False, aux_loss_enabled=False, use_weighting=False, **settings)
    stub.accelerator.device = torch.device("cpu")
    stub.accelerator.gather.side_effect = stub.accelerator.gather_for_metrics.side_effect = lambda tensor: tensor
    return stub


def output(logprob: Tensor) -> MagicMock:
    zeros = torch.zeros(logprob.shape)
    return MagicMock(log_probs=logprob, is_top1=zeros.bool(), mean_logits=zeros, entropy=zeros)


# DPO and those that differ from it in the loss of a pair


DPO_KINDS: dict[str, tuple[ModuleType, str, dict[str, Any]]] = {
    "dpo": (dpo, "sigmoid", {"beta": 0.3}),
    "robust": (robust_dpo, "robust", {"beta": 0.3, "label_smoothing": 0.2}),
    "ipo": (ipo, "ipo", {"beta": 0.3}),
    "length-normalised": (dpo_norm, "sigmoid_norm", {"beta": 3.0}),
    "no margin": (odpo, "sigmoid", {"beta": 0.3}),
}


@with_trl
@pytest.mark.parametrize("kind", DPO_KINDS)
def test_a_loss_of_pairs_is_trls(kind: str) -> None:
    from trl.trainer.dpo_trainer import DPOTrainer

    method, loss_type, keys = DPO_KINDS[kind]
    drawn = Drawn()
    logprob = drawn.policy[PAIR_ORDER].requires_grad_()
    shape = {"loss_types": [loss_type], "loss_weights": [1.0], "f_divergence_type": "reverse_kl", "ld_alpha": None}
    stub = stub_of_trl(**shape, label_smoothing=keys.get("label_smoothing", 0.0), beta=keys["beta"])
    stub.ref_model.return_value = SimpleNamespace(log_probs=drawn.reference[PAIR_ORDER])
    ids = torch.zeros(ANSWERS, LONGEST + 1, dtype=torch.long)
    mask = F.pad(drawn.mask[PAIR_ORDER].long(), (1, 0))
    inputs = {"input_ids": ids, "completion_mask": mask, "attention_mask": ids}
    expected = DPOTrainer._compute_loss(stub, MagicMock(return_value=output(logprob)), inputs, False)
    (expected_gradient,) = torch.autograd.grad(expected, logprob)

    mean, gradient, _ = drawn.ours(method, drawn.batch(), **keys)
    torch.testing.assert_close(mean, expected.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, expected_gradient[PAIR_ORDER.argsort()][drawn.mask], rtol=1e-5, atol=1e-6)


def log_ratios(drawn: Drawn) -> tuple[Tensor, Tensor]:
    ratio_S = (drawn.policy - drawn.reference).sum(1)
    return ratio_S[::2], ratio_S[1::2]


def test_conservative_dpo_is_the_mean_over_labels_that_may_be_swapped() -> None:
    drawn = Drawn(1)
    chosen, rejected = log_ratios(drawn)
    difference = 0.3 * (chosen - rejected)
    expected = (0.9 * -F.logsigmoid(difference) + 0.1 * -F.logsigmoid(-difference)).mean()
    torch.testing.assert_close(drawn.ours(dpo, drawn.batch(), beta=0.3, label_smoothing=0.1)[0], expected)


def test_robust_dpo_is_dpos_loss_on_average_over_swapped_labels() -> None:
    """(1 - e) × the loss as labelled + e × the loss with the labels swapped, of the corrected loss, is the loss of the true labels."""
    drawn, swapped = Drawn(1), Drawn(1)
    for name in ("lengths", "mask", "policy", "reference"):
        setattr(swapped, name, getattr(drawn, name).view(ANSWERS // 2, 2, -1).flip(1).reshape(getattr(drawn, name).shape))
    keys = {"beta": 0.3, "label_smoothing": 0.2}
    as_labelled, as_swapped = (one.ours(robust_dpo, one.batch(), **keys)[0] for one in (drawn, swapped))
    torch.testing.assert_close(0.8 * as_labelled + 0.2 * as_swapped, drawn.ours(dpo, drawn.batch(), beta=0.3)[0])
    assert abs(as_labelled - drawn.ours(dpo, drawn.batch(), **keys)[0]) > 1e-3, "conservative DPO is another loss"


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_a_margin_is_taken_from_the_difference_of_the_rewards(scale: str) -> None:
    drawn, margins = Drawn(2), torch.tensor([0.0, 0.5, 2.0, 7.0])
    chosen, rejected = log_ratios(drawn)
    offset = 0.25 + 0.5 * (margins if scale == "linear" else torch.log(1 + margins))
    expected = -F.logsigmoid(0.3 * (chosen - rejected) - offset)
    keys = {"beta": 0.3, "margin": 0.25, "margin_weight": 0.5, "margin_scale": scale}
    mean, _, out = drawn.ours(odpo, numbered(drawn.batch(), margins.repeat_interleave(2)), **keys)
    torch.testing.assert_close(mean, expected.mean())
    torch.testing.assert_close(out.count_sums["offset"], offset.sum())
    fixed, _, _ = drawn.ours(odpo, drawn.batch(), beta=0.3, margin=0.25)
    torch.testing.assert_close(fixed, -F.logsigmoid(0.3 * (chosen - rejected) - 0.25).mean())


# Losses without a reference


@with_trl
def test_simpos_loss_is_trls() -> None:
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    drawn = Drawn(3)
    logprob = drawn.policy.requires_grad_()
    mean_S = logprob.sum(1) / drawn.lengths
    stub = stub_of_trl(alpha=0.0, loss_type="simpo", simpo_gamma=0.7, beta=2.5, label_smoothing=0.0)
    cpo_loss: Any = CPOTrainer.cpo_loss
    losses, chosen, _ = cpo_loss(stub, mean_S[::2], mean_S[1::2])
    (expected_gradient,) = torch.autograd.grad(losses.mean(), logprob)
    drawn.policy = logprob.detach()
    mean, gradient, out = drawn.ours(simpo, drawn.batch(), beta=2.5, margin=0.7)
    torch.testing.assert_close(mean, losses.mean().detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, expected_gradient[drawn.mask], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.count_sums["chosen_reward"], chosen.sum())


@with_trl
def test_orpos_odds_ratio_is_trls_beside_the_loss_of_fine_tuning() -> None:
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    drawn = Drawn(4)
    drawn.policy[0] = -0.01 * drawn.mask[0]  # an answer that is nearly certain
    logprob = drawn.policy.requires_grad_()
    mean_S = logprob.sum(1) / drawn.lengths
    odds_ratio_loss: Any = ORPOTrainer.odds_ratio_loss
    terms, _, _, _, log_odds = odds_ratio_loss(stub_of_trl(beta=0.4), mean_S[::2], mean_S[1::2])
    expected = -mean_S[::2].mean() - terms.mean()
    (expected_gradient,) = torch.autograd.grad(expected, logprob)
    drawn.policy = logprob.detach()
    mean, gradient, out = drawn.ours(orpo, drawn.batch(), beta=0.4)
    torch.testing.assert_close(mean, expected.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, expected_gradient[drawn.mask], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.count_sums["log_odds"] / 4, log_odds.detach(), rtol=1e-5, atol=1e-6)


def test_the_odds_of_a_certain_answer_are_finite() -> None:
    certain = torch.zeros(1, requires_grad=True)
    found = orpo.log_odds(certain)
    assert torch.isfinite(found).all() and torch.isfinite(torch.autograd.grad(found, certain)[0]).all()
    half = torch.tensor([0.5, 0.9, 0.1]).log()
    expected = torch.tensor([0.0, np.log(9.0), -np.log(9.0)], dtype=torch.float32)
    torch.testing.assert_close(orpo.log_odds(half), expected, atol=1e-5, rtol=1e-5)


# KTO


LABELS = torch.tensor([1, 0, 1, 1, 0, 1, 1, 0])


@with_trl
@pytest.mark.parametrize("shift", [0.4, -0.4], ids=["a divergence", "an estimate below 0"])
def test_ktos_loss_is_trls(shift: float) -> None:
    """TRL computes the log-ratios of mismatched answers beside; here they are those of other answers of the same lengths."""
    from trl.trainer.kto_trainer import KTOTrainer

    drawn, other = Drawn(5), Drawn(6)
    other.policy = other.reference + shift * other.mask / other.lengths[:, None]
    logprob = drawn.policy.requires_grad_()
    keys: dict[str, Any] = {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.75}
    stub = stub_of_trl(loss_type="kto", calculate_KL=True, **keys)
    stub._compute_kl_logps.side_effect = [other.policy.sum(1), other.reference.sum(1)]
    stub.ref_model.return_value = SimpleNamespace(log_probs=drawn.reference)
    mask = F.pad(drawn.mask.long(), (1, 0))
    inputs = {"input_ids": torch.zeros_like(mask), "completion_mask": mask, "attention_mask": mask, "label": LABELS.bool()}
    expected = KTOTrainer._compute_loss(stub, MagicMock(return_value=output(logprob)), inputs, False)
    (expected_gradient,) = torch.autograd.grad(expected, logprob)
    drawn.policy = logprob.detach()

    loss = kto.Loss(kto.Settings(**keys))
    estimate = float(loss.estimate(TokenOut(other.policy[other.mask]), other.batch())) / ANSWERS
    assert estimate == pytest.approx(shift, abs=1e-6)
    batch = numbered(drawn.batch(), LABELS, estimate)
    mean, gradient, out = drawn.ours(kto, batch, **keys)
    torch.testing.assert_close(mean, expected.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, expected_gradient[drawn.mask], rtol=1e-5, atol=1e-6)
    found = {name: float(value) / ANSWERS for name, value in out.count_sums.items()}
    assert found["kl"] == pytest.approx(max(0.0, shift), abs=1e-6)
    ratio = 0.3 * (drawn.policy - drawn.reference).sum(1)
    assert found["chosen_reward"] == pytest.approx(float(ratio[LABELS == 1].mean()), rel=1e-5)
    assert found["rejected_reward"] == pytest.approx(float(ratio[LABELS == 0].mean()), rel=1e-5)
    assert found["margin"] == pytest.approx(float(ratio[LABELS == 1].mean() - ratio[LABELS == 0].mean()), rel=1e-5)


def test_kto_says_how_answers_are_balanced() -> None:
    def of(good: int, bad: int, **keys: Any) -> list[str]:
        return kto.Loss(kto.Settings(**keys)).notes(np.array([1.0] * good + [0.0] * bad))

    assert of(5, 5) == ["5 good and 5 bad answers"]
    assert "algorithm.desirable_weight from 4 to 6 gives" in of(10, 40)[1] and "0.25 times" in of(10, 40)[1]
    assert of(10, 40, desirable_weight=5.0) == ["10 good and 40 bad answers"]
    assert "only answers of one kind" in of(3, 0)[1]


# Keys


@pytest.mark.parametrize(
    ("method", "keys", "key"),
    [
        (ipo, {"beta": 0.0}, "beta"),
        (dpo_norm, {"beta": float("inf")}, "beta"),
        (robust_dpo, {"label_smoothing": 0.5}, "label_smoothing"),
        (simpo, {"margin": -1.0}, "margin"),
        (orpo, {"beta": -0.1}, "beta"),
        (odpo, {"margin_scale": "squared"}, "margin_scale"),
        (odpo, {"margin_weight": float("nan")}, "margin_weight"),
        (kto, {"undesirable_weight": -1.0}, "undesirable_weight"),
    ],
)
def test_a_wrong_key_is_named(method: ModuleType, keys: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError) as error:
        method.Settings(**keys).check()
    assert error.value.where == key and error.value.fix


@pytest.mark.parametrize("method", [dpo, dpo_norm, ipo, odpo, orpo, robust_dpo, simpo], ids=lambda method: method.__name__)
def test_the_metrics_are_those_that_the_file_names(method: ModuleType) -> None:
    drawn = Drawn(7)
    _, _, out = drawn.ours(method, drawn.batch())
    assert sorted(out.count_sums) == sorted(method.measures.split())
