"""`verl export`: what is written gives the logits of base and adapter, needs neither, and is not written where it would not."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import run_forked
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import VOCABULARY, qwen2_config, write_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from verl.config.commands import ExportConfig
from verl.config.load import load_config
from verl.errors import UserError
from verl.models import export as exporting
from verl.models.adapters import files
from verl.models.inference import load_for_inference
from verl.models.tiny import tiny_tokenizer

IDS = torch.arange(3, 15)[None]
STOP = 1


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(IDS).logits[0]


def load(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def export(*words: object) -> Path:
    return exporting.export(load_config(ExportConfig, exporting.keyed([str(word) for word in words])))


def write_base(folder: Path, **changes: object) -> Path:
    write_model(folder, qwen2_config(**changes), dtype=torch.bfloat16 if folder.name == "half" else torch.float32)
    tiny_tokenizer(["to be or not to be"], vocab_size=400).save_pretrained(folder)
    GenerationConfig(eos_token_id=0, pad_token_id=0, temperature=0.5, do_sample=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["tied", "untied"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / request.param, tie_word_embeddings=request.param == "tied")


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "tied")


def write_adapter(folder: Path, base: Path, *, size: float = 0.05, **changes: Any) -> Path:
    """An adapter as a run leaves it: with a generation config of its own, and trained so far as `size` says."""
    torch.manual_seed(1)
    adapted = get_peft_model(load(base), LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **changes}))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and "lora_A" not in name:
                parameter.add_(size * torch.randn_like(parameter))
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    GenerationConfig(eos_token_id=[STOP, 0], pad_token_id=0).save_pretrained(folder)
    return folder


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora and dora": {"use_rslora": True, "use_dora": True},
    "trained tokens": {"trainable_token_indices": [STOP, 9]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_export_of_an_adapter_is_base_and_adapter_in_one(kind: str, base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", base, **KINDS[kind])
    expected = logits(PeftModel.from_pretrained(load(base), adapter))
    written = export(adapter, tmp_path / "out")
    torch.testing.assert_close(logits(load(written)), expected, rtol=0, atol=1e-4)
    assert (logits(load(base)) - expected).abs().max() > 1e-2
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (base, written))
    assert before == after
    assert header(written) == header(base)
    assert not list(written.glob("adapter*")) and sorted(tmp_path.iterdir()) == [adapter, written]


def write_resized_adapter(folder: Path, base: Path, rows: int, *, save: bool | str = "auto", **changes: Any) -> Path:
    """An adapter whose embeddings were resized, for new tokens or to the size of the tokenizer, as peft saves it."""
    torch.manual_seed(1)
    model = load(base)
    model.resize_token_embeddings(rows, mean_resizing=False)
    adapted = get_peft_model(model, LoraConfig(**{"r": 4, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM", **changes}))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and "lora_A" not in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    adapted.save_pretrained(str(folder), save_embedding_layers=save)
    return folder


@pytest.mark.filterwarnings("ignore")  # peft warns of tied embeddings
@pytest.mark.parametrize("rows", [VOCABULARY + 3, VOCABULARY - 3], ids=["larger", "smaller"])
@pytest.mark.parametrize(
    "changes",
    [{"modules_to_save": ["embed_tokens", "lm_head"]}, {}, {"target_modules": ["q_proj", "embed_tokens"]}],
    ids=["trained whole", "saved beside", "adapted"],
)
def test_an_adapter_with_a_resized_vocabulary_is_exported_and_loaded(
    changes: dict[str, Any], rows: int, base: Path, tmp_path: Path
) -> None:
    if "embed_tokens" in changes.get("target_modules", []) and base.name == "untied":
        pytest.skip("peft does not save the new rows of the output layer")
    adapter = write_resized_adapter(tmp_path / "adapter", base, rows, **changes)
    reference = load(base)
    reference.resize_token_embeddings(rows, mean_resizing=False)
    expected = logits(PeftModel.from_pretrained(reference, adapter))
    written = load(export(adapter, tmp_path / "out"))
    assert written.config.vocab_size == rows and expected.shape == (12, rows)
    torch.testing.assert_close(logits(written), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(logits(load_for_inference(str(adapter), device="cpu")), expected, rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_rows_of_new_tokens_leave_the_old_rows_as_they_were(base: Path, tmp_path: Path) -> None:
    adapter = write_resized_adapter(tmp_path / "adapter", base, VOCABULARY + 3)
    before, model, shrunk = load(base), load(base), load(base)
    files.fit_vocabulary(model, str(adapter))
    for rows in (VOCABULARY - 3, VOCABULARY + 3):  # the wrong way: first as many rows as the tokenizer has tokens
        shrunk.resize_token_embeddings(rows, mean_resizing=False)
    old, new, lost = (rows_of(one) for one in (before, model, shrunk))
    assert (len(old), len(new)) == (VOCABULARY, VOCABULARY + 3)
    assert torch.equal(old, new[:VOCABULARY]) and not torch.equal(old, lost[:VOCABULARY])


def rows_of(model: PreTrainedModel) -> Tensor:
    embedding: Any = model.get_input_embeddings()
    weight: Tensor = embedding.weight
    return weight


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("saved", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_an_adapter_may_replace_embeddings(saved: list[str], base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", base, modules_to_save=saved, target_modules=["q_proj"])
    adapted = PeftModel.from_pretrained(load(base), adapter)
    expected = logits(adapted)
    torch.testing.assert_close(logits(load(export(adapter, tmp_path / "out"))), expected, rtol=0, atol=1e-4)
    for module in adapted.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.modules_to_save["default"].load_state_dict(module.original_module.state_dict())
    assert (logits(adapted) - expected).abs().max() > 1e-2, "trained embeddings that are lost would not be seen"


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_whose_resized_embeddings_are_not_saved_is_refused(base: Path, tmp_path: Path) -> None:
    adapter = write_resized_adapter(tmp_path / "adapter", base, VOCABULARY + 3, target_modules=["embed_tokens"], save=False)
    with pytest.raises(UserError, match=rf"embeddings resized to {VOCABULARY + 3} rows, and the model has {VOCABULARY}"):
        export(adapter, tmp_path / "out")
    if base.name == "untied":  # the embeddings are there, but not the new rows of the output layer
        adapter = write_resized_adapter(tmp_path / "half", base, VOCABULARY + 3, target_modules=["embed_tokens"])
        with pytest.raises(UserError, match="are not all in the file"):
            export(adapter, tmp_path / "out")
    whole = write_resized_adapter(tmp_path / "whole", base, VOCABULARY + 3)
    with pytest.raises(UserError, match=r"embeddings resized to (.|\n)*verl export"):  # to train it further
        files.check_base(str(whole), load(base), files.read_config(str(whole)))


def header(folder: Path) -> dict[str, tuple[list[int], str]]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: (file.get_slice(name).get_shape(), file.get_slice(name).get_dtype()) for name in file.keys()}  # noqa: SIM118


def test_tokenizer_template_and_stop_ids_come_along(tied: Path, tmp_path: Path) -> None:
    written = export(write_adapter(tmp_path / "adapter", tied), tmp_path / "out")
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (tied, written))
    assert before.get_vocab() == after.get_vocab() and before.chat_template == after.chat_template
    assert GenerationConfig.from_pretrained(written).eos_token_id == [STOP, 0]
    again = export(written, tmp_path / "again")
    assert GenerationConfig.from_pretrained(again).eos_token_id == [STOP, 0]
    assert (written.stat().st_mode & 0o111) and len({path.stat().st_mode for path in written.iterdir()}) == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_cast_and_split(dtype: str, tied: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", tied)
    written = export(adapter, tmp_path / "out", f"dtype={dtype}", "max_shard_size=100KB")
    assert len(list(written.glob("*.safetensors"))) > 1 and (written / "model.safetensors.index.json").is_file()
    model = AutoModelForCausalLM.from_pretrained(written)
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    assert json.loads((written / "config.json").read_text())["dtype"] == dtype
    expected = load(export(adapter, tmp_path / "whole")).state_dict()
    assert all(torch.equal(tensor, expected[name].to(tensor.dtype)) for name, tensor in model.state_dict().items())


def test_the_dtype_is_the_bases_own_where_none_is_named(tmp_path: Path) -> None:
    half = write_base(tmp_path / "half")
    written = export(write_adapter(tmp_path / "adapter", half), tmp_path / "out")
    assert {dtype for _, dtype in header(written).values()} == {"BF16"} and header(written) == header(half)


def test_a_full_checkpoint_is_cast_and_else_the_same(base: Path, tmp_path: Path) -> None:
    written = export(base, tmp_path / "same")
    assert (written / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
    assert header(export(base, tmp_path / "half", "dtype=bfloat16"))["model.norm.weight"] == ([64], "BF16")


def test_a_model_whose_attention_is_its_own_code_is_exported(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 400, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("falcon", **sizes)).save_pretrained(tmp_path / "base")
    tiny_tokenizer(["to be or not to be"], vocab_size=400).save_pretrained(tmp_path / "base")
    written = export(write_adapter(tmp_path / "adapter", tmp_path / "base"), tmp_path / "whole")
    adapted = PeftModel.from_pretrained(load(tmp_path / "base"), str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(load(written)), logits(adapted), atol=1e-5, rtol=0)


def test_a_run_directory_stands_for_its_newest_checkpoint(tied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step, size in ((9, 0.01), (10, 0.05), (20, 0.09)):
        write_adapter(tmp_path / "run" / f"global_step_{step}", tied, size=size)
    (tmp_path / "run" / "global_step_20").rename(tmp_path / "run" / "global_step_20.tmp")  # not committed
    written = export(tmp_path / "run", tmp_path / "out")
    assert "its newest complete checkpoint, global_step_10" in capsys.readouterr().err
    newest = PeftModel.from_pretrained(load(tied), tmp_path / "run" / "global_step_10")
    torch.testing.assert_close(logits(load(written)), logits(newest), rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`")
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_on_one_of_two_tied_embeddings_is_merged_into_that_one(target: str, tied: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", tied, target_modules=[target, "q_proj"], init_lora_weights=False)
    expected = logits(PeftModel.from_pretrained(load(tied), adapter))
    written = export(adapter, tmp_path / "out")
    torch.testing.assert_close(logits(load(written)), expected, rtol=0, atol=1e-4)
    assert json.loads((written / "config.json").read_text())["tie_word_embeddings"] is False
    assert header(written).keys() - header(tied).keys() == {"lm_head.weight"}


@pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`")
def test_a_merge_that_changes_both_tied_embeddings_is_refused(tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the check of the merge."""
    adapter = write_adapter(tmp_path / "adapter", tied, target_modules=["lm_head"], init_lora_weights=False)
    monkeypatch.setattr(files, "untie", lambda model: None)
    with pytest.raises(UserError, match="the merged model's logits differ by"):
        export(adapter, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [adapter]


def test_damage_between_merging_and_the_disk_is_noticed(tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the check of what was written."""
    adapter = write_adapter(tmp_path / "adapter", tied)
    write = exporting.export_model

    def write_damaged(folder: Path, *args: object, **options: object) -> None:
        write(folder, *args, **options)  # type: ignore[arg-type]
        tensors = load_file(folder / "model.safetensors")
        tensors["model.layers.1.mlp.up_proj.weight"] *= 1.01
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(exporting, "export_model", write_damaged)
    with pytest.raises(UserError, match="the written model's logits differ"):
        export(adapter, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [adapter]


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_that_was_never_trained_is_refused(kind: str, tied: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", tied, size=0.0, **KINDS[kind])
    with pytest.raises(UserError, match="all lora_B are zero, so it was never trained"):
        export(adapter, tmp_path / "new" / "out")
    assert list(tmp_path.iterdir()) == [adapter]


def test_an_adapter_that_is_lost_in_rounding_is_refused(tied: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", tied, size=1e-4, target_modules=["o_proj"])
    export(adapter, tmp_path / "whole")
    with pytest.raises(UserError, match="casting to bfloat16 loses the adapter"):
        export(adapter, tmp_path / "out", "dtype=bfloat16")
    half = write_base(tmp_path / "half")
    with pytest.raises(UserError, match="casting to bfloat16 loses the adapter"):
        export(write_adapter(tmp_path / "of_half", half, size=1e-4, target_modules=["o_proj"]), tmp_path / "out")
    with pytest.raises(UserError, match="that is within rounding"):
        export(write_adapter(tmp_path / "less", tied, size=1e-7), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_cast_that_changes_nothing_says_so(tied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export(tied, tmp_path / "out", "dtype=float32")
    assert "casting to float32 changes the logits of a prompt by nothing\n" in capsys.readouterr().out


def test_weights_that_float16_cannot_hold_are_refused(tied: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", tied)
    with torch.no_grad():
        large = load(tied)
        large.model.norm.weight *= 1e6
        large.save_pretrained(tmp_path / "large")
    (tmp_path / "large" / "tokenizer.json").write_bytes((tied / "tokenizer.json").read_bytes())
    (tmp_path / "large" / "tokenizer_config.json").write_bytes((tied / "tokenizer_config.json").read_bytes())
    with pytest.raises(UserError, match="casting to float16 changes the logits by inf"):
        export(tmp_path / "large", tmp_path / "out", "dtype=float16")
    assert export(adapter, tmp_path / "out", "dtype=float16").is_dir()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{adapter}", "{adapter}"], "the directory is not empty\n  fix: choose a new directory"),
        (["{adapter}", "{adapter}/adapter_config.json"], "is a file"),
        (["{adapter}", "{adapter}/adapter_config.json/out"], "cannot be created"),
        (["nowhere/at/all", "out"], "no such model directory"),
        (["{gone}", "out"], "the adapter's base model cannot be loaded: no such model directory\n  fix: restore it at /gone/base"),
        (["{adapter}", "out", "dtype=int8"], "dtype: found 'int8'"),
        (["{adapter}", "out", "max_shard_size=big"], "max_shard_size: found 'big'"),
        (["{adapter}"], "directory must be given"),
        (["{adapter}", "out", "more"], "'more' is no key with a value"),
    ],
)
def test_what_cannot_be_exported_is_said(
    words: list[str], message: str, tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, gone = write_adapter(tmp_path / "adapter", tied), write_adapter(tmp_path / "gone", tied)
    config = json.loads((gone / "adapter_config.json").read_text())
    (gone / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/gone/base"}))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        export(*(word.format(adapter=adapter, gone=gone) for word in words))
    assert sorted(tmp_path.iterdir()) == [adapter, gone]


def test_the_command_ends_with_exit_code_0_or_2(tied: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", tied)
    done = run_forked("-m", "verl", "export", adapter, "new/out", folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "loaded again: the written model gives the same logits" in done.stdout and done.stderr == ""
    done = run_forked("-m", "verl.models.export", adapter, "new/out", folder=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "not empty" in done.stderr
