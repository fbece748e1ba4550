"""Every method's gradient through the engine: how answers are cut up, packed and spread over processes changes nothing."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from methods import ANSWERS, CUTS, METHODS, PAIR_CUTS, PAIRED, POLICIES, batches, engine_of, fields_of_answers, gradient
from tiny import write_model
from torch import Tensor

from verl import dist
from verl.config import AlgorithmConfig
from verl.data.batch import Batch
from verl.engine.engine import LossOut


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def fields(model: Path) -> dict[str, list[np.ndarray]]:
    return fields_of_answers(model)


@pytest.fixture(scope="module")
def of_one_batch(model: Path, fields: dict[str, list[np.ndarray]]) -> dict[str, Tensor]:
    return {name: gradient(engine_of(name, model), batches([range(ANSWERS)], fields), method) for name, method in METHODS.items()}


@pytest.fixture(autouse=True)
def process_group():
    dist.start()
    yield
    dist.stop()


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


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

    def slope(self, batch: Batch) -> None:
        return None

    def count(self, batch: Batch) -> float:
        return 1.0


@pytest.fixture(scope="module")
def of_two_processes(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    saved = tmp_path_factory.mktemp("saved") / "found.pt"
    here = Path(__file__).parent
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(here / "methods.py")]
    environment = {**os.environ, "PYTHONPATH": str(here.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(model), str(saved)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
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
    loss = POLICIES[method].Loss(AlgorithmConfig(), 60)
    (batch,) = batches([range(ANSWERS)], {"advantage_M": [np.full_like(a, a[0]) for a in fields["advantage_M"]]})
    engine = engine_of(method, model)
    (scored,) = engine.score([batch])
    known = replace(batch, old_logprob_M=scored.logprob_M)
    result = loss.loss(engine.scorer(known), known)
    assert float(result.metric_maxima["largest_ratio"]) == 1.0 and float(result.metric_sums["clip_fraction"]) == 0.0
    assert loss.slope(known) is None and loss.slope(batch) is not None
    expected = reinforce_gradient(engine_of(method, model), batch, method)
    for kind in (known, batch):
        scorer = engine_of(method, model)
        scorer.scorer.entropy = kind is batch
        assert relative(gradient(scorer, [kind], loss), expected) < 1e-5


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
