"""Checkpoints with vision parts: their language part is trained on text, and the other parts are saved as they were."""

from pathlib import Path
from typing import Any

import pytest
import sft_runs
import torch
from multimodal_models import CONFIGS, EAGER, VOCABULARY, tensors_of, whole_model, write_checkpoint
from peft import PeftModel
from runs import losses
from tiny import RandomDocuments
from torch import Tensor, nn
from transformers import AutoConfig, Florence2Config, Qwen2_5_VLConfig

from verl import dist
from verl.algorithms import sft
from verl.config.commands import ExportConfig
from verl.config.load import load_config
from verl.config.shared import OptimConfig
from verl.data.pack import collate
from verl.demo.problems import write_problems
from verl.engine.engine import Engine
from verl.engine.scorers import TokenScorer
from verl.engine.trial import choose_path
from verl.errors import UserError
from verl.models import export as exporting
from verl.models import saved
from verl.models.attention.packed import PACKED
from verl.models.heads import load_reward_model
from verl.models.inference import load_for_inference
from verl.models.load import language_class, load_for_training
from verl.models.multimodal import PROCESSOR_FILES
from verl.models.shards import load_without_values, small_twin
from verl.models.twin import twin_configs
from verl.rollout import Options, Sampling, auto
from verl.rollout.hf import HfRollout
from verl.rollout.native.engine import NativeRollout

IDS = torch.arange(3, 31)[None]  # longer than the windows
PROMPTS = [list(range(5, 24)), list(range(40, 47))]


@pytest.fixture(scope="module", params=CONFIGS)
def mixed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two dtypes."""
    return write_checkpoint(request.param, tmp_path_factory.mktemp("mixed") / request.param)


@pytest.fixture(scope="module", params=["gemma3", "gemma4, unequal heads", "qwen2_5_vl"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(request.param, tmp_path_factory.mktemp("base") / request.param, dtype=torch.float32)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=IDS, use_cache=False).logits


def vision(tensors: dict[str, Tensor]) -> set[str]:
    return {name for name in tensors if "vis" in name.replace("lm_head", "") or "multi_modal_projector" in name}


def test_text_has_the_logits_of_the_whole_checkpoint_and_reaches_no_other_part(mixed: Path) -> None:
    model = load_for_training(str(mixed), attention="eager").model
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


@pytest.mark.parametrize("kind", ["gemma3", "gemma4", "gemma4, unequal heads", "llama4", "qwen2_5_vl", "qwen3_5"])
def test_the_gradient_on_packed_documents_is_that_of_a_plain_loop(kind: str, tmp_path: Path) -> None:
    """Positions of three dimensions, chunks, windows and recurrent layers: each document is computed as if alone."""
    path = write_checkpoint(kind, tmp_path / kind, dtype=torch.float32)
    how = choose_path(AutoConfig.from_pretrained(path), str(path))
    model, whole = load_for_training(str(path), attention=how.attention).model, whole_model(path)
    optim = OptimConfig(clip_grad=1e9)
    engine = Engine(TokenScorer(model, path=how), optim, total_steps=1, device=torch.device("cpu"), compute_dtype=torch.float32)
    documents = [RandomDocuments(longest=30, vocabulary=VOCABULARY - 10).document(i) for i in range(3)]
    engine.backward([collate(documents, range(3))], sft)
    total = sum(mask[1:].sum() for _, mask in documents)
    for ids, mask in documents:
        ids_T = torch.from_numpy(ids).long()
        logprob_TV = whole(input_ids=ids_T[None], use_cache=False).logits[0].float().log_softmax(-1)
        logprob_T = logprob_TV[:-1].gather(1, ids_T[1:, None]).squeeze(1)[torch.from_numpy(mask[1:])]
        (-logprob_T.sum() / total).backward()
    expected = {name: parameter.grad for name, parameter in whole.named_parameters() if parameter.grad is not None}
    trained = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert expected and trained.keys() == expected.keys()
    largest = max(gradient.abs().max() for gradient in expected.values())
    assert max((trained[name] - gradient).abs().max() for name, gradient in expected.items()) < 1e-5 * largest


def write_run(checkpoint: Path, folder: Path) -> Path:
    write_problems(folder / "train.jsonl", folder / "test.jsonl", 24, 4, seed=5)
    (folder / "model").symlink_to(checkpoint)
    return folder


def test_a_run_trains_the_whole_language_part_alone_and_resumes(checkpoint: Path, tmp_path: Path) -> None:
    write_run(checkpoint, tmp_path)
    keys = {"trainer__total_training_steps": 2, "trainer__save_freq": 1, "data__max_length": 200}
    at_once = sft_runs.train(tmp_path, "at_once", **keys)
    original = sft.loss

    def failing(*inputs: Any) -> Any:
        if (tmp_path / "twice" / "global_step_1").is_dir():
            raise KeyboardInterrupt
        return original(*inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft, "loss", failing)
        with pytest.raises(KeyboardInterrupt):
            sft_runs.train(tmp_path, "twice", **keys)
    dist.stop()
    assert losses(sft_runs.train(tmp_path, "twice", **keys)) == losses(at_once)
    before, after = tensors_of(checkpoint), tensors_of(tmp_path / "twice" / "global_step_2")
    buffers = {name for name in before if name.endswith("layer_scalar")}  # of Gemma 4
    assert {name for name in before if torch.equal(before[name], after[name])} == vision(before) | buffers
    assert before.keys() == after.keys()


@pytest.mark.parametrize("targets", ["all-linear", "[q_proj,v_proj]", "'.*\\.(q|k)_proj'"])
def test_an_adapter_is_on_the_language_part_alone_also_for_peft(targets: str, tmp_path: Path) -> None:
    checkpoint = write_checkpoint("gemma3", tmp_path / "gemma3", dtype=torch.float32)  # whose vision part has a q_proj, too
    write_run(checkpoint, tmp_path)
    keys = {"model__lora_rank": 4, "model__target_modules": targets, "optim__lr": 3e-2, "data__max_length": 200}
    sft_runs.train(tmp_path, "lora", trainer__total_training_steps=1, **keys)
    adapter, whole = tmp_path / "lora" / "global_step_1", whole_model(checkpoint)
    before = logits(whole)
    adapted = PeftModel.from_pretrained(whole, str(adapter))
    assert not vision({name: p for name, p in adapted.named_parameters() if "lora_" in name})
    after = logits(adapted)
    assert (after - before).abs().max() > 1e-3
    assert (logits(load_for_inference(str(adapter), device="cpu", dtype=torch.float32)) - after).abs().max() < 1e-5
    if targets == "all-linear":
        exporting.export(load_config(ExportConfig, exporting.keyed([str(adapter), str(tmp_path / "merged")])))
        assert (logits(whole_model(tmp_path / "merged")) - after).abs().max() < 1e-5
        found, expected = tensors_of(tmp_path / "merged"), tensors_of(checkpoint)
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in vision(expected))
        assert (tmp_path / "merged" / "preprocessor_config.json").is_file()


def test_answers_are_those_of_the_whole_checkpoint(checkpoint: Path) -> None:
    model, whole = load_for_inference(str(checkpoint), device="cpu", dtype=torch.float32), whole_model(checkpoint)
    sampling = Sampling(max_new_tokens=8, temperature=0.0)
    expected = []
    for prompt in PROMPTS:
        out = whole.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=2, pad_token_id=0)  # type: ignore[operator]
        expected.append(out[0, len(prompt) :].tolist())
    for kind in (HfRollout, NativeRollout):
        found = [answer.token_ids for answer in kind(model, [2]).generate(PROMPTS, sampling)]
        assert [list(ids) for ids in found] == expected


@pytest.mark.parametrize("kind", EAGER)
@pytest.mark.parametrize("before", [None, PACKED])
def test_around_a_language_part_that_has_eager_attention_alone_answers_are_those_of_the_whole(
    kind: str, before: str | None, tmp_path: Path
) -> None:
    path = write_checkpoint(kind, tmp_path / "model", dtype=torch.float32)
    model, whole = load_for_inference(str(path), device="cpu", dtype=torch.float32), whole_model(path)
    whole.set_attn_implementation("eager")
    if before is not None:  # as in training
        model.set_attn_implementation(before)
    own = model.config.get_text_config()._attn_implementation
    rollout = auto.choose(model, [2], Options(), is_shared=True)
    assert isinstance(rollout, HfRollout) and rollout.way.attention == "eager"
    for prompt, answer in zip(PROMPTS, rollout.generate(PROMPTS, Sampling(max_new_tokens=8, temperature=0.0)), strict=True):
        with torch.no_grad():
            logits_TV = whole(input_ids=torch.tensor([[*prompt, *answer.token_ids]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        assert logits_TV.argmax(-1).tolist() == answer.token_ids
    assert model.config.get_text_config()._attn_implementation == own


def test_a_sharded_model_reads_its_language_part_alone(tmp_path: Path) -> None:
    path = write_checkpoint("qwen3_vl_moe", tmp_path / "model", dtype=torch.float32)
    loaded = load_without_values(str(path), dtype=torch.float32)
    assert loaded is not None and loaded.fill is not None and not vision(dict(loaded.model.named_parameters()))
    scorer = TokenScorer(loaded.model)
    loaded.fill(scorer, torch.device("cpu"))
    scorer.model.set_attn_implementation("eager")
    assert (logits(scorer.model) - logits(whole_model(path))).abs().max() < 1e-5
    assert not vision(dict(small_twin(loaded.model, torch.device("cpu")).named_parameters()))


def test_no_reward_model_is_made_of_a_checkpoint_with_vision_parts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has parts for pictures"):
        load_reward_model(str(write_checkpoint("gemma3", tmp_path / "gemma3")))


def test_a_decoder_whose_encoder_reads_the_text_is_refused() -> None:
    with pytest.raises(UserError, match="is an encoder-decoder model"):
        language_class(Florence2Config())


def test_the_twin_of_a_large_model_has_sections_of_positions_that_fit_its_heads_and_one_layer_of_vision() -> None:
    config: Any = Qwen2_5_VLConfig()
    config.text_config.rope_parameters["mrope_section"] = [16, 24, 24]
    twin: Any = next(iter(twin_configs(config)))
    assert twin.text_config.rope_parameters["mrope_section"] == [2, 3, 3]
    assert twin.vision_config.depth == 1 and config.vision_config.depth > 1
