"""Master weights of one process beside the working copies that the model computes with, in bfloat16 on the CPU."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import RandomDocuments, qwen2_config, write_model
from torch import Tensor

from verl.algorithms import sft
from verl.config.shared import OptimConfig
from verl.data.loader import Packing, micro_batches
from verl.engine import checkpoint, restore
from verl.engine.checkpoint import Position
from verl.engine.engine import Engine
from verl.engine.scorers import TokenScorer
from verl.engine.weights import Sharding, Spread
from verl.models.load import load_for_training
from verl.models.shards import load_without_values

pytestmark = pytest.mark.usefixtures("process_group")

ROWS = np.arange(8)
WHOLE, SEVERAL = Packing(8, 8 * 60), Packing(1, 100)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), qwen2_config(tie_word_embeddings=True))


def engine_of(path: Path, dtype: torch.dtype = torch.bfloat16, lr: float = 1e-3, device: str = "cpu") -> Engine:
    config = OptimConfig(lr=lr, lr_scheduler="constant", warmup_steps_ratio=0.0, clip_grad=1e9)
    scorer = TokenScorer(load_for_training(str(path)).model)
    return Engine(scorer, config, total_steps=10, device=torch.device(device), compute_dtype=dtype)


def gradient(engine: Engine, packing: Packing) -> Tensor:
    engine.backward(micro_batches(RandomDocuments(), ROWS, packing), sft)
    return torch.cat([p.grad.flatten() for p in engine.trained])


def test_the_model_computes_in_bfloat16_and_the_optimizer_updates_float32(model_path: Path) -> None:
    engine = engine_of(model_path)
    assert {p.dtype for p in engine.scorer.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in engine.trained} == {torch.float32}
    names = [name for name, _ in engine.scorer.named_parameters()]
    assert list(engine.weights.trained) == names


def test_after_a_step_the_working_copies_are_the_new_masters_rounded(model_path: Path) -> None:
    engine = engine_of(model_path)
    before = [p.detach().clone() for p in engine.trained]
    engine.train_step(micro_batches(RandomDocuments(), ROWS, WHOLE), sft, 0)
    for old, master, copy in zip(before, engine.trained, engine.scorer.parameters(), strict=True):
        assert not torch.equal(old, master)
        assert torch.equal(copy, master.to(torch.bfloat16))
        assert copy.grad is None and master.grad is None


def test_every_master_moves_at_a_learning_rate_of_one_in_a_million_beside_copies_in_bfloat16(tmp_path: Path) -> None:
    engine = engine_of(write_model(tmp_path, dtype=torch.bfloat16), lr=1e-6)
    before = [p.detach().clone() for p in engine.trained]
    for step in range(3):
        engine.train_step(micro_batches(RandomDocuments(), ROWS, WHOLE), sft, step)
    moved = [not torch.equal(old, new) for old, new in zip(before, engine.trained, strict=True)]
    rounded = [not torch.equal(old.bfloat16(), new.bfloat16()) for old, new in zip(before, engine.trained, strict=True)]
    assert all(moved)
    assert not all(rounded), "weights that are rounded to bfloat16 would not be seen"


SPREADS = {"one process": Spread(), "fsdp2": Spread(sharding=Sharding(cpu_offload=True))}


@pytest.mark.parametrize(("spread", "empty"), [("one process", False), ("fsdp2", False), ("fsdp2", True)])
def test_rotary_tables_are_exact_at_position_8191_beside_weights_in_bfloat16(spread: str, empty: bool, model_path: Path) -> None:
    loaded = load_without_values(str(model_path), dtype=torch.float32) if empty else load_for_training(str(model_path))
    assert loaded is not None
    options: dict[str, Any] = {"total_steps": 1, "device": torch.device("cpu"), "compute_dtype": torch.bfloat16}
    engine = Engine(TokenScorer(loaded.model), OptimConfig(), **options, spread=SPREADS[spread], fill=loaded.fill)
    engine.train_step(micro_batches(RandomDocuments(), ROWS, WHOLE), sft, 0)
    rotary = loaded.model.model.rotary_emb
    assert rotary.inv_freq.dtype == torch.float32
    assert rotary_error(rotary) < 1e-3  # float32 rounds an angle of 8191 by up to 2.4e-4
    rotary.inv_freq = rotary.inv_freq.bfloat16()
    assert rotary_error(rotary) > 0.1, "a table in bfloat16 would not be seen"


def rotary_error(rotary: Any) -> float:
    """The largest difference of cosines and sines at position 8191 from those of float64."""
    size = 2 * len(rotary.inv_freq)
    angle_D = 8191 * 10_000 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size).repeat(2)
    cos, sin = (table[0, 0].double() for table in rotary(torch.zeros(1), torch.tensor([[8191]])))
    return max((cos - angle_D.cos()).abs().max().item(), (sin - angle_D.sin()).abs().max().item())


def test_gradients_are_added_up_over_micro_batches_in_float32(model_path: Path) -> None:
    exact = gradient(engine_of(model_path, torch.float32), WHOLE)
    found = gradient(engine_of(model_path), SEVERAL)
    assert found.dtype == torch.float32
    assert (found - exact).norm() / exact.norm() < 2e-2
    only_last = gradient_of_last(engine_of(model_path))
    assert (only_last - exact).norm() / exact.norm() > 0.1, "a step that forgot all but one micro-batch would not be seen"


def test_the_gradients_of_a_single_micro_batch_are_taken_as_they_are(model_path: Path) -> None:
    engine = engine_of(model_path)
    engine.backward(micro_batches(RandomDocuments(), ROWS, WHOLE), sft)
    assert {p.grad.dtype for p in engine.trained} == {torch.bfloat16}
    assert all(p.grad is None for p in engine.scorer.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("packing", [WHOLE, SEVERAL])
def test_on_a_gpu_the_optimizer_writes_the_working_copies(packing: Packing, model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The norm before clipping is that of float32, and nothing but the optimizer writes the copies."""
    exact = gradient(engine_of(model_path, torch.float32), WHOLE).norm()
    engine = engine_of(model_path, device="cuda")
    monkeypatch.setattr(engine.weights, "publish", lambda: pytest.fail("the copies were written twice"))
    before = [p.detach().clone() for p in engine.trained]
    for step in range(3):
        metrics = engine.train_step(micro_batches(RandomDocuments(), ROWS, packing), sft, step)
        assert step > 0 or metrics["grad_norm"].item() == pytest.approx(exact.item(), rel=2e-2)
    for old, master, copy in zip(before, engine.trained, engine.scorer.parameters(), strict=True):
        assert not torch.equal(old, master) and master.dtype == torch.float32
        assert torch.equal(copy, master.to(torch.bfloat16))
        assert copy.grad is None and master.grad is None


def gradient_of_last(engine: Engine) -> Tensor:
    original = engine.weights.collect

    def forget() -> None:
        for p in engine.trained:
            p.grad = None
        original()

    engine.weights.collect = forget
    return gradient(engine, SEVERAL)


def test_what_is_written_out_are_the_masters_and_tied_weights_stay_tied(model_path: Path) -> None:
    engine = engine_of(model_path)
    model = engine.scorer.model
    engine.train_step(micro_batches(RandomDocuments(), ROWS, WHOLE), sft, 0)
    with engine.weights.in_model():
        assert all(a is b for a, b in zip(engine.scorer.parameters(), engine.trained, strict=True))
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert {p.dtype for p in engine.scorer.parameters()} == {torch.bfloat16}
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_a_resumed_engine_computes_with_the_weights_of_the_checkpoint(model_path: Path, tmp_path: Path) -> None:
    batches = micro_batches(RandomDocuments(), ROWS, WHOLE)
    engine = engine_of(model_path)
    engine.train_step(batches, sft, 0)
    where = Position(step=1, tokens=0, supervised_tokens=0, rows=8, rows_per_step=8, seed=1, data_fingerprint="f")
    saved = checkpoint.save(tmp_path, engine, where, export=lambda directory: None)
    resumed = engine_of(model_path)
    restore.load(saved, resumed)
    for found, expected in zip(resumed.scorer.parameters(), engine.scorer.parameters(), strict=True):
        assert torch.equal(found, expected)
    assert torch.equal(resumed.train_step(batches, sft, 1)["loss"], engine.train_step(batches, sft, 1)["loss"])
