"""Directories that hold something else than a model in safetensors: what is said about them."""

import json
from pathlib import Path

import pytest
import torch
from tiny import write_model
from transformers import AutoModelForCausalLM

from verl.errors import UserError
from verl.models.damage import explained
from verl.models.load import check_is_model, load_for_training, load_tokenizer, outline, resolve


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


def only_with(folder: Path, name: str) -> Path:
    """The model without its weights, and with another file in their place."""
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(b"weights")
    return folder


@pytest.mark.parametrize(
    ("name", "what", "fix"),
    [
        ("pytorch_model.bin", "only as pytorch_model.bin", "convert it once with transformers"),
        ("pytorch_model-00001-of-00002.bin", "only as pytorch_model.bin", "convert it once with transformers"),
        ("model.Q4_K_M.gguf", "the GGUF format", "give the model that the file was made from"),
        ("model_world_size_8_rank_0.pt", "a checkpoint of upstream verl", "model_merger"),
        ("consolidated.00.pth", "Meta's own format", "convert_llama_weights_to_hf"),
    ],
)
def test_weights_in_another_format_are_named_with_the_way_to_convert_them(name: str, what: str, fix: str, model: Path) -> None:
    folder = only_with(model, name)
    for load in (load_for_training, outline, load_tokenizer):
        with pytest.raises(UserError, match=what) as caught:
            load(str(folder))
        assert fix in str(caught.value.fix)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=what):
        resolve(str(folder))
    if name.endswith(".gguf"):
        with pytest.raises(UserError, match=what):
            resolve(str(folder / name))


def test_the_advice_for_pytorch_model_bin_works_as_it_stands(model: Path) -> None:
    state = load_for_training(str(model)).model.state_dict()
    only_with(model, "pytorch_model.bin")
    torch.save(state, model / "pytorch_model.bin")
    with pytest.raises(UserError) as caught:
        check_is_model(str(model))
    eval(str(caught.value.fix).partition("transformers: ")[2], {"AutoModelForCausalLM": AutoModelForCausalLM})
    loaded = load_for_training(str(model)).model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_other_files_beside_safetensors_do_no_harm(model: Path) -> None:
    (model / "pytorch_model.bin").write_bytes(b"weights")
    (model / "model.gguf").write_bytes(b"weights")
    check_is_model(str(model))
    load_for_training(str(model))


@pytest.mark.parametrize("base", ["org/base", None])
def test_an_adapter_is_no_model_but_can_be_merged_or_trained_further(base: str | None, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": base}))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    for load in (load_for_training, outline):
        with pytest.raises(UserError, match="is a LoRA adapter, not a whole model") as caught:
            load(str(tmp_path))
        fix = str(caught.value.fix)
        assert f"verl export {tmp_path}" in fix and f"model.lora_adapter_path={tmp_path}" in fix
        assert f"model.partial_pretrain={base or 'its base model'}" in fix


def test_a_whole_model_beside_its_adapter_is_a_model(model: Path) -> None:
    (model / "adapter_config.json").write_text("{}")
    check_is_model(str(model))


def test_names_on_the_hub_are_not_looked_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    check_is_model("org/model-GGUF")
    error = explained("model", "org/model-GGUF", OSError("org/model-GGUF does not appear to have a file named config.json"))
    assert "GGUF is for inference" in str(error.fix)
    error = explained("model", "org/model", OSError("org/model does not appear to have a file named model.safetensors"))
    assert "only weights in safetensors are read" in str(error.fix)
