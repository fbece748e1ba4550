"""Experts are computed in one grouped product, which gives what the loop over experts gives: plain, recomputed, with adapters."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import relative
from tiny import VOCABULARY, RandomDocuments, write_model
from torch import Tensor
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Ernie4_5_MoeConfig,
    Ernie4_5_MoeForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    JetMoeConfig,
    JetMoeForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from verl.algorithms import sft
from verl.config.shared import ModelConfig, OptimConfig
from verl.data.loader import Packing, micro_batches
from verl.engine.engine import Engine
from verl.engine.layers import recompute_activations
from verl.engine.scorers import TokenScorer
from verl.models.adapters.lora import add_adapters
from verl.models.experts import describe_experts
from verl.models.load import load_for_training

SHAPE: dict[str, Any] = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
)
# More experts than some documents have tokens, so that some experts get none.
FAMILIES: dict[type[PreTrainedModel], Any] = {
    MixtralForCausalLM: MixtralConfig(**SHAPE, num_local_experts=16),
    Qwen2MoeForCausalLM: Qwen2MoeConfig(**SHAPE, num_experts=16, moe_intermediate_size=24, shared_expert_intermediate_size=16),
    DeepseekV3ForCausalLM: DeepseekV3Config(
        **{**SHAPE, "num_key_value_heads": 4},
        n_routed_experts=16,
        n_group=4,
        topk_group=2,
        num_experts_per_tok=4,
        moe_intermediate_size=24,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    ),
    Ernie4_5_MoeForCausalLM: Ernie4_5_MoeConfig(**SHAPE, moe_num_experts=16, moe_k=3, moe_intermediate_size=24, moe_layer_start_index=0),
}
WAYS = ("plain", "recomputed", "selective", "adapters")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("experts")


def loss_and_gradient(path: Path, implementation: str | None, way: str) -> tuple[float, Tensor]:
    model = load_for_training(str(path)).model
    if implementation is not None:
        model.set_experts_implementation(implementation)
    else:
        assert describe_experts(model) == ", experts in one grouped product"
    if way == "adapters":
        add_adapters(model, ModelConfig(lora_rank=4), compute_dtype=torch.float32, seed=1)
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        adapted = any(".experts." in name and p.requires_grad for name, p in model.named_parameters())
        assert adapted or not isinstance(model, MixtralForCausalLM)
    elif way != "plain":
        recompute_activations(model, selective=way == "selective")
    engine = Engine(TokenScorer(model), OptimConfig(), total_steps=1, device=torch.device("cpu"), compute_dtype=torch.float32)
    batches = micro_batches(RandomDocuments(), np.arange(8), Packing(1, 100))
    loss = engine.backward(batches, sft)["loss"]
    return float(loss), torch.cat([p.grad.flatten() for p in engine.trained if p.grad is not None])


@pytest.mark.filterwarnings("ignore:The following:RuntimeWarning")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", FAMILIES, ids=lambda kind: kind.__name__)
def test_the_grouped_product_gives_what_the_loop_gives(kind: type[PreTrainedModel], way: str, folder: Path) -> None:
    path = folder / kind.__name__
    if not path.exists():
        write_model(path, FAMILIES[kind], kind=kind)
    loss, gradient = loss_and_gradient(path, None, way)
    expected_loss, expected = loss_and_gradient(path, "eager", way)
    assert loss == pytest.approx(expected_loss, abs=1e-6) and relative(gradient, expected) < 1e-5


def test_what_has_no_grouped_form_is_named() -> None:
    small = {name: value for name, value in SHAPE.items() if name != "num_attention_heads"}
    with torch.device("meta"):
        jetmoe = JetMoeForCausalLM(JetMoeConfig(**small, num_local_experts=4, num_experts_per_tok=2))
        grouped = GptOssForCausalLM(GptOssConfig(**SHAPE, head_dim=8, num_local_experts=4))
    assert describe_experts(jetmoe) == ", experts by the code of JetMoeForCausalLM, which has no grouped form"
    assert describe_experts(grouped) == ", experts in one grouped product"
