"""The arithmetic that is counted for a step against the matrix products that PyTorch sees in one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import VOCABULARY, RandomDocuments, qwen2_config, write_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from verl.algorithms import sft
from verl.config.shared import ModelConfig, OptimConfig
from verl.data.loader import Loader, Packing
from verl.engine.engine import Engine
from verl.engine.hardware import peak_flops
from verl.engine.outline import count, training_flops
from verl.engine.scorers import TokenScorer
from verl.models.adapters.lora import add_adapters
from verl.models.experts import active_parameters, describe_parameters
from verl.models.load import load_for_training


def stated_by_counted(model: PreTrainedModel) -> float:
    """`training_flops` of a step, divided by the FLOP of its matrix products that PyTorch counts."""
    engine = Engine(TokenScorer(model), OptimConfig(), total_steps=1, device=torch.device("cpu"), compute_dtype=torch.float32)
    (step,) = Loader(RandomDocuments(8), Packing(8, 480), rows_per_step=8, seed=1).steps(0, 1)
    with FlopCounterMode(display=False) as counter:
        engine.backward(step.micro_batches, sft)
    products = sum(flop for op, flop in counter.get_flop_counts()["Global"].items() if "mm" in str(op) and "bmm" not in str(op))
    tokens = sum(batch.input_ids_T.numel() for batch in step.micro_batches)
    return float(training_flops(model)(tokens, step.trained_tokens) / products)


@pytest.mark.parametrize("rank", [None, 4])
def test_the_flop_of_a_step_are_those_of_its_matrix_products(rank: int | None, tmp_path: Path) -> None:
    """Frozen weights take no gradient. That the first layer's do not even hand one on is the 5% that adapters are let off."""
    path = write_model(tmp_path / "model", qwen2_config(num_hidden_layers=12))
    model = load_for_training(str(path)).model
    if rank is not None:
        add_adapters(model, ModelConfig(lora_rank=rank), compute_dtype=torch.float32, seed=1)
    assert stated_by_counted(model) == pytest.approx(1.0, rel=0.01 if rank is None else 0.05)


@pytest.mark.parametrize("kind", [MixtralForCausalLM, Qwen2MoeForCausalLM], ids=["experts", "experts and a shared one"])
def test_of_a_mixture_of_experts_only_the_active_weights_count(kind: type[PreTrainedModel], tmp_path: Path) -> None:
    model = load_for_training(str(write_model(tmp_path / "model", mixture(kind), kind=kind))).model
    model.set_experts_implementation("eager")  # whose products PyTorch counts
    assert stated_by_counted(model) == pytest.approx(1.0, rel=0.02)
    everything = sum(p.numel() for p in model.parameters())
    assert active_parameters(model) < 0.6 * everything and "active)" in describe_parameters(everything, model)


def mixture(kind: type[PreTrainedModel]) -> PretrainedConfig:
    shape: dict[str, Any] = dict(vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)
    if kind is MixtralForCausalLM:
        return MixtralConfig(**shape, intermediate_size=128, num_local_experts=8, num_experts_per_tok=2)
    experts: dict[str, Any] = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=128, shared_expert_intermediate_size=64)
    return Qwen2MoeConfig(**shape, **experts, mlp_only_layers=[1], intermediate_size=96)


def test_active_parameters_are_those_that_a_model_is_published_with() -> None:
    """Qwen3-30B-A3B: 30.5 billion parameters; 3.353 billion are active, which its card cuts off to 3.3."""
    shape: dict[str, Any] = dict(vocab_size=151_936, hidden_size=2048, num_hidden_layers=48, num_attention_heads=32, head_dim=128)
    config = Qwen3MoeConfig(**shape, num_key_value_heads=4, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768)
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(config)
    assert describe_parameters(sum(p.numel() for p in model.parameters()), model) == "30,532,122,624 parameters (30.5B, 3.4B active)"


def test_a_model_without_experts_is_described_by_one_number() -> None:
    with torch.device("meta"):
        model = Qwen2ForCausalLM(qwen2_config())
    assert describe_parameters(494_032_768, model) == "494,032,768 parameters" and active_parameters(model) == count(model)


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
