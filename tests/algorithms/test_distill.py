"""Distillation's loss through the engine, beside the plain models of transformers and the written-out formula."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from divergences import top_written_out, written_out
from engines import relative
from ranks.methods import ANSWERS, COMPARED, LONGEST, TAUGHT, batches, documents, engine_of, gradient, teacher_of
from tiny import write_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from verl.algorithms import distill
from verl.algorithms.answers import Answers
from verl.config.shared import TeacherConfig
from verl.engine.contract import TokenOut
from verl.engine.divergence import Divergence
from verl.errors import UserError

pytestmark = pytest.mark.usefixtures("process_group")
ALONE = ("distill", "distill on given answers")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def advantages(*, of_each: float = 0.0) -> dict[str, list[np.ndarray]]:
    """Of each answer in turn so much, and as much less."""
    return {"advantage_M": [np.full(int(mask[1:].sum()), of_each * (-1.0) ** n, np.float32) for n, (_, mask) in enumerate(documents())]}


def plain_gradient(path: Path, method: str) -> Tensor:
    """Of each document alone, with all logits of both models in memory."""
    student, kind = AutoModelForCausalLM.from_pretrained(path), COMPARED[method]
    teacher: Any = teacher_of(kind).engine.scorer.model
    teacher.set_attn_implementation("eager")
    weight = TAUGHT[method]._weight
    formula = written_out if kind.top_k is None else top_written_out(kind.top_k)
    total, tokens = torch.zeros(()), 0
    for ids, mask in documents():
        ids_T = torch.from_numpy(ids).long()
        trained = torch.from_numpy(mask[1:])
        mine, theirs = (one(ids_T[None], use_cache=False).logits[0, :-1][trained] for one in (student, teacher))
        logprob_M = mine.log_softmax(-1).gather(1, ids_T[1:][trained][:, None])
        divergence_M = formula(mine / kind.temperature, theirs.detach() / kind.temperature, kind.beta)
        total = total + weight * divergence_M.sum() - (1 - weight) * logprob_M.sum()
        tokens += int(trained.sum())
    (total / tokens).backward()
    return torch.cat([p.grad.flatten() for p in student.parameters()])


@pytest.mark.parametrize("method", ALONE)
def test_the_gradient_is_that_of_each_answer_alone_by_the_formula(method: str, model: Path) -> None:
    found = gradient(engine_of(method, model), batches([range(5), range(5, ANSWERS)], advantages()), TAUGHT[method])
    assert relative(found, plain_gradient(model, method)) < 1e-5


def test_another_temperature_is_another_gradient(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control."""
    expected = plain_gradient(model, "distill")
    engine = engine_of("distill", model)
    engine.scorer.teacher = teacher_of(Divergence(1.0, temperature=1.2)).scores  # type: ignore[assignment]
    assert relative(gradient(engine, batches([range(ANSWERS)], advantages()), TAUGHT["distill"]), expected) > 1e-2


def test_beside_a_reward_the_loss_is_the_weighted_sum_of_both(model: Path) -> None:
    fields = advantages(of_each=1.0)
    settings = distill.Settings()

    def of(weight: float) -> Tensor:
        loss = distill.Loss(settings, LONGEST, TeacherConfig(weight=weight))
        return gradient(engine_of("distill", model), batches([range(ANSWERS)], fields), loss)

    reward = gradient(engine_of("grpo", model), batches([range(ANSWERS)], fields), distill.PolicyLoss(settings, LONGEST))
    assert relative(of(0.3), 0.3 * of(1.0) + 0.7 * reward) < 1e-5


def test_loss_and_metrics_are_means_over_tokens() -> None:
    out = TokenOut(
        torch.tensor([-1.0, -2.0]), None, torch.tensor([0.5, 1.5]), gap_M=torch.tensor([0.1, 0.3]), agrees_M=torch.tensor([1.0, 0.0])
    )
    (batch,) = batches([[0]], {})
    result = distill.FixedLoss(TeacherConfig(weight=0.25)).loss(out, batch)
    assert float(result.sum) == pytest.approx(0.25 * 2.0 + 0.75 * 3.0)
    found = {name: pytest.approx(float(value)) for name, value in result.metric_sums.items()}
    assert found == {"cross_entropy": 3.0, "divergence": 2.0, "teacher_gap": 0.4, "teacher_agreement": 1.0}


def test_answers_that_are_alone_need_no_reward_and_groups_have_the_advantages_of_grpo() -> None:
    lengths = np.array([3, 2, 4, 1])
    answers = Answers(np.array([1, 0, 0, 0], np.float32), np.arange(4), lengths, np.zeros(4, bool), 9)
    assert not any(tokens.any() for tokens in distill.advantages(answers, distill.Settings()).advantages)
    of_two = Answers(answers.reward_A, np.array([0, 0, 1, 1]), lengths, answers.truncated_A, 9)
    found = distill.advantages(of_two, distill.Settings()).advantages
    assert found[0][0] > 0 > found[1][0] and not found[2].any()


def test_an_entropy_bonus_is_refused() -> None:
    with pytest.raises(UserError, match="entropy"):
        distill.Settings(entropy_coef=0.1).check()
