"""The twins of `verl prove`: small in every part, and unequal where the model is."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig

from verl.errors import UserError
from verl.prove import plain
from verl.prove.tokenizer import VOCABULARY
from verl.prove.twin import twin_config, write_twin

WITH_VISION = ["llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "mistral3", "internvl", "idefics3", "glm4v", "mllama"]


def twin(model_type: str, **changes: Any) -> PretrainedConfig:
    return twin_config(CONFIG_MAPPING[model_type](**changes), VOCABULARY)


@pytest.mark.parametrize("model_type", WITH_VISION)
def test_a_checkpoint_with_vision_has_a_twin_of_small_text_and_vision_parts_that_reads_text(model_type: str, tmp_path: Path) -> None:
    model = plain.load(write_twin(CONFIG_MAPPING[model_type](), tmp_path / "twin"))
    assert type(model).__name__.endswith("ForConditionalGeneration")
    assert any("vision" in name or "visual" in name for name, _ in model.named_parameters())
    assert model.num_parameters() < 3_000_000
    assert model.config.get_text_config().hidden_size == 64
    assert plain.logits(model, list(range(40))).shape == (40, VOCABULARY)


def test_an_encoder_decoder_with_vision_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="encoder-decoder"):
        write_twin(CONFIG_MAPPING["florence2"](), tmp_path / "twin")


@pytest.mark.parametrize("model_type", ["gemma4_text", "gemma4"])
def test_gemma_4_has_layers_with_heads_of_two_sizes(model_type: str) -> None:
    text = twin(model_type).get_text_config()
    others = {settings["head_dim"] for settings in text.to_dict()["per_layer_config"].values()}
    assert (text.to_dict()["head_dim"], others) == (16, {32})


@pytest.mark.parametrize(
    ("model_type", "changes", "names"),
    [
        ("mimo_v2_flash", {}, ("head_dim", "v_head_dim")),
        ("olmo_hybrid", {}, ("linear_key_head_dim", "linear_value_head_dim")),
        ("glm4_moe_lite", {}, ("qk_nope_head_dim", "v_head_dim")),
        ("deepseek_v3", {}, ("q_lora_rank", "kv_lora_rank")),
        ("minimax_m3_vl_text", {}, ("intermediate_size", "dense_intermediate_size")),
        ("opt", {"hidden_size": 1024, "word_embed_proj_dim": 512}, ("hidden_size", "word_embed_proj_dim")),
    ],
)
def test_sizes_that_differ_in_the_model_differ_in_its_twin(model_type: str, changes: dict[str, Any], names: tuple[str, str]) -> None:
    small = twin(model_type, **changes)
    one, two = (getattr(small, name) for name in names)
    assert one != two and max(one, two) <= 128


def test_the_sizes_of_layers_are_small_and_as_unequal_as_in_the_model() -> None:
    small = twin("gemma3n_text", intermediate_size=[8192, 16384] * 17 + [8192])
    assert set(small.intermediate_size) == {96, 112}


@pytest.mark.parametrize("heads", [6, 10])
def test_a_head_has_an_even_size_as_rope_needs(heads: int) -> None:
    small = twin("qwen2", hidden_size=60, num_attention_heads=heads, num_key_value_heads=heads)
    assert small.hidden_size % (2 * small.num_attention_heads) == 0


@pytest.mark.parametrize("model_type", ["roberta", "xlm", "xlnet", "blt"])
def test_a_family_with_other_names_of_its_sizes_has_a_small_twin(model_type: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"is_decoder": True} if model_type == "roberta" else {}
    model = plain.load(write_twin(CONFIG_MAPPING[model_type](**changes), tmp_path / "twin"))
    assert model.num_parameters() < 3_000_000
    assert plain.logits(model, list(range(40))).shape == (40, VOCABULARY)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*_: Any, **__: Any) -> None:
        raise ImportError("TimmWrapperModel requires the timm library but it was not found in your environment.")

    monkeypatch.setattr(AutoModelForCausalLM, "from_config", build)
    with pytest.raises(UserError, match="needs timm") as found:
        write_twin(CONFIG_MAPPING["llama"](), tmp_path / "twin")
    assert found.value.fix is not None and "install timm" in found.value.fix


def test_a_config_that_transformers_cannot_build_is_the_configs_fault_and_not_the_twins(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot build a reformer of this config.*is_decoder=True") as found:
        write_twin(CONFIG_MAPPING["reformer"](), tmp_path / "twin")
    assert found.value.fix is not None and "correct the config" in found.value.fix


def test_a_twin_that_would_be_large_names_the_size_that_is_not_known(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no small janus yet.*vision_head|no small janus yet.*vqmodel"):
        write_twin(CONFIG_MAPPING["janus"](), tmp_path / "twin")


def test_what_is_random_or_balances_routers_is_off_in_every_part_of_a_twin() -> None:
    values = json.loads(twin("qwen3_vl_moe", text_config={"attention_dropout": 0.1, "output_router_logits": True}).to_json_string())
    assert values["text_config"]["attention_dropout"] == 0 and not values["text_config"].get("output_router_logits")
