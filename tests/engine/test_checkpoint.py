"""Checkpoints: the Hugging Face files are the original's twins, a resumed run is the uninterrupted one, damage is found."""

import json
import pickle
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import RandomDocuments, qwen2_config, write_model
from transformers import AutoModelForCausalLM

from verl import disk
from verl.algorithms import sft
from verl.config.shared import ModelConfig, OptimConfig
from verl.data.loader import Loader, Packing
from verl.engine import checkpoint, draft, restore
from verl.engine.checkpoint import Position
from verl.engine.engine import Engine
from verl.engine.scorers import TokenScorer
from verl.errors import UserError
from verl.models.adapters.lora import add_adapters
from verl.models.inference import load_for_inference
from verl.models.load import Loaded, load_for_training
from verl.models.saved import export_adapter, export_model

pytestmark = pytest.mark.usefixtures("process_group")

WHERE = Position(step=2, tokens=100, supervised_tokens=50, rows=24, rows_per_step=4, seed=1, data_fingerprint="f")


def loader() -> Loader:
    return Loader(RandomDocuments(), Packing(4, 240), rows_per_step=4, seed=1)


def engine_on(loaded: Loaded, *, lr: float = 1e-3) -> Engine:
    return Engine(TokenScorer(loaded.model), OptimConfig(lr=lr), total_steps=8, device=torch.device("cpu"), compute_dtype=torch.float32)


def train(engine: Engine, start: int, stop: int) -> list[float]:
    return [float(engine.train_step(step.micro_batches, sft, step.number)["loss"]) for step in loader().steps(start, stop)]


def save(root: Path, engine: Engine, loaded: Loaded, step: int = 2) -> Path:
    export = partial(export_model, model=loaded.model, saved_dtypes=loaded.saved_dtypes)
    return checkpoint.save(root, engine, replace(WHERE, step=step), export)


def header(path: Path) -> dict[str, tuple[list[int], str]]:
    with safe_open(path / "model.safetensors", "pt") as file:
        names = file.keys()
        return {name: (file.get_slice(name).get_shape(), file.get_slice(name).get_dtype()) for name in names}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_saved_directory_is_the_twin_of_the_original(tied: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    original = write_model(tmp_path / "original", qwen2_config(tie_word_embeddings=tied), dtype=dtype)
    loaded = load_for_training(str(original))
    saved = save(tmp_path, engine_on(loaded), loaded)
    assert header(saved) == header(original)
    before, after = (json.loads((path / "config.json").read_text()) for path in (original, saved))
    assert before == after
    assert {kind for _, kind in header(saved).values()} == {"BF16" if dtype == torch.bfloat16 else "F32"}
    assert after["dtype"] == str(dtype).removeprefix("torch.")
    ids = torch.arange(12)[None]
    logits = [AutoModelForCausalLM.from_pretrained(path)(ids).logits for path in (original, saved)]
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=0)


def test_the_weights_as_they_are_in_memory_would_be_no_twin(tmp_path: Path) -> None:
    """Negative control: they are float32, and so is then the dtype in the config."""
    original = write_model(tmp_path / "original", dtype=torch.bfloat16)
    load_for_training(str(original)).model.save_pretrained(tmp_path / "saved")
    assert header(tmp_path / "saved").keys() == header(original).keys()
    assert header(tmp_path / "saved") != header(original)
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize("tied", [True, False])
def test_an_output_layer_too_many_or_too_few_would_be_no_twin(tied: bool, tmp_path: Path) -> None:
    """Negative control: the output layer of a tied model written beside the embedding, and that of an untied one left out or empty."""
    original = write_model(tmp_path / "original", qwen2_config(tie_word_embeddings=tied))
    loaded = load_for_training(str(original))
    saved = save(tmp_path, engine_on(loaded), loaded)
    expected, weights = header(original), load_file(saved / "model.safetensors")
    body = {name: tensor for name, tensor in weights.items() if name != "lm_head.weight"}
    head = weights["model.embed_tokens.weight"].clone()
    for wrong in ({**body, "lm_head.weight": head},) if tied else (body, {**body, "lm_head.weight": head[:0]}):
        save_file(wrong, saved / "model.safetensors", metadata={"format": "pt"})
        assert header(saved) != expected
    if not tied:
        (saved / "manifest.json").unlink()
        with pytest.raises(UserError):
            load_for_training(str(saved))


def test_the_saved_weights_are_the_trained_ones(tmp_path: Path) -> None:
    loaded = load_for_training(str(write_model(tmp_path / "original")))
    engine = engine_on(loaded)
    train(engine, 0, 2)
    saved = load_file(save(tmp_path, engine, loaded) / "model.safetensors")
    trained = {name.removeprefix("model."): p.detach() for name, p in engine.scorer.named_parameters()}
    assert all(torch.equal(saved[name], tensor) for name, tensor in trained.items())


def test_a_run_resumed_from_a_checkpoint_is_the_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    original = str(write_model(tmp_path / "original"))
    whole = train(engine_on(load_for_training(original)), 0, 8)  # crosses an epoch: 24 rows in steps of 4
    loaded = load_for_training(original)
    first = engine_on(loaded)
    begun = train(first, 0, 3)
    save(tmp_path, first, loaded, step=3)
    resumed = engine_on(load_for_training(original))
    restore.load(tmp_path / "global_step_3", resumed)
    assert begun + train(resumed, 3, 8) == whole


def test_a_lost_data_position_shows(tmp_path: Path) -> None:
    """Negative control of resuming: the rows of step 0 again in place of step 3."""
    original = str(write_model(tmp_path / "original"))
    whole = train(engine_on(load_for_training(original)), 0, 4)
    loaded = load_for_training(original)
    first = engine_on(loaded)
    train(first, 0, 3)
    save(tmp_path, first, loaded, step=3)
    resumed = engine_on(load_for_training(original))
    restore.load(tmp_path / "global_step_3", resumed)
    assert train(resumed, 0, 1) != whole[3:]


def test_a_lost_optimizer_state_shows(tmp_path: Path) -> None:
    """Negative control of resuming: the weights alone do not go on the same way."""
    original = str(write_model(tmp_path / "original"))
    whole = train(engine_on(load_for_training(original)), 0, 6)
    loaded = load_for_training(original)
    first = engine_on(loaded)
    train(first, 0, 3)
    saved = save(tmp_path, first, loaded, step=3)
    weights_alone = engine_on(load_for_training(str(saved)))
    assert train(weights_alone, 3, 6) != whole[3:]


def test_random_states_are_tensors_that_need_no_pickle(tmp_path: Path) -> None:
    loaded = load_for_training(str(write_model(tmp_path / "original")))
    engine = engine_on(loaded)
    torch.manual_seed(3)
    saved = save(tmp_path, engine, loaded)
    expected = torch.rand(8)
    stored = load_file(saved / "trainer" / "rng_0.safetensors")
    assert {name: tensor.dtype for name, tensor in stored.items()} == {"cpu": torch.uint8}
    restore.load(saved, engine)
    assert torch.equal(torch.rand(8), expected)
    assert not torch.equal(torch.rand(8), expected), "a state that is not restored would not be seen"
    torch.save(np.random.get_state(), tmp_path / "rng.pt")  # the wrong way: objects, which PyTorch refuses to read
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "rng.pt", weights_only=True)


def adapted_model(tmp_path: Path, *, tied: bool) -> tuple[Loaded, PeftModel]:
    loaded = load_for_training(str(write_model(tmp_path / "base", qwen2_config(tie_word_embeddings=tied))))
    return loaded, add_adapters(loaded.model, ModelConfig(lora_rank=4, lora_alpha=8), compute_dtype=torch.float32, seed=1)


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_loads_with_peft_and_transformers_and_merges_to_the_same_logits(tied: bool, tmp_path: Path) -> None:
    loaded, adapted = adapted_model(tmp_path, tied=tied)
    engine = engine_on(loaded, lr=1e-2)
    train(engine, 0, 3)
    saved = checkpoint.save(tmp_path, engine, WHERE, partial(export_adapter, adapted=adapted))
    assert sorted(p.name for p in saved.iterdir()) == ["adapter_config.json", "adapter_model.safetensors", "manifest.json", "trainer"]
    ids = torch.arange(12)[None]
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    plain = base(ids).logits
    with_peft = PeftModel.from_pretrained(base, saved)(ids).logits
    assert (with_peft - plain).abs().max() > 1e-2
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(saved)(ids).logits, with_peft)
    torch.testing.assert_close(load_for_inference(str(saved), device="cpu")(ids).logits, with_peft, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`")
def test_a_merge_into_a_tied_embedding_would_change_the_input_too(tmp_path: Path) -> None:
    """Negative control of the merge: adapting the output layer alone moves the tied input embedding when merged."""
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(write_model(tmp_path / "base", qwen2_config(tie_word_embeddings=True)))
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False))
    ids = torch.arange(12)[None]
    before = adapted(ids).logits.detach()
    assert (adapted.merge_and_unload()(ids).logits - before).abs().max() > 1e-2


def test_an_adapter_trains_nothing_else_and_resumes(tmp_path: Path) -> None:
    loaded, adapted = adapted_model(tmp_path, tied=True)
    engine = engine_on(loaded, lr=1e-2)
    frozen = {n: p.clone() for n, p in engine.scorer.named_parameters() if not p.requires_grad}
    train(engine, 0, 3)
    checkpoint.save(tmp_path, engine, replace(WHERE, step=3), partial(export_adapter, adapted=adapted))
    rest = train(engine, 3, 6)
    assert all(torch.equal(frozen[n], p) for n, p in engine.scorer.named_parameters() if not p.requires_grad)
    again, _ = adapted_model(tmp_path, tied=True)
    resumed = engine_on(again, lr=1e-2)
    restore.load(tmp_path / "global_step_3", resumed)
    assert train(resumed, 3, 6) == rest


def test_targets_that_match_nothing_name_those_that_exist(tmp_path: Path) -> None:
    loaded = load_for_training(str(write_model(tmp_path / "base")))
    with pytest.raises(UserError, match="q_proj"):
        add_adapters(loaded.model, ModelConfig(lora_rank=4, target_modules=["nothing"]), compute_dtype=torch.float32, seed=1)


@pytest.fixture
def two_checkpoints(tmp_path: Path) -> Path:
    loaded = load_for_training(str(write_model(tmp_path / "original")))
    engine = engine_on(loaded)
    for step in (2, 4):
        save(tmp_path, engine, loaded, step)
    return tmp_path


def test_the_newest_whole_checkpoint_is_found(two_checkpoints: Path) -> None:
    assert checkpoint.newest(two_checkpoints, print) == two_checkpoints / "global_step_4"
    assert (two_checkpoints / "latest_checkpointed_iteration.txt").read_text() == "4\n"


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "a bit of the weights": lambda d: flip_a_bit(d / "model.safetensors"),
    "a bit of the optimizer": lambda d: flip_a_bit(d / "trainer" / "__0_0.distcp"),
    "a byte less": lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-1]),
    "a missing file": lambda d: (d / "config.json").unlink(),
    "no manifest": lambda d: (d / "manifest.json").unlink(),
    "an empty manifest": lambda d: (d / "manifest.json").write_text(""),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_passed_over(damage: str, two_checkpoints: Path) -> None:
    DAMAGES[damage](two_checkpoints / "global_step_4")
    said: list[str] = []
    assert checkpoint.newest(two_checkpoints, said.append) == two_checkpoints / "global_step_2"
    assert len(said) == 1 and "global_step_4" in said[0]


def test_a_run_never_starts_anew_in_silence_when_all_are_damaged(two_checkpoints: Path) -> None:
    for step in (2, 4):
        (two_checkpoints / f"global_step_{step}" / "config.json").unlink()
    with pytest.raises(UserError, match="every checkpoint is damaged"):
        checkpoint.newest(two_checkpoints, print)


def test_what_a_killed_writer_left_is_not_taken_for_a_checkpoint(two_checkpoints: Path) -> None:
    shutil.copytree(two_checkpoints / "global_step_4", two_checkpoints / "global_step_6.tmp")
    assert checkpoint.newest(two_checkpoints, print) == two_checkpoints / "global_step_4"
    checkpoint.remove_unfinished(two_checkpoints)
    assert not (two_checkpoints / "global_step_6.tmp").exists()


def test_only_the_newest_are_kept(two_checkpoints: Path) -> None:
    checkpoint.prune(two_checkpoints, None)
    assert len(checkpoint.committed(two_checkpoints)) == 2
    checkpoint.prune(two_checkpoints, 1)
    assert [p.name for p in checkpoint.committed(two_checkpoints)] == ["global_step_4"]


def test_retention_counts_checkpoints_that_are_as_they_were_written_and_names_the_others(two_checkpoints: Path) -> None:
    shutil.copytree(two_checkpoints / "global_step_4", two_checkpoints / "global_step_99")
    said: list[str] = []
    checkpoint.prune(two_checkpoints, 1, good=[two_checkpoints / "global_step_4"], say=said.append)
    assert [p.name for p in checkpoint.committed(two_checkpoints)] == ["global_step_4", "global_step_99"]
    assert len(said) == 1 and "global_step_99 is damaged" in said[0]


def test_a_checkpoint_that_cannot_be_deleted_does_not_end_the_run(two_checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    said: list[str] = []
    monkeypatch.setattr(Path, "rename", refused)
    checkpoint.prune(two_checkpoints, 1, say=said.append)
    assert said == ["global_step_2 cannot be deleted: Permission denied"]


def test_retention_keeps_what_is_needed_besides(two_checkpoints: Path) -> None:
    checkpoint.prune(two_checkpoints, 1, needed=[two_checkpoints / "global_step_2"])
    assert len(checkpoint.committed(two_checkpoints)) == 2


def test_a_committed_checkpoint_is_never_replaced(tmp_path: Path) -> None:
    loaded = load_for_training(str(write_model(tmp_path / "original")))
    engine, said = engine_on(loaded), list[str]()
    save(tmp_path, engine, loaded)
    (tmp_path / "global_step_2" / "mine.txt").write_text("mine")
    export = partial(export_model, model=loaded.model, saved_dtypes=loaded.saved_dtypes)
    saved = checkpoint.save(tmp_path, engine, WHERE, export, say=said.append)
    assert checkpoint.find_damage(saved) is None
    assert (tmp_path / "global_step_2.replaced-1/mine.txt").read_text() == "mine" and "replaced-1" in said[0]
    assert checkpoint.newest(tmp_path, print) == saved


def test_a_disk_that_fails_is_named_and_the_checkpoint_before_remains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_for_training(str(write_model(tmp_path / "original")))
    engine = engine_on(loaded)
    before = save(tmp_path, engine, loaded)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(draft, "save_file", full)
    with pytest.raises(UserError, match=r"global_step_3\.tmp: cannot be written: No space left on device"):
        save(tmp_path, engine, loaded, step=3)
    assert checkpoint.committed(tmp_path) == [before] and not (tmp_path / "global_step_3.tmp").exists()


def test_any_error_on_a_full_disk_is_one_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_for_training(str(write_model(tmp_path / "original")))

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("the writer has failed")

    monkeypatch.setattr(draft, "save_file", fails)
    with pytest.raises(RuntimeError, match="the writer"):
        save(tmp_path, engine_on(loaded), loaded)
    monkeypatch.setattr(disk, "FULL_BYTES", 2**60)
    with pytest.raises(UserError, match="No space left on device"):
        save(tmp_path, engine_on(loaded), loaded)
