"""Divergences from a teacher beside their written-out formulas, TRL's losses, and what may not change them."""

import importlib.util
from dataclasses import replace
from typing import Any

import pytest
import torch
from divergences import Formula, top_written_out, written_out
from torch import Tensor

from verl.engine import divergence
from verl.engine.divergence import Divergence, Head, attached, score
from verl.engine.logprobs import LogitRule, token_scores

M, H, G, V, WIDER = 23, 16, 12, 61, 67
BETAS = (0.0, 0.2, 0.5, 1.0)
GEMMA, COHERE = LogitRule(factor=1.0, soft_cap=3.0), LogitRule(factor=0.5)
needs_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")


def head(width: int, vocabulary: int, rule: LogitRule, seed: int, *, bias: bool = False) -> Head:
    random = torch.Generator().manual_seed(seed)
    hidden_MH, weight_VH = torch.randn(M, width, generator=random), torch.randn(vocabulary, width, generator=random) * 0.6
    bias_V = torch.randn(vocabulary, generator=random).requires_grad_() if bias else None
    return Head(hidden_MH.requires_grad_(), weight_VH.requires_grad_(), bias_V, rule)


def logits(of: Head, temperature: float, tokens: int) -> Tensor:
    """As a model computes them: all at once."""
    raw_MV = of.hidden_MH @ of.weight_VH.T + (0.0 if of.bias_V is None else of.bias_V)
    return replace(of.rule, temperature=temperature)(raw_MV)[:, :tokens]


def found(student: Head, teacher: Head, kind: Divergence, *, by_logprob: float = 0.0) -> tuple[Any, list[Tensor]]:
    """The values, and the gradients of the sum of M positions' divergences, each with a weight of its own, and of log-probabilities."""
    weights_M, target_M = torch.linspace(0.5, 1.5, M), torch.arange(M) % V

    def slopes(logprob_C: Tensor, rows: slice) -> Tensor:
        return torch.stack([weights_M[rows], torch.full_like(logprob_C, by_logprob)])

    out = attached(student, score(student, teacher, target_M, kind, slopes, entropy=True))
    total = (weights_M * out.divergence_M).sum() + by_logprob * out.logprob_M.sum()
    return out, list(torch.autograd.grad(total, [tensor for tensor in student[:3] if tensor is not None]))


def check(student: Head, teacher: Head, kind: Divergence, formula: Formula) -> None:
    out, gradients = found(student, teacher, kind)
    tokens = min(len(student.weight_VH), len(teacher.weight_VH))
    expected_M = formula(logits(student, kind.temperature, tokens), logits(teacher, kind.temperature, tokens), kind.beta)
    torch.testing.assert_close(out.divergence_M.double(), expected_M.double(), rtol=1e-5, atol=1e-6)
    total = (torch.linspace(0.5, 1.5, M) * expected_M).sum()
    for here, there in zip(gradients, torch.autograd.grad(total, [t for t in student[:3] if t is not None]), strict=True):
        assert float((here - there).norm() / there.norm()) < 1e-5


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_value_and_gradient_are_those_of_the_formula(beta: float, temperature: float) -> None:
    check(head(H, V, LogitRule(), 1), head(G, V, LogitRule(), 2), Divergence(beta, temperature=temperature), written_out)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("top_k", [1, 5, V - 1])
def test_of_the_top_tokens_the_others_are_compared_as_one(beta: float, top_k: int) -> None:
    check(head(H, V, GEMMA, 1), head(G, V, LogitRule(), 2), Divergence(beta, top_k), top_written_out(top_k))


@pytest.mark.parametrize("rules", [(GEMMA, COHERE), (COHERE, GEMMA)])
def test_each_model_has_the_logits_of_its_architecture(rules: tuple[LogitRule, LogitRule]) -> None:
    student, teacher = (head(width, V, rule, seed, bias=True) for seed, (width, rule) in enumerate(zip((H, G), rules, strict=True)))
    check(student, teacher, Divergence(0.4, temperature=1.3), written_out)


@pytest.mark.parametrize("sizes", [(V, WIDER), (WIDER, V)])
def test_rows_of_filler_that_only_one_of_the_models_has_do_not_count(sizes: tuple[int, int]) -> None:
    student, teacher = head(H, sizes[0], LogitRule(), 1), head(G, sizes[1], LogitRule(), 2)
    for kind in (Divergence(1.0), Divergence(0.0, 3)):
        check(student, teacher, kind, written_out if kind.top_k is None else top_written_out(3))
    _, (_, weight_grad_VH) = found(student, teacher, Divergence(1.0))
    assert not weight_grad_VH[V:].any()


def test_as_many_top_tokens_as_there_are_are_all_tokens() -> None:
    student, teacher = head(H, V, LogitRule(), 1), head(G, V, LogitRule(), 2)
    assert torch.equal(
        found(student, teacher, Divergence(1.0, V))[0].divergence_M, found(student, teacher, Divergence(1.0))[0].divergence_M
    )


@pytest.mark.parametrize("kind", [Divergence(1.0), Divergence(0.5, 4)])
def test_chunks_change_nothing(kind: Divergence, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = head(H, V, LogitRule(), 1), head(G, V, LogitRule(), 2)
    whole, expected = found(student, teacher, kind)
    monkeypatch.setattr(divergence, "CHUNK_LOGITS", 5 * V)
    cut, gradients = found(student, teacher, kind)
    for name in ("logprob_M", "entropy_M", "divergence_M", "gap_M", "agrees_M"):
        torch.testing.assert_close(getattr(cut, name), getattr(whole, name))
    for here, there in zip(gradients, expected, strict=True):
        torch.testing.assert_close(here, there)


def test_the_logits_of_no_more_than_a_chunk_are_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    largest: list[int] = []
    monkeypatch.setattr(divergence, "CHUNK_LOGITS", 4 * V)
    original = Head.logits

    def measured(self: Head, rows: slice) -> Tensor:
        largest.append((made := original(self, rows)).numel())
        return made

    monkeypatch.setattr(Head, "logits", measured)
    found(head(H, V, LogitRule(), 1), head(G, V, LogitRule(), 2), Divergence(0.5))
    assert max(largest) == 4 * V and len(largest) == 2 * -(-M // 4)


def test_log_probability_and_entropy_are_those_without_a_teacher() -> None:
    """The temperature of the divergence is not that of the log-probabilities."""
    student, teacher = head(H, V, replace(GEMMA, temperature=0.8), 1), head(G, V, LogitRule(), 2)
    out, gradients = found(student, teacher, Divergence(1.0, temperature=2.0), by_logprob=-0.7)
    _, without = found(student, teacher, Divergence(1.0, temperature=2.0))
    expected = token_scores(*student[:3], torch.arange(M) % V, student.rule, entropy=True)
    torch.testing.assert_close(out.logprob_M, expected.logprob_M)
    torch.testing.assert_close(out.entropy_M, expected.entropy_M)
    of_logprobs = torch.autograd.grad(-0.7 * expected.logprob_M.sum(), student[:2])
    for here, rest, there in zip(gradients, without, of_logprobs, strict=True):
        torch.testing.assert_close(here - rest, there, rtol=1e-4, atol=1e-5)


def test_gap_and_agreement_are_of_the_trained_token_and_the_likeliest() -> None:
    student, teacher = head(H, V, LogitRule(), 1), head(G, V, LogitRule(), 2)
    out, _ = found(student, teacher, Divergence(1.0))
    p, q = (logits(of, 1.0, V).log_softmax(-1) for of in (student, teacher))
    at = torch.arange(M) % V
    torch.testing.assert_close(out.gap_M, (p - q)[torch.arange(M), at])
    assert out.agrees_M.tolist() == (p.argmax(-1) == q.argmax(-1)).float().tolist()
    same, _ = found(student, student, Divergence(1.0))
    assert same.agrees_M.all() and float(same.divergence_M.detach().abs().max()) < 1e-6


def test_a_rank_without_trained_tokens_has_empty_values_and_a_gradient_of_zero() -> None:
    student, teacher = (Head(of.hidden_MH[:0], *of[1:]) for of in (head(H, V, LogitRule(), 1), head(G, V, LogitRule(), 2)))
    scored = score(student, teacher, torch.arange(0), Divergence(0.5, 3), lambda logprob_C, rows: torch.ones(1, len(logprob_C)))
    out = attached(student, scored)
    assert out.divergence_M is not None and out.divergence_M.shape == (0,)
    assert not torch.autograd.grad(out.divergence_M.sum(), student.weight_VH)[0].any()


@needs_trl
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_loss_and_gradient_are_those_of_the_gkd_trainer_of_trl(beta: float, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.gkd import GKDTrainer

    student, teacher = head(H, V, LogitRule(), 1), head(G, V, LogitRule(), 2)

    def theirs(student_MV: Tensor, teacher_MV: Tensor, beta: float) -> Tensor:
        loss: Tensor = GKDTrainer.generalized_jsd_loss(student_MV[None], teacher_MV[None], beta=beta, reduction="none")
        return loss[0].sum(-1)

    check(student, teacher, Divergence(beta, temperature=temperature), theirs)


@needs_trl
@pytest.mark.parametrize("beta", BETAS)
def test_loss_and_gradient_are_those_of_the_distillation_trainer_of_trl(beta: float) -> None:
    """Its chunked loss, which takes hidden states and heads as ours does."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    student, teacher = head(H, V, GEMMA, 1), head(G, V, COHERE, 2)
    loss, _, _ = _chunked_divergence_loss(
        student.hidden_MH[None],
        teacher.hidden_MH[None].detach(),
        student.weight_VH,
        teacher.weight_VH.detach(),
        torch.ones(1, M),
        beta,
        student_final_logit_softcapping=3.0,
        teacher_logit_scale=0.5,
        temperature=1.7,
    )
    out = attached(student, score(student, teacher, torch.zeros(M, dtype=torch.long), Divergence(beta, None, 1.7), _ones))
    assert out.divergence_M is not None
    torch.testing.assert_close(out.divergence_M.mean(), loss, rtol=1e-5, atol=1e-6)
    expected = torch.autograd.grad(loss * M, student[:2])
    for here, there in zip(torch.autograd.grad(out.divergence_M.sum(), student[:2]), expected, strict=True):
        assert float((here - there).norm() / there.norm()) < 1e-5


def _ones(logprob_C: Tensor, rows: slice) -> Tensor:
    return torch.ones(1, len(logprob_C))
