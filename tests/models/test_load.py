"""Models go from the file to their device once, in the dtype they are to have, and what they were on disk is remembered."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from decided import decided
from reward_models import write_reward_model
from safetensors.torch import load_file, save_file
from tiny import qwen2_config, write_model
from transformers import PreTrainedModel, Qwen2ForCausalLM, Qwen2ForSequenceClassification, RwkvConfig, RwkvForCausalLM

from verl.config.shared import ModelConfig, OptimConfig
from verl.engine.build import build
from verl.errors import UserError
from verl.models.damage import check_tokenizer_files
from verl.models.inference import load_for_inference
from verl.models.load import load_for_training, load_tokenizer
from verl.models.saved import export_model
from verl.models.tiny import tiny_tokenizer

NORMS = ("norm.weight", "layernorm.weight")


def write_mixed_model(directory: Path) -> dict[str, torch.Tensor]:
    """A model of bfloat16 weights and float32 norms, whose norms bfloat16 could not hold."""
    file = write_model(directory, qwen2_config(tie_word_embeddings=True), dtype=torch.bfloat16) / "model.safetensors"
    weights = {name: tensor.float() + 1e-4 if name.endswith(NORMS) else tensor for name, tensor in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    return weights


def split(directory: Path) -> None:
    """The weights in two files and an index, as large models have them."""
    whole = directory / "model.safetensors"
    weights = sorted(load_file(whole).items())
    whole.unlink()
    half = len(weights) // 2
    files = {"model-00001-of-00002.safetensors": weights[:half], "model-00002-of-00002.safetensors": weights[half:]}
    for name, part in files.items():
        save_file(dict(part), directory / name, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: name for name, part in files.items() for key, _ in part}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("parts", [1, 2])
def test_a_model_of_two_dtypes_is_read_exactly_and_written_as_it_was(parts: int, tmp_path: Path) -> None:
    weights = write_mixed_model(tmp_path / "mixed")
    if parts == 2:
        split(tmp_path / "mixed")
    loaded = load_for_training(str(tmp_path / "mixed"))
    read = loaded.model.state_dict()
    assert {tensor.dtype for tensor in read.values()} == {torch.float32}
    assert all(torch.equal(read[name], tensor.float()) for name, tensor in weights.items())
    export_model(tmp_path / "saved", loaded.model, loaded.saved_dtypes)
    written = load_file(tmp_path / "saved" / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in written.items()} == {name: tensor.dtype for name, tensor in weights.items()}
    assert all(torch.equal(written[name], tensor) for name, tensor in weights.items())


def test_a_tied_output_layer_has_the_dtype_of_the_embedding_it_shares(tmp_path: Path) -> None:
    write_mixed_model(tmp_path / "mixed")
    saved_dtypes = load_for_training(str(tmp_path / "mixed")).saved_dtypes
    assert saved_dtypes["lm_head.weight"] == saved_dtypes["model.embed_tokens.weight"] == torch.bfloat16
    assert saved_dtypes["model.norm.weight"] == torch.float32


@pytest.mark.parametrize("stated", ["bfloat16", None])
def test_the_config_keeps_the_dtype_of_the_file(stated: str | None, tmp_path: Path) -> None:
    path = write_model(tmp_path / "model", dtype=torch.bfloat16)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "dtype": stated}))
    assert load_for_training(str(path)).model.config.dtype == torch.bfloat16


def test_weights_of_bfloat16_may_stay_so_while_positions_are_computed_in_float32(tmp_path: Path) -> None:
    path = str(write_model(tmp_path / "model"))
    narrow, wide = (load_for_training(path, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    assert {parameter.dtype for parameter in narrow.model.parameters()} == {torch.bfloat16}
    assert set(narrow.saved_dtypes.values()) == {torch.float32}
    frequencies = [dict(loaded.model.named_buffers())["model.rotary_emb.inv_freq"] for loaded in (narrow, wide)]
    assert frequencies[0].dtype == torch.float32 and torch.equal(*frequencies)


def test_embeddings_beyond_the_tokenizers_tokens_are_kept(process_group: None, tmp_path: Path) -> None:
    """Models have more rows than tokens, because their makers round the number up."""
    path, tokenizer = write_model(tmp_path / "model"), tiny_tokenizer(["to be or not to be"], vocab_size=400)
    settings = ModelConfig(partial_pretrain=str(path))
    built = build(settings, OptimConfig(), tokenizer, decided(settings), stop_ids=[1], seed=1)
    (tmp_path / "saved").mkdir()
    built.export(tmp_path / "saved")
    before, after = (load_file(folder / "model.safetensors")["model.embed_tokens.weight"] for folder in (path, tmp_path / "saved"))
    assert len(tokenizer) < len(before) and torch.equal(before, after)
    # The wrong way: as many rows as the tokenizer has tokens.
    built.loaded.model.resize_token_embeddings(len(tokenizer))
    export_model(tmp_path / "resized", built.loaded.model, built.loaded.saved_dtypes)
    assert load_file(tmp_path / "resized" / "model.safetensors")["model.embed_tokens.weight"].shape != before.shape


def test_inference_takes_the_dtype_of_the_file_or_the_one_asked_for(tmp_path: Path) -> None:
    path = str(write_model(tmp_path / "model", dtype=torch.bfloat16))
    assert load_for_inference(path, device="cpu").dtype == torch.bfloat16
    assert load_for_inference(path, device="cpu", dtype=torch.float32).dtype == torch.float32


PEAK = """
import sys, threading, time, torch
from verl.models.load import load_for_training, load_tokenizer
def anonymous():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))
def watch():
    while not done.wait(0.002):
        seen.append(anonymous())
load_for_training(sys.argv[1], device=sys.argv[3])  # imports what is imported late
small, seen, done = anonymous(), [], threading.Event()
threading.Thread(target=watch, daemon=True).start()
model = load_for_training(sys.argv[2], device=sys.argv[3]).model
if len(sys.argv) > 4:
    copy = {name: tensor.cpu().clone() for name, tensor in model.state_dict().items()}
done.set()
size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
print((max([*seen, anonymous()]) - small) / size)
"""


def host_memory_of_loading(tmp_path: Path, *more: str, device: str = "cpu") -> float:
    """The host memory that a process needs to load 150 MB of float32 weights from bfloat16, as a share of the weights.

    Pages of the file itself that are mapped into memory are not counted: they are the system's cache, and given up at need.
    """
    little = write_model(tmp_path / "little")
    config = qwen2_config(hidden_size=512, intermediate_size=2048, num_hidden_layers=8, vocab_size=16_000)
    model = write_model(tmp_path / "model", config, dtype=torch.bfloat16)
    command = [sys.executable, "-c", PEAK, str(little), str(model), device, *more]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


needs_proc = pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from /proc/self/status")


@needs_proc
def test_loading_needs_the_memory_of_the_weights_once(tmp_path: Path) -> None:
    assert host_memory_of_loading(tmp_path) < 1.3


@needs_proc
def test_a_second_copy_shows(tmp_path: Path) -> None:
    """Negative control of the memory of loading."""
    assert host_memory_of_loading(tmp_path, "and a copy") > 1.7


@needs_proc
@pytest.mark.gpu
def test_loading_to_a_gpu_needs_little_memory_of_the_host(tmp_path: Path) -> None:
    assert host_memory_of_loading(tmp_path, device="cuda") < 0.7


@pytest.mark.parametrize(
    ("kind", "cut", "said"),
    [
        (Qwen2ForSequenceClassification, (), "is a reward model or a critic"),
        (Qwen2ForCausalLM, ("layers.1.mlp",), r"\d weights of Qwen2ForCausalLM are missing, such as model\.layers\.1\.mlp\."),
    ],
)
def test_weights_that_the_file_lacks_are_not_drawn_at_random(
    kind: type[PreTrainedModel], cut: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    file = write_model(tmp_path, qwen2_config(tie_word_embeddings=False), kind=kind) / "model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if not any(c in name for c in cut)}, file, {"format": "pt"})
    for load in (lambda: load_for_training(str(tmp_path)), lambda: load_for_inference(str(tmp_path), device="cpu")):
        with pytest.raises(UserError, match=said):
            load()


def test_a_reward_model_is_not_taken_for_a_language_model(tmp_path: Path) -> None:
    path = str(write_reward_model(tmp_path / "judge"))
    for load in (load_for_training, partial(load_for_inference, device="cpu")):
        with pytest.raises(
            UserError, match=r"judge: is a reward model or a critic \(Qwen2ForSequenceClassification\), not a language model"
        ):
            load(path)


def test_evaluation_leaves_the_weights_as_they_are(tmp_path: Path) -> None:
    """RWKV divides the weights of its later layers in evaluation, and would be saved and trained as it is then."""
    RwkvForCausalLM(
        RwkvConfig(vocab_size=64, hidden_size=32, attention_hidden_size=32, num_hidden_layers=3, rescale_every=1)
    ).save_pretrained(tmp_path)
    ids = torch.arange(3, 20)[None]
    expected = RwkvForCausalLM.from_pretrained(tmp_path).train()(ids).logits
    model = load_for_training(str(tmp_path), device=torch.device("cpu"), dtype=torch.float32).model.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert torch.allclose(model(input_ids=ids).logits, expected, atol=1e-6)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_large_numbers_in_a_tokenizers_settings_are_no_token_ids(tmp_path: Path) -> None:
    """A tokenizer without a limit has this `model_max_length`, as transformers writes it."""
    tiny_tokenizer(["two words"], vocab_size=300).save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "model_max_length": int(1e30)}))
    check_tokenizer_files(str(tmp_path))
    file.write_text(json.dumps({**settings, "added_tokens_decoder": {str(10**9): {"content": "<x>"}}}))
    with pytest.raises(UserError, match="has the token id 1000000000"):
        check_tokenizer_files(str(tmp_path))


WRONG: dict[str, tuple[dict[str, Any], str, str]] = {
    "too few kinds of layers": (
        {"layer_types": ["full_attention"]},
        "`num_hidden_layers` (2) must be equal to the number of `layer_types` (1)",
        "correct num_hidden_layers or layer_types",
    ),
    "no heads": ({"num_attention_heads": None}, "num_attention_heads is null, expected int", "correct num_attention_heads"),
    "no epsilon": ({"rms_norm_eps": None}, "rms_norm_eps is null, expected float", "correct rms_norm_eps"),
    "an unknown activation": ({"hidden_act": "nonsense"}, "hidden_act is 'nonsense', which transformers", "correct hidden_act"),
    "an unknown rope": (
        {"rope_parameters": {"rope_type": "foo", "rope_theta": 1e4}},
        "rope_parameters.rope_type is 'foo', which transformers",
        "correct rope_parameters.rope_type",
    ),
    "half a rope": (
        {"rope_parameters": {"rope_type": "yarn"}},
        "Missing required keys in `rope_parameters` for 'rope_type'='yarn': {'factor'}",
        "correct rope_parameters",
    ),
    "no base of the rope": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": None}},
        "rope_parameters.rope_theta is null, with which its code fails (TypeError: unsupported operand",
        "correct rope_parameters.rope_theta",
    ),
    "padding beyond the vocabulary": (
        {"pad_token_id": 4096, "vocab_size": 100},
        "pad_token_id is 4096, which is not within vocab_size 100",
        "correct vocab_size or pad_token_id",
    ),
    "no type": ({"model_type": None}, "has no model_type", "add model_type"),
    "an unknown type": ({"model_type": "foo9"}, "model_type is 'foo9', which transformers", "correct model_type"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_value_in_a_config_is_named_with_its_file_and_key(name: str, tmp_path: Path) -> None:
    changes, what, fix = WRONG[name]
    write_model(tmp_path, qwen2_config(tie_word_embeddings=True))
    config = {**json.loads((tmp_path / "config.json").read_text()), **changes}
    (tmp_path / "config.json").write_text(json.dumps({key: value for key, value in config.items() if (key, value) != ("model_type", None)}))
    with pytest.raises(UserError) as caught:
        load_for_training(str(tmp_path))
    error = caught.value
    assert error.where == str(tmp_path / "config.json") and "\n" not in error.what
    assert what in error.what and (error.fix or "").startswith(fix)


def test_the_tokenizer_reads_the_config_too_and_says_the_same(tmp_path: Path) -> None:
    write_model(tmp_path, qwen2_config())
    tiny_tokenizer(["to be or not to be"], vocab_size=300).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "rms_norm_eps": None}))
    with pytest.raises(UserError, match=r"config\.json: rms_norm_eps is null, expected float\n  fix: correct rms_norm_eps"):
        load_tokenizer(str(tmp_path))


def test_what_is_wrong_elsewhere_is_not_blamed_on_the_config(tmp_path: Path) -> None:
    write_model(tmp_path, qwen2_config())
    tiny_tokenizer(["to be or not to be"], vocab_size=300).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError) as caught:
        load_tokenizer(str(tmp_path))
    assert caught.value.where == str(tmp_path) and caught.value.what.startswith("cannot load the tokenizer: ")
    assert "Hub" not in (caught.value.fix or "")
