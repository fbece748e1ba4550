"""Every method's gradient through the engine: how answers are cut up, packed and spread over processes changes nothing."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import relative
from places import run_ranks
from ranks.methods import ANSWERS, CUTS, METHODS, PAIR_CUTS, PAIRED, POLICIES, TAUGHT, batches, engine_of, fields_of_answers, gradient
from tiny import write_model
from torch import Tensor

from verl.algorithms import _policy
from verl.data.batch import Batch
from verl.engine import logprobs
from verl.engine.contract import LossOut

pytestmark = pytest.mark.usefixtures("process_group")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def fields(model: Path) -> dict[str, list[np.ndarray]]:
    return fields_of_answers(model)


@pytest.fixture(scope="module")
def of_one_batch(model: Path, fields: dict[str, list[np.ndarray]]) -> dict[str, Tensor]:
    return {name: gradient(engine_of(name, model), batches([range(ANSWERS)], fields), method) for name, method in METHODS.items()}


@pytest.mark.parametrize("method", METHODS)
def test_the_gradient_is_the_same_however_answers_are_cut_up(
    method: str, model: Path, fields: dict[str, list[np.ndarray]], of_one_batch: dict[str, Tensor]
) -> None:
    for cut in (PAIR_CUTS if method in PAIRED else CUTS).values():
        found = gradient(engine_of(method, model), [*batches(cut, fields), *batches([[]], fields)], METHODS[method])
        assert relative(found, of_one_batch[method]) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_the_mean_of_micro_batch_means_is_another_gradient(
    method: str, model: Path, fields: dict[str, list[np.ndarray]], of_one_batch: dict[str, Tensor]
) -> None:
    """Negative control: the usual wrong formula. Where answers are counted, each micro-batch has as many only by chance."""
    cut = batches([range(2), range(2, 8)], fields)
    found = gradient(engine_of(method, model), cut, MeanOfMeans(METHODS[method], len(cut)))
    assert relative(found, of_one_batch[method]) > 1e-2


class MeanOfMeans:
    def __init__(self, method: Any, micro_batches: int):
        self._method, self._micro_batches = method, micro_batches

    def loss(self, out: Any, batch: Batch) -> LossOut:
        count = getattr(self._method, "count", lambda batch: len(batch.trained_M))
        return LossOut(self._method.loss(out, batch).sum / count(batch), {})

    def slope(self, batch: Batch) -> Any:
        if self._method not in TAUGHT.values():
            return None
        slopes, count = self._method.slope(batch), self._method.count(batch)
        return lambda logprob_C, rows: slopes(logprob_C, rows) / count

    def count(self, batch: Batch) -> float:
        return 1.0


@pytest.fixture(scope="module")
def of_two_processes(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    saved = tmp_path_factory.mktemp("saved") / "found.pt"
    run_ranks("methods.py", model, saved)
    found: dict[str, dict[str, Tensor]] = torch.load(saved, weights_only=True)
    return found


@pytest.mark.parametrize("spread", ["rows", "tokens"])
def test_two_processes_give_the_same_gradient(
    spread: str, of_one_batch: dict[str, Tensor], of_two_processes: dict[str, dict[str, Tensor]]
) -> None:
    found = of_two_processes[spread]
    far = {name: distance for name, g in of_one_batch.items() if (distance := relative(found[name], g)) > 1e-5}
    assert not far


def test_two_processes_score_as_they_train_and_are_sharded_afterwards(of_two_processes: dict[str, dict[str, Tensor]]) -> None:
    assert of_two_processes["ratios"]["grpo"].tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("strategy", ["fsdp2", "ddp"])
def test_a_gradient_that_is_broken_on_one_rank_is_skipped_on_all(strategy: str, of_two_processes: dict[str, dict[str, Tensor]]) -> None:
    skipped, moved = of_two_processes["steps"][strategy].tolist()
    assert skipped == 1.0 and moved == 0.0


@pytest.mark.parametrize("method", POLICIES)
def test_on_policy_the_ratio_is_one_and_the_gradient_is_that_of_reinforce(
    method: str, model: Path, fields: dict[str, list[np.ndarray]]
) -> None:
    """With the scored log-probabilities, without any, and with the slope known before the model has run."""
    loss = POLICIES[method].Loss(POLICIES[method].Settings(), 60)
    (batch,) = batches([range(ANSWERS)], {"advantage_M": [np.full_like(a, a[0]) for a in fields["advantage_M"]]})
    engine = engine_of(method, model)
    (scored,) = engine.score([batch])
    known = replace(batch, old_logprob_M=scored.logprob_M)
    result = loss.loss(engine.scorer(known), known)
    assert float(result.metric_maxima["largest_ratio"]) == 1.0 and float(result.metric_sums["clip_fraction"]) == 0.0
    assert (loss.slope(known) is None) == (method in OF_ANSWERS) and loss.slope(batch) is not None
    expected = reinforce_gradient(engine_of(method, model), batch, method)
    for kind in (known, batch):
        scorer = engine_of(method, model)
        scorer.scorer.entropy = kind is batch  # type: ignore[assignment]
        assert relative(gradient(scorer, [kind], loss), expected) < 1e-5


OF_ANSWERS = ("gspo", "rloo")  # their ratios are of answers, so that a token's slope depends on others' log-probabilities
OFF_POLICY: dict[str, dict[str, Any]] = {
    "clipped": dict(updates_per_step=2, dual_clip=3.0),
    "divergence k3": dict(kl_coef=0.1),
    "divergence k2": dict(kl_coef=0.1, kl_estimator="k2"),
    "weighted": dict(importance_weights="truncate", importance_cap=1.1, loss_aggregation="sequence-mean"),
    "masked": dict(importance_weights="mask", importance_cap=1.1, loss_aggregation="constant"),
    "entropy": dict(entropy_coef=0.1, kl_coef=0.1),
}


class Differentiated:
    """A method whose slope is left to autograd."""

    def __init__(self, method: Any):
        self.loss, self.count = method.loss, method.count

    def slope(self, batch: Batch) -> None:
        return None


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("verl.engine.logprobs.CHUNK_LOGITS", 512 * 7)


def off_policy_gradients(
    method: str, settings: dict[str, Any], model: Path, fields: dict[str, list[np.ndarray]], *, old: bool = True
) -> tuple[Tensor, Tensor]:
    """As it is trained, and with whole logits that autograd goes through."""
    loss = POLICIES[method].Loss(POLICIES[method].Settings(**settings), 60)
    given = {name: arrays for name, arrays in fields.items() if old or name != "old_logprob_M"}
    cut = batches([range(3), range(3, 8)], given)
    found, plain = engine_of(method, model), engine_of(method, model)
    found.scorer.entropy = "gradient" if loss.entropy_gradient else True  # type: ignore[assignment]
    return gradient(found, cut, loss), gradient(plain, cut, Differentiated(loss))


@pytest.mark.parametrize("old", [True, False], ids=["old known", "its own old policy"])
@pytest.mark.parametrize("settings", OFF_POLICY.values(), ids=OFF_POLICY)
@pytest.mark.parametrize("method", ["ppo", "grpo", "gspo"])
def test_a_slope_that_depends_on_the_log_probability_gives_the_gradient_of_autograd(
    method: str, settings: dict[str, Any], old: bool, model: Path, fields: dict[str, list[np.ndarray]], small_chunks: None
) -> None:
    found, expected = off_policy_gradients(method, settings, model, fields, old=old)
    assert relative(found, expected) < 1e-6


def test_each_chunk_has_the_values_of_its_own_tokens(
    model: Path, fields: dict[str, list[np.ndarray]], small_chunks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: the first tokens' values for all."""
    right = _policy._with_values_of
    monkeypatch.setattr(_policy, "_with_values_of", lambda batch, rows: right(batch, slice(0, len(batch.advantage_M[rows]))))
    found, expected = off_policy_gradients("grpo", OFF_POLICY["clipped"], model, fields)
    assert relative(found, expected) > 1e-2


@pytest.mark.parametrize(("method", "passes"), [("ppo", 1), ("grpo", 1), ("gspo", 2)])
def test_logits_are_made_once_where_a_tokens_slope_is_its_own(
    method: str, passes: int, model: Path, fields: dict[str, list[np.ndarray]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    once = logprobs._logits
    monkeypatch.setattr(logprobs, "_logits", lambda hidden, *weights: made.append(len(hidden)) or once(hidden, *weights))
    engine, cut = engine_of(method, model), batches([range(8)], fields)
    engine.scorer.entropy = True  # type: ignore[assignment]
    gradient(engine, cut, POLICIES[method].Loss(POLICIES[method].Settings(**OFF_POLICY["clipped"]), 60))
    assert made == [len(cut[0].trained_M)] * passes


def test_a_loss_of_ones_own_is_differentiated_though_it_builds_on_another(model: Path, fields: dict[str, list[np.ndarray]]) -> None:
    class Doubled(POLICIES["grpo"].Loss):  # type: ignore[misc]
        def loss(self, out: Any, batch: Batch) -> LossOut:
            result = super().loss(out, batch)
            return replace(result, sum=2 * result.sum)

    cut = batches([range(8)], fields)
    grpo = POLICIES["grpo"]
    plain, doubled = (gradient(engine_of("grpo", model), cut, kind(grpo.Settings(), 60)) for kind in (grpo.Loss, Doubled))
    assert relative(doubled, 2 * plain) < 1e-6


def reinforce_gradient(engine: Any, batch: Batch, method: str) -> Tensor:
    """Of -advantage * log p, written out answer by answer."""
    logprob_M = engine.scorer(batch).logprob_M
    lengths = [int(batch.loss_mask_T[a:b].sum()) for a, b in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True)][:ANSWERS]
    total = torch.zeros(())
    for logprob, advantage in zip(logprob_M.split(lengths), batch.advantage_M.split(lengths), strict=True):
        surrogate = -(logprob * advantage)
        if method in ("grpo", "gspo"):
            total = total + surrogate.mean() / ANSWERS
        elif method == "rloo":
            total = total + surrogate.sum() / ANSWERS
        else:
            total = total + surrogate.sum() / (ANSWERS * 60 if method == "dr_grpo" else sum(lengths))
    total.backward()
    return torch.cat([p.grad.flatten() for p in engine.trained])
