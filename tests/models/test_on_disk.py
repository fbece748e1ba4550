"""A saved model has the names, dtypes and tensors of the files that it was loaded from, also where transformers has others in memory."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from verl.config.commands import ExportConfig
from verl.config.load import load_config
from verl.models import export as exporting
from verl.models import on_disk, saved
from verl.models.heads import load_reward_model
from verl.models.load import load_for_training
from verl.models.shards import load_without_values
from verl.models.tiny import tiny_tokenizer

pytestmark = pytest.mark.usefixtures("process_group")

IDS = torch.arange(3, 23)[None]
SMALL: dict[str, Any] = dict(
    vocab_size=448, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
    max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"tie_word_embeddings": True},
    # Experts are stacked in memory; layer 61 of the real model predicts a second token, and is not loaded.
    "deepseek_v3": dict(
        moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1, first_k_dense_replace=1,
        q_lora_rank=None, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, tie_word_embeddings=False,
    ),
    # block_sparse_moe is mlp in memory, and w1 and w3 are one tensor.
    "minimax_m2": dict(head_dim=8, num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=False),
}  # fmt: skip
PASSED_OVER = "model.layers.61.eh_proj.weight"


def config(name: str) -> Any:
    return AutoConfig.for_model(name, **{**SMALL, **FAMILIES[name]})


@pytest.fixture(scope="module", params=FAMILIES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(request.param, tmp_path_factory.mktemp("base") / request.param)


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write("deepseek_v3", tmp_path_factory.mktemp("base") / "deepseek_v3")


def write(name: str, folder: Path) -> Path:
    """A model in bfloat16 and float32, as many have biases and norms, with a head that transformers does not load if it knows of one."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config(name)).to(torch.bfloat16).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for number, key in enumerate(sorted(tensors)):
        if "bias" in key or "norm" in key or number % 7 == 3:
            tensors[key] = tensors[key].float() + 0.01 * torch.rand(tensors[key].shape)
    if name == "deepseek_v3":
        tensors[PASSED_OVER] = torch.randn(3, 5).to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tiny_tokenizer(["to be or not to be"], vocab_size=400).save_pretrained(folder)
    return folder


def files(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert {name: tensor.dtype for name, tensor in found.items()} == {name: tensor.dtype for name, tensor in expected.items()}
    assert all(torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)) for name, tensor in expected.items())


@torch.no_grad()
def logits(folder: Path) -> Tensor:
    result: Tensor = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(input_ids=IDS).logits
    return result


@pytest.mark.parametrize("size", ["50GB", "20KB"], ids=["one file", "shards"])
def test_a_model_that_was_not_trained_is_saved_byte_for_byte(size: str, base: Path, tmp_path: Path) -> None:
    loaded = load_for_training(str(base))
    saved.export_model(tmp_path, loaded.model, loaded.saved_dtypes, max_shard_size=size)
    same(files(tmp_path), files(base))
    assert torch.equal(logits(tmp_path), logits(base))
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    if size == "50GB":
        assert shards == ["model.safetensors"]
    else:
        assert len(shards) > 1 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == files(base).keys()
        assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in files(base).values())


def test_the_dtype_of_most_weights_would_be_wrong_for_renamed_ones(tmp_path: Path) -> None:
    """Negative control: dtypes by names in memory alone."""
    base = write("minimax_m2", tmp_path / "base")
    loaded = load_for_training(str(base))
    (tmp_path / "out").mkdir()
    saved.export_model(tmp_path / "out", loaded.model, dict.fromkeys(loaded.saved_dtypes, torch.bfloat16))
    found, expected = files(tmp_path / "out"), files(base)
    wrong = [name for name, tensor in expected.items() if found[name].dtype != tensor.dtype]
    assert any("experts" in name for name in wrong)
    assert {torch.float32, torch.bfloat16} == {loaded.saved_dtypes[n] for n in loaded.saved_dtypes if "experts" in n or "norm" in n}


def test_an_export_keeps_what_is_not_loaded_and_says_so(deepseek: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exporting.export(load_config(ExportConfig, exporting.keyed([str(deepseek), str(tmp_path / "out"), "dtype=float32"])))
    assert f"not trained, and saved as in the model's files: 1 tensor (15 bytes): {PASSED_OVER.replace('61', '*')}" in (
        capsys.readouterr().out
    )
    found = files(tmp_path / "out")
    assert {tensor.dtype for name, tensor in found.items() if name != PASSED_OVER} == {torch.float32}
    assert torch.equal(found[PASSED_OVER].view(torch.uint8), files(deepseek)[PASSED_OVER].view(torch.uint8))


def test_a_reward_model_keeps_no_head_of_a_language_model(tmp_path: Path) -> None:
    base = write("qwen2", tmp_path / "base")
    tensors = files(base)
    tensors["mtp.head.weight"] = torch.ones(2)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    loaded = load_reward_model(str(base))
    (tmp_path / "out").mkdir()
    saved.export_model(tmp_path / "out", loaded.model, loaded.saved_dtypes)
    assert not any(name.startswith("mtp") for name in files(tmp_path / "out"))


def test_a_sharded_model_keeps_the_names_of_its_files(tmp_path: Path) -> None:
    """Files with the names that transformers has in memory are read without conversions, and written without any."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config("minimax_m2"))
    model.save_pretrained(tmp_path / "base", save_original_format=False)
    loaded = load_without_values(str(tmp_path / "base"), dtype=torch.float32)
    assert loaded is not None and loaded.fill is not None
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    (tmp_path / "out").mkdir()
    on_disk.write_weights(tmp_path / "out", loaded.model, weights, loaded.saved_dtypes, "50GB")
    same(files(tmp_path / "out"), files(tmp_path / "base"))


def test_old_files_of_a_computed_buffer_are_not_kept(tmp_path: Path) -> None:
    base = write("qwen2", tmp_path / "base")
    tensors = files(base)
    tensors["model.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    loaded = load_for_training(str(base))
    assert not getattr(loaded.saved_dtypes, "passed_over")  # noqa: B009, of a plain dictionary for type checkers
