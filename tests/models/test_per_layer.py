"""Models whose layers differ: Gemma 4 has larger heads in the layers that see the whole text."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import rl_runs
import sft_runs
import torch
from multimodal_models import TEXT
from rl_runs import write_folder
from tiny import sharp
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma4ForCausalLM, Gemma4TextConfig, PretrainedConfig

from verl.config.shared import ModelConfig
from verl.engine.decisions import Workload, choose_attention, choose_spread, decide
from verl.engine.description import describe_attention
from verl.engine.hardware import ASSUMED
from verl.engine.outline import Outline
from verl.errors import UserError
from verl.models.attention.flash import Heads
from verl.models.attention.ulysses import check_heads
from verl.models.per_layer import heads_of
from verl.plan.sizes import decoder
from verl.rollout import Sampling
from verl.rollout.hf import HfRollout
from verl.rollout.native.engine import NativeRollout

EXPERTS: dict[str, Any] = dict(enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=16, attention_k_eq_v=True)
KINDS = {"dense": {}, "experts": {**EXPERTS, "num_global_key_value_heads": 1}}
WORKLOAD = Workload(100, 10**6, 300.0, 8192)


def gemma4(**changes: Any) -> PretrainedConfig:
    own: dict[str, Any] = dict(
        hidden_size_per_layer_input=0, num_kv_shared_layers=0, layer_types=["sliding_attention", "full_attention"], sliding_window=8,
        global_head_dim=16,
    )  # fmt: skip
    return Gemma4TextConfig(**{**TEXT, **own, **changes})


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of this kind in place of the one in `rl_runs.write_folder`."""
    folder = write_folder(tmp_path_factory.mktemp("unequal"))
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    ids = {"vocab_size": len(tokenizer), "vocab_size_per_layer_input": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    sharp(Gemma4ForCausalLM, gemma4(**ids, **KINDS[request.param])).save_pretrained(folder / "model")
    return folder


def test_a_run_trains_layers_with_unequal_heads(folder: Path) -> None:
    found = sft_runs.train(folder, "sft", trainer__total_training_steps=4, optim__lr=3e-3)
    assert found[-1]["train/loss"] < found[0]["train/loss"] - 0.1
    trained = AutoModelForCausalLM.from_pretrained(folder / "sft" / "global_step_4")
    assert [layer.self_attn.head_dim for layer in trained.model.layers] == [8, 16]


def test_a_step_of_reinforcement_learning_trains_them_and_a_plan_counts_them(folder: Path) -> None:
    (found,) = rl_runs.train(folder, "rl", trainer__total_training_steps=1, rollout__name="native")
    assert found["train/grad_norm"] > 0
    assert decoder(Outline(ModelConfig(partial_pretrain=str(folder / "model")))).head_size == 16


@pytest.mark.parametrize("kind", KINDS)
def test_answers_of_the_native_engine_are_those_of_the_plain_model(kind: str) -> None:
    model = sharp(Gemma4ForCausalLM, gemma4(**KINDS[kind]))
    prompts = [[5, 9, 14, 8, 77, 103, 12, 13, 15, 16, 17, 18], [21, 4], [90, 91, 92, 93, 94]]
    sampling = Sampling(max_new_tokens=12, temperature=0.0)
    found, expected = (
        [answer.token_ids for answer in engine(model, [0]).generate(prompts, sampling)] for engine in (NativeRollout, HfRollout)
    )
    assert found == expected


def test_heads_are_those_of_every_layer_the_largest_first() -> None:
    assert heads_of(Gemma4TextConfig()) == (Heads(8, 4, 512), Heads(8, 4, 256))
    assert heads_of(gemma4(**KINDS["experts"])) == (Heads(4, 1, 16), Heads(4, 2, 8))


def test_a_kernel_is_tried_with_the_heads_that_flash_attention_has_and_the_others_are_named() -> None:
    tried: list[Heads] = []

    def refusal(kernel: str, dtype: torch.dtype, *heads: Heads) -> None:
        tried.extend(heads)

    hardware = replace(ASSUMED, refusal=refusal)
    choice = choose_attention("auto", hardware, torch.bfloat16, heads_of(Gemma4TextConfig()), WORKLOAD)
    assert set(tried) == {Heads(8, 4, 256)} and choice.too_large == (512,)
    assert "scaled dot product, one document at a time, for heads of 512 numbers" in describe_attention(choice, "cuda", torch.bfloat16)


def test_layers_with_too_large_heads_are_no_cuda_graph(folder: Path) -> None:
    settings = ModelConfig(partial_pretrain=str(folder / "model"), compile=True)
    graphs = []
    for heads in (heads_of(gemma4()), heads_of(gemma4(global_head_dim=512))):
        found = Outline(settings)
        found.__dict__["heads"] = heads
        graphs.append(decide(found, ASSUMED, WORKLOAD, choose_spread(found, ASSUMED)).graph_tokens)
    assert graphs[0] > 0 and graphs[1] == 0


def test_processes_that_share_a_document_divide_the_heads_of_every_layer() -> None:
    check_heads(gemma4(), [Heads(8, 4, 16), Heads(4, 2, 16)], 4)
    with pytest.raises(UserError, match="the 4 and 8 attention heads"):
        check_heads(gemma4(), [Heads(8, 4, 16), Heads(4, 2, 16)], 8)
