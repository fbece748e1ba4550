"""Batches that are filled up for CUDA graphs: what is filled in counts for nothing. On a GPU the graphs themselves."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import RandomDocuments, qwen2_config, write_model

from verl.algorithms import sft
from verl.config.shared import OptimConfig
from verl.data.batch import Batch
from verl.data.loader import Loader, Packing, micro_batches
from verl.engine import cuda_graphs
from verl.engine.cuda_graphs import CapturedBackward, GraphSize, fill_up
from verl.engine.decisions import LARGEST_TOKENS
from verl.engine.engine import Engine
from verl.engine.layers import compile_layers
from verl.engine.scorers import TokenScorer
from verl.models.load import load_for_training

pytestmark = pytest.mark.usefixtures("device")

PACKING = Packing(8, 8 * 60)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), qwen2_config(hidden_size=128, intermediate_size=256))


def engine_of(path: Path, device: torch.device, *, record: bool | None, compiled: bool = False) -> Engine:
    """`record`: None: no filling up."""
    model = load_for_training(str(path)).model
    if compiled:
        compile_layers(model)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    engine = Engine(TokenScorer(model), OptimConfig(lr=1e-3, warmup_steps_ratio=0.0), total_steps=50, device=device, compute_dtype=dtype)
    engine.captured = None if record is None else CapturedBackward(engine.scorer, device, LARGEST_TOKENS, record=record)
    return engine


def train(engine: Engine, *, rows: int = 8, steps: int = 50) -> tuple[np.ndarray, np.ndarray]:
    """Loss and gradient norm of each step."""
    loader = Loader(RandomDocuments(400), PACKING, rows_per_step=rows, seed=1, pin=engine.device.type == "cuda")
    found = [engine.train_step(s.micro_batches, sft, s.number) for s in loader.steps(0, steps)]
    return tuple(np.array([float(metrics[name]) for metrics in found]) for name in ("loss", "grad_norm"))  # type: ignore[return-value]


def a_batch(rows: int = 5) -> Batch:
    return micro_batches(RandomDocuments(), np.arange(rows), PACKING)[0]


def test_what_is_filled_in_is_untrained_and_a_document_of_its_own() -> None:
    batch = a_batch()
    size = GraphSize.of(batch)
    filled, real_M = fill_up(batch, size)
    tokens, trained, documents = len(batch.input_ids_T), len(batch.trained_M), len(batch.sample_ids_S)
    assert (len(filled.input_ids_T), len(filled.trained_M), len(filled.cu_seqlens)) == (size.tokens, size.trained, size.documents + 1)
    assert torch.equal(filled.input_ids_T[:tokens], batch.input_ids_T) and torch.equal(filled.trained_M[:trained], batch.trained_M)
    assert torch.equal(filled.cu_seqlens[: documents + 1], batch.cu_seqlens)
    assert (filled.cu_seqlens[documents + 1 :] == size.tokens).all()
    assert filled.position_ids_T[tokens:].tolist() == list(range(size.tokens - tokens))
    assert real_M.sum() == trained and (real_M[:trained] == 1).all()
    assert (filled.sample_ids_S[documents:] == -1).all() and not filled.loss_mask_T[tokens:].any()
    assert size.max_seqlen >= max(batch.max_seqlen, size.tokens - tokens)


def test_batches_that_are_filled_up_train_the_same(model_path: Path, device: torch.device) -> None:
    plain, filled = train(engine_of(model_path, device, record=None)), train(engine_of(model_path, device, record=False))
    tolerance = 1e-5 if device.type == "cpu" else 1.5e-2
    np.testing.assert_allclose(filled[0], plain[0], rtol=tolerance)
    np.testing.assert_allclose(filled[1], plain[1], rtol=10 * tolerance)


def test_positions_that_are_filled_in_would_change_the_gradient_if_they_counted(
    model_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control."""
    monkeypatch.setattr(cuda_graphs, "fill_up", lambda batch, size: (fill_up(batch, size)[0], torch.ones(size.trained)))
    plain, filled = train(engine_of(model_path, device, record=None), steps=1), train(engine_of(model_path, device, record=False), steps=1)
    assert abs(filled[0][0] / plain[0][0] - 1) > 0.01


def test_several_micro_batches_and_large_ones_are_left_as_they_are(model_path: Path, device: torch.device) -> None:
    engine = engine_of(model_path, device, record=False)
    assert engine.captured is not None
    train(engine, rows=100, steps=1)
    assert engine.captured._steps == 0
    engine.captured._largest_tokens = 10
    assert engine.captured.backward(a_batch(), sft, torch.tensor(1.0)) is None


@pytest.mark.gpu
def test_recorded_steps_are_those_that_run_as_they_are_written(model_path: Path, device: torch.device) -> None:
    torch._dynamo.reset()
    written = train(engine_of(model_path, device, record=False, compiled=True))
    engine = engine_of(model_path, device, record=True, compiled=True)
    recorded = train(engine)
    assert engine.captured is not None and engine.captured._recordings
    np.testing.assert_allclose(recorded[0], written[0], rtol=1e-3)
    np.testing.assert_allclose(recorded[1], written[1], rtol=1e-2)
    plain = train(engine_of(model_path, device, record=None, compiled=True))
    np.testing.assert_allclose(recorded[0], plain[0], rtol=1.5e-2)
