"""Every method's gradient where a prompt is there once for all of its answers: that of answers with prompts of their own."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import relative
from places import run_ranks
from ranks.methods import PAIRED, POLICIES, SHARING, engine_of, fields_of_answers, gradient
from ranks.shared_methods import CUTS, SINGLE, answers, shared_batches, unshared_batch
from tiny import write_model
from torch import Tensor

from verl.algorithms import grpo
from verl.data.batch import Batch

pytestmark = pytest.mark.usefixtures("process_group")
Fields = dict[str, list[np.ndarray]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def fields(model: Path) -> Fields:
    return fields_of_answers(model, answers())


@pytest.fixture(scope="module")
def expected(model: Path, fields: Fields) -> dict[str, Tensor]:
    return {name: gradient(engine_of(name, model), [unshared_batch(fields)], method) for name, method in SHARING.items()}


@pytest.mark.parametrize("method", SHARING)
def test_the_gradient_is_that_of_answers_with_their_own_prompts(
    method: str, model: Path, fields: Fields, expected: dict[str, Tensor]
) -> None:
    for name, cut in (CUTS if method in PAIRED else {**CUTS, "single answers beside those that share": SINGLE}).items():
        found = gradient(engine_of(method, model), shared_batches(cut, fields), SHARING[method])
        assert relative(found, expected[method]) < 1e-5, name
        assert float((found - expected[method]).abs().max()) < 1e-5 * float(expected[method].abs().max()), name


@pytest.mark.parametrize("method", SHARING)
def test_loss_and_metrics_are_those_of_answers_with_their_own_prompts(method: str, model: Path, fields: Fields) -> None:
    found, expected = (
        engine_of(method, model).backward(batches, SHARING[method])
        for batches in (shared_batches(CUTS["a group in two micro-batches"], fields), [unshared_batch(fields)])
    )
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(float(value), rel=1e-5, abs=1e-5), name


def test_two_processes_give_the_same_gradient(model: Path, expected: dict[str, Tensor], tmp_path: Path) -> None:
    run_ranks("shared_methods.py", model, tmp_path / "found.pt")
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    far = {name: distance for name, wanted in expected.items() if (distance := relative(found[name], wanted)) > 1e-5}
    assert not far


def test_a_prompt_is_there_once() -> None:
    (shared,), alone = shared_batches(CUTS["one micro-batch"], {}), unshared_batch({})
    saved = 3 * 39 + 23 + 30  # the last prompt is too short
    assert shared.real_T is not None and int(shared.real_T.sum()) == len(alone.input_ids_T) - saved
    assert shared.documents == alone.documents and len(shared.trained_M) == len(alone.trained_M)


@pytest.mark.parametrize("method", POLICIES)
def test_on_policy_the_ratio_is_exactly_one(method: str, model: Path, fields: Fields) -> None:
    loss = POLICIES[method].Loss(POLICIES[method].Settings(), 60)
    engine = engine_of(method, model)
    for batch in shared_batches(CUTS["a group in two micro-batches"], {"advantage_M": fields["advantage_M"]}):
        (scored,) = engine.score([batch])
        known = replace(batch, old_logprob_M=scored.logprob_M)
        assert float(loss.loss(engine.scorer(known), known).metric_maxima["largest_ratio"]) == float(len(batch.trained_M) > 0)


def restarted(batch: Batch) -> Batch:
    """Positions of answers begin at 0."""
    starts_T = batch.cu_seqlens[:-1].long().repeat_interleave(batch.cu_seqlens.diff().long())
    return replace(batch, position_ids_T=torch.arange(len(starts_T)) - starts_T)


def with_siblings(batch: Batch) -> Batch:
    """Answers see those before them in their group."""
    prefixes = batch.prefixes
    assert prefixes is not None
    inner = (prefixes.segment_bounds < prefixes.numbers.group_tokens) & ~torch.isin(prefixes.segment_bounds, prefixes.group_bounds)
    merged = prefixes._replace(segment_bounds=prefixes.segment_bounds[~inner])
    return replace(batch, prefixes=merged)


def without_prefix(batch: Batch) -> Batch:
    return replace(batch, prefixes=None)


@pytest.mark.parametrize("wrong", [restarted, with_siblings, without_prefix])
def test_wrong_ways_to_share_are_seen(wrong: Any, model: Path, fields: Fields, expected: dict[str, Tensor]) -> None:
    """Negative control."""
    (batch,) = shared_batches(CUTS["one micro-batch"], fields)
    found = gradient(engine_of("grpo", model), [wrong(batch)], SHARING["grpo"])
    assert relative(found, expected["grpo"]) > 1e-2


def test_what_counts_answers_does_not_count_prompts(fields: Fields) -> None:
    (batch,) = shared_batches(CUTS["one micro-batch"], fields)
    assert grpo.Loss(grpo.Settings(), 60).count(batch) == batch.documents == 10
