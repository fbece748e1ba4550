"""Layers with adapters as operators, beside peft's own arithmetic."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import qwen2_config, write_model
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from verl.engine.layers import compile_layers, recompute_activations
from verl.models.adapters.operators import AdaptedLinear, use_operators

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]


@pytest.fixture(scope="module", params=["qwen2", "llama"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen2 has biases at query, key and value."""
    where = tmp_path_factory.mktemp("model")
    if request.param == "qwen2":
        return write_model(where, qwen2_config(intermediate_size=176))
    config = LlamaConfig(
        hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=512
    )
    return write_model(where, config, kind=LlamaForCausalLM)


def adapted(base: Path, **settings: Any) -> Any:
    torch.manual_seed(1)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    model = get_peft_model(plain, LoraConfig(**{"r": 8, "lora_alpha": 24, "target_modules": "all-linear", **settings}))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first, where the gradients of A vanish
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def results(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    logits = model(input_ids=ids, use_cache=False).logits
    logits.log_softmax(-1)[..., 3].sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"logits": logits.detach(), **found}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name] - tensor).norm() <= 2e-5 * tensor.norm(), name


def is_operator(mlp: Any) -> bool:
    return type(mlp).forward.__module__ == "verl.models.adapters.operators"


IDS = torch.arange(3, 3 + 29 * 13, 13).remainder(512)[None]


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"], ["q_proj", "k_proj", "v_proj", "gate_proj"]])
def test_logits_and_gradients_are_those_of_peft(base: Path, targets: str | list[str]) -> None:
    model = adapted(base, target_modules=targets)
    expected = results(model, IDS)
    use_operators(model)
    assert any(isinstance(module, AdaptedLinear) for module in model.modules())
    assert is_operator(model.base_model.model.model.layers[0].mlp) == (targets == "all-linear")
    assert_same(results(model, IDS), expected)


# A compilation takes seconds: each way of compiling has one of the architectures.


@pytest.mark.parametrize("base", ["qwen2"], indirect=True)
def test_compiled_layers_have_the_logits_and_gradients_of_peft(base: Path) -> None:
    model = adapted(base)
    expected = results(model, IDS)
    use_operators(model)
    torch._dynamo.reset()
    counters.clear()
    for layer in model.base_model.model.model.layers:
        layer.compile(dynamic=True, backend="aot_eager")
    assert_same(results(model, IDS), expected)
    assert counters["stats"]["unique_graphs"] <= 2  # the first layer's input takes no gradient
    assert not counters["graph_break"]


@pytest.mark.parametrize(("base", "selective"), [("qwen2", False), ("llama", True)], indirect=["base"])
def test_checkpointed_layers_are_compiled_whole(base: Path, selective: bool) -> None:
    model = adapted(base)
    expected = results(model, IDS)
    use_operators(model, checkpointed=True)
    plain = model.base_model.model
    plain.enable_input_require_grads()
    recompute_activations(plain, selective=selective)
    torch._dynamo.reset()
    counters.clear()
    compile_layers(plain, backend="aot_eager")
    assert_same(results(model, IDS), expected)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [8, 40])
def test_on_a_gpu_in_bfloat16_they_are_as_near_to_float32_as_pefts_own(base: Path, rank: int) -> None:
    """There Triton kernels take part. 903 tokens: no multiple of a tile."""
    ids = torch.randint(512, (3, 301), generator=torch.Generator().manual_seed(5))
    model = adapted(base, r=rank, lora_alpha=rank)
    exact = {name: tensor.clone() for name, tensor in results(model, ids).items()}  # a model takes its gradients with it
    model.to("cuda", torch.bfloat16)
    of_peft = results(model, ids.cuda())
    use_operators(model)
    assert is_operator(model.base_model.model.model.layers[0].mlp)
    ours = results(model, ids.cuda())
    for name, tensor in exact.items():
        apart = [float((found[name].cpu().float() - tensor).norm() / tensor.norm()) for found in (ours, of_peft)]
        assert apart[0] <= 1.5 * apart[1] + 1e-3, (name, apart)


def test_a_wrong_scale_is_seen(base: Path) -> None:
    model = adapted(base)
    expected = results(model, IDS)
    use_operators(model)
    model.base_model.model.model.layers[1].mlp.gate_proj.scaling["default"] *= 1.01
    with pytest.raises(AssertionError):
        assert_same(results(model, IDS), expected)


@pytest.mark.parametrize("settings", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}])
def test_what_the_operators_do_not_serve_is_left_to_peft(base: Path, settings: dict[str, Any]) -> None:
    model = adapted(base, **settings).eval()
    expected = results(model, IDS)
    use_operators(model)
    assert not any(isinstance(module, AdaptedLinear) for module in model.modules())
    assert_same(results(model, IDS), expected)


def test_without_its_adapter_the_model_is_the_base_again(base: Path) -> None:
    model = adapted(base)
    use_operators(model)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    with model.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)


def test_merging_still_works(base: Path) -> None:
    model = adapted(base)
    expected = results(model, IDS)["logits"]
    use_operators(model)
    merged = deepcopy(model).merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)
