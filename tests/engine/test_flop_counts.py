"""The arithmetic that is counted for a step against the matrix products that PyTorch sees in one."""

from pathlib import Path

import pytest
import torch
from tiny import RandomDocuments, qwen2_config, write_model
from torch.utils.flop_counter import FlopCounterMode

from verl.algorithms import sft
from verl.config.shared import ModelConfig, OptimConfig
from verl.data.loader import Loader, Packing
from verl.engine.engine import Engine
from verl.engine.hardware import peak_flops
from verl.engine.outline import training_flops
from verl.engine.scorers import TokenScorer
from verl.models.adapters.lora import add_adapters
from verl.models.load import load_for_training


@pytest.mark.parametrize("rank", [None, 4])
def test_the_flop_of_a_step_are_those_of_its_matrix_products(rank: int | None, tmp_path: Path) -> None:
    """Frozen weights take no gradient. That the first layer's do not even hand one on is the 5% that adapters are let off."""
    path = write_model(tmp_path / "model", qwen2_config(num_hidden_layers=12))
    model = load_for_training(str(path)).model
    if rank is not None:
        add_adapters(model, ModelConfig(lora_rank=rank), compute_dtype=torch.float32, seed=1)
    engine = Engine(TokenScorer(model), OptimConfig(), total_steps=1, device=torch.device("cpu"), compute_dtype=torch.float32)
    (step,) = Loader(RandomDocuments(8), Packing(8, 480), rows_per_step=8, seed=1).steps(0, 1)
    with FlopCounterMode(display=False) as counter:
        engine.backward(step.micro_batches, sft)
    products = sum(flop for op, flop in counter.get_flop_counts()["Global"].items() if "mm" in str(op) and "bmm" not in str(op))
    tokens = sum(batch.input_ids_T.numel() for batch in step.micro_batches)
    assert training_flops(model)(tokens, step.trained_tokens) == pytest.approx(products, rel=0.01 if rank is None else 0.05)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", None),
        ("NVIDIA GeForce RTX 4090D", None),
    ],
)
def test_a_gpu_has_the_peak_of_its_own_name(name: str, peak: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert peak_flops(torch.device("cuda")) == peak
