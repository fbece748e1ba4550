"""GGUF files. llama.cpp's own converter is used where LLAMA_CPP or PATH has it; the other tests have a stand-in for it, labelled so."""

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from tiny import write_model
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from verl.config.commands import ExportConfig, keyed
from verl.config.load import load_config
from verl.errors import UserError
from verl.models import export as exporting
from verl.models import gguf

# A stand-in for llama.cpp's converter: it takes the same words, and writes no model.
STAND_IN = """
import json, pathlib, sys
folder, _, out, _, kind = sys.argv[1:]
assert json.loads((pathlib.Path(folder) / "config.json").read_text())["architectures"]
pathlib.Path(out).write_bytes(b"GGUF" + kind.encode())
"""
HAS_CONVERTER = bool(os.environ.get(gguf.VARIABLE)) or any(map(shutil.which, gguf.NAMES))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with a tokenizer whose kind the converter knows from its file: BPE that falls back to bytes, as in Llama 2."""
    folder = tmp_path_factory.mktemp("gguf") / "model"
    config = LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    write_model(folder, config, kind=LlamaForCausalLM)
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz0123456789"]
    backend = Tokenizer(models.BPE({word: n for n, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    GenerationConfig(eos_token_id=2).save_pretrained(folder)
    return folder


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / gguf.NAMES[0]).write_text(STAND_IN)
    monkeypatch.setenv(gguf.VARIABLE, str(tmp_path))
    return tmp_path / gguf.NAMES[0]


def export(*words: object) -> Path:
    return exporting.export(load_config(ExportConfig, keyed([str(word) for word in words])))


@pytest.mark.skipif(not HAS_CONVERTER, reason="needs llama.cpp's convert_hf_to_gguf.py: LLAMA_CPP=path/to/llama.cpp")
def test_llama_cpps_own_converter_writes_the_models_weights_and_template(model: Path, tmp_path: Path) -> None:
    export(model, "--gguf", tmp_path / "model.gguf", "gguf_type=f32")
    content = (tmp_path / "model.gguf").read_bytes()
    assert content.startswith(gguf.MAGIC) and b"{% for m in messages %}" in content
    weight = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).model.layers[1].mlp.down_proj.weight
    assert weight.detach().numpy().tobytes() in content


def test_what_is_exported_is_converted_with_the_words_that_the_converter_takes(model: Path, tmp_path: Path, stand_in: Path) -> None:
    export(model, tmp_path / "out", "--gguf", tmp_path / "model.gguf", "gguf_type=q8_0")
    assert (tmp_path / "model.gguf").read_bytes() == b"GGUFq8_0" and (tmp_path / "out" / "model.safetensors").is_file()
    export(tmp_path / "out", "--gguf", tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == b"GGUFauto"


def test_a_converter_that_fails_leaves_no_file_and_is_quoted(model: Path, tmp_path: Path, stand_in: Path) -> None:
    stand_in.write_text("import pathlib, sys; pathlib.Path(sys.argv[3]).write_bytes(b'GGUF'); raise KeyError('a tensor')")
    with pytest.raises(UserError, match="converter failed: KeyError: 'a tensor'\n  fix: see what it says: "):
        export(model, "--gguf", tmp_path / "model.gguf")
    stand_in.write_text("import a_package_that_is_not_here")
    with pytest.raises(UserError, match=rf"No module named 'a_package_that_is_not_here'\n  fix: install it for {sys.executable}"):
        export(model, "--gguf", tmp_path / "model.gguf")
    assert not list(tmp_path.glob("*.gguf")) and not list(tmp_path.glob(".*.gguf"))


def test_a_converter_on_the_path_is_run_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "convert_hf_to_gguf.py"
    program.write_text(f"#!{sys.executable}\n")
    program.chmod(0o755)
    monkeypatch.delenv(gguf.VARIABLE, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gguf.find_converter() == [str(program)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("there.gguf", "exists\n  fix: choose a new name"),
        ("no/such/x.gguf", "there is no folder"),
        ("model.bin", r"does not end in \.gguf\n  fix: model\.gguf"),
    ],
)
def test_a_file_that_cannot_be_written_is_said_first(name: str, message: str, model: Path, tmp_path: Path, stand_in: Path) -> None:
    (tmp_path / "there.gguf").write_bytes(b"mine")
    with pytest.raises(UserError, match=message):
        export(model, tmp_path / "out", f"gguf={tmp_path / name}")
    assert not (tmp_path / "out").exists() and (tmp_path / "there.gguf").read_bytes() == b"mine"


def test_a_missing_converter_is_said_with_how_to_get_it(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(gguf.VARIABLE, raising=False)
    with pytest.raises(UserError, match=r"is not installed\n  fix: git clone .*llama\.cpp"):
        export(model, tmp_path / "out", "--gguf", tmp_path / "model.gguf")
    monkeypatch.setenv(gguf.VARIABLE, str(tmp_path))
    with pytest.raises(UserError, match=r"LLAMA_CPP=.*: there is no convert_hf_to_gguf\.py"):
        export(model, "--gguf", tmp_path / "model.gguf")
