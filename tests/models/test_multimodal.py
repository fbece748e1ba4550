"""Checkpoints with vision parts: their language part is trained on text, and the other parts are saved as they were."""

from pathlib import Path

import pytest
import torch
from multimodal_models import CONFIGS, tensors_of, whole_model, write_checkpoint
from torch import Tensor, nn
from transformers import AutoConfig, Florence2Config

from verl.engine.scorers import TokenScorer
from verl.errors import UserError
from verl.models import saved
from verl.models.load import language_class, load_for_training
from verl.models.multimodal import PROCESSOR_FILES
from verl.models.shards import load_without_values, small_twin

IDS = torch.arange(3, 31)[None]  # longer than the windows


@pytest.fixture(scope="module", params=CONFIGS)
def mixed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two dtypes."""
    return write_checkpoint(request.param, tmp_path_factory.mktemp("mixed") / request.param)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=IDS, use_cache=False).logits


def vision(tensors: dict[str, Tensor]) -> set[str]:
    return {name for name in tensors if "vis" in name.replace("lm_head", "") or "multi_modal_projector" in name}


def test_text_has_the_logits_of_the_whole_checkpoint_and_reaches_no_other_part(mixed: Path) -> None:
    model = load_for_training(str(mixed)).model
    model.set_attn_implementation("eager")
    assert not vision(dict(model.named_parameters())) and vision(tensors_of(mixed))
    assert (logits(model) - logits(whole_model(mixed))).abs().max() < 1e-5


def test_what_was_not_trained_is_saved_byte_for_byte(mixed: Path, tmp_path: Path) -> None:
    loaded, expected = load_for_training(str(mixed)), tensors_of(mixed)
    saved.export_model(tmp_path, loaded.model, loaded.saved_dtypes)
    found = tensors_of(tmp_path)
    assert {name: tensor.dtype for name, tensor in found.items()} == {name: tensor.dtype for name, tensor in expected.items()}
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert {torch.float32, torch.bfloat16} == {expected[name].dtype for name in vision(expected)}  # neither is cast
    for name in PROCESSOR_FILES[:2]:
        assert (tmp_path / name).read_bytes() == (mixed / name).read_bytes()
    whole = whole_model(tmp_path)
    assert type(whole) is type(whole_model(mixed)) and AutoConfig.from_pretrained(tmp_path).architectures == [type(whole).__name__]
    assert torch.equal(logits(whole), logits(whole_model(mixed)))


def test_a_sharded_model_reads_its_language_part_alone(tmp_path: Path) -> None:
    path = write_checkpoint("qwen3_vl_moe", tmp_path / "model", dtype=torch.float32)
    loaded = load_without_values(str(path), dtype=torch.float32)
    assert loaded is not None and loaded.fill is not None and not vision(dict(loaded.model.named_parameters()))
    scorer = TokenScorer(loaded.model)
    loaded.fill(scorer, torch.device("cpu"))
    scorer.model.set_attn_implementation("eager")
    assert (logits(scorer.model) - logits(whole_model(path))).abs().max() < 1e-5
    assert not vision(dict(small_twin(loaded.model, torch.device("cpu")).named_parameters()))


def test_a_decoder_whose_encoder_reads_the_text_is_refused() -> None:
    with pytest.raises(UserError, match="is an encoder-decoder model"):
        language_class(Florence2Config())
