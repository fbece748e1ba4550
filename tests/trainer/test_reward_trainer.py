"""Training on pairs of answers: a reward model that ranks answers, and DPO; both resume, and both are what others compute."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from decided import decided
from engines import engine_of
from pairs_runs import write_pairs_and_model
from places import run_ranks
from reward_models import scores_of_transformers
from runs import REWARD, as_words, metrics_of, timeless
from torch import Tensor
from transformers import AutoModelForCausalLM

from verl import dist
from verl.algorithms import dpo
from verl.config.pairs import PairsConfig, PreferenceConfig
from verl.config.ppo import RewardModelConfig
from verl.config.shared import ModelConfig, OptimConfig
from verl.data.documents import Documents, load_documents
from verl.data.loader import Loader, Packing
from verl.data.pairs import PairColumns
from verl.engine.build import build
from verl.engine.engine import Engine
from verl.errors import UserError
from verl.models.load import load_tokenizer
from verl.rewards._model import RewardModel
from verl.trainer import reward_trainer
from verl.trainer.reference_scores import score

STEPS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs in train.jsonl and test.jsonl, and a model of two narrow layers."""
    return write_pairs_and_model(tmp_path_factory.mktemp("pairs"))


def words(folder: Path, output: str, **changes: object) -> list[str]:
    keys: dict[str, object] = {
        "data.train_files": folder / "train.jsonl",
        "data.cache_dir": folder / "cache",
        "data.max_length": 256,
        "data.train_batch_size": 4,
        "model.partial_pretrain": folder / "model",
        "model.enable_gradient_checkpointing": False,
        "trainer.total_training_steps": STEPS,
        "trainer.default_local_dir": folder / output,
        "trainer.save_freq": -1,
        "optim.lr": 1e-3,
    }
    return as_words(keys, changes)


def train(folder: Path, output: str, **changes: object) -> list[dict[str, float]]:
    """Run in this process; the metrics of each step."""
    reward_trainer.main(words(folder, output, **changes))
    return metrics_of(folder / output)


@pytest.fixture(scope="module")
def reward_model(folder: Path) -> Path:
    """Trained until it knows which of two answers belongs to a problem."""
    changes = {"data__val_files": folder / "test.jsonl", "data__train_batch_size": 16, "data__max_tokens_per_micro_batch": 8192}
    train(folder, "reward", **changes, trainer__total_training_steps=200, optim__lr=6e-3)
    return folder / "reward" / "global_step_200"


def test_a_trained_reward_model_ranks_pairs_that_it_has_not_seen(folder: Path, reward_model: Path) -> None:
    metrics = metrics_of(folder / "reward")
    assert metrics[0]["train/loss"] == pytest.approx(math.log(2)), "a head of zeros prefers neither"
    assert metrics[-1]["val/accuracy"] > 0.9 and metrics[-1]["val/margin"] > 1
    rows = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    model = RewardModel(RewardModelConfig(str(reward_model)), device="cpu", tokenizer=None, say=print)
    chats = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    chosen, rejected = (model.score(chats, [row[name] for row in rows]) for name in ("chosen", "rejected"))
    assert (chosen > rejected).mean() == pytest.approx(metrics[-1]["val/accuracy"])


def test_the_written_directory_scores_alike_in_transformers(folder: Path, reward_model: Path) -> None:
    rows = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()][:20]
    chats = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    answers = [row["chosen"] for row in rows]
    packed = RewardModel(RewardModelConfig(str(reward_model), max_tokens_per_micro_batch=512), device="cpu", tokenizer=None, say=print)
    expected = scores_of_transformers(reward_model, chats, answers)
    np.testing.assert_allclose(packed.score(chats, answers), expected, atol=1e-5)
    assert expected.std() > 0.1
    config = json.loads((reward_model / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForSequenceClassification"] and config["pad_token_id"] is not None


def test_a_token_that_ends_documents_is_not_written_down_as_padding(pairs: Documents, folder: Path) -> None:
    """transformers' own class would read the score before it."""
    tokenizer, last = load_tokenizer(str(folder / "model")), int(pairs.document(0)[0][-1])
    for padding, written in ((last, None), (last + 1, last + 1)):
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(padding)
        assert reward_trainer.padding_of(tokenizer, pairs) == written


@pytest.mark.parametrize("method", ["bradley_terry", "dpo"])
def test_a_run_that_was_resumed_is_the_uninterrupted_one(method: str, folder: Path) -> None:
    name = {"algorithm__name": method}
    whole = train(folder, f"whole-{method}", **name, trainer__save_freq=STEPS // 2)
    half = folder / f"whole-{method}" / f"global_step_{STEPS // 2}"
    rest = train(folder, f"rest-{method}", **name, trainer__resume_mode="resume_path", trainer__resume_from_path=half)
    assert [step["train/loss"] for step in rest] == [step["train/loss"] for step in whole[STEPS // 2 :]]
    final = [Path(folder / f"{run}-{method}" / f"global_step_{STEPS}" / "model.safetensors").read_bytes() for run in ("whole", "rest")]
    assert final[0] == final[1]


@pytest.mark.parametrize("method", ["bradley_terry", "dpo"])
def test_the_config_knows_what_the_validation_of_a_method_measures(method: str, folder: Path) -> None:
    of_validation = {"data__val_files": folder / "test.jsonl", "data__val_max_samples": 2}
    (step,) = train(folder, f"names-{method}", algorithm__name=method, trainer__total_training_steps=1, **of_validation)
    assert {name for name in step if name.startswith("val/")} == {f"val/{name}" for name in PreferenceConfig(method).measured or ()}


@pytest.mark.parametrize("method", ["bradley_terry", "dpo"])
def test_pairs_that_share_their_prompts_teach_what_others_do(method: str, folder: Path) -> None:
    words: dict[str, Any] = {"algorithm__name": method, "data__val_files": folder / "test.jsonl", "data__val_max_samples": 20}
    found, expected = (train(folder, f"{method}-{word}", data__share_prompts=word, **words) for word in ("auto", "never"))
    for here, there in zip(found, expected, strict=True):
        assert here["train/tokens"] == there["train/tokens"]
        for name in ("train/loss", "train/margin", "train/grad_norm", *(("val/loss",) if "val/loss" in there else ())):
            assert here[name] == pytest.approx(there[name], rel=1e-3, abs=1e-5), name
    logs = [(folder / f"{method}-{word}" / "train.log").read_text() for word in ("auto", "never")]
    assert "prompts: shared" in logs[0] and "prompts: not shared, each answer has its own (data.share_prompts=never)" in logs[1]


def test_two_processes_train_as_one_does(folder: Path) -> None:
    argv = words(
        folder,
        "two-dpo",
        algorithm__name="dpo",
        trainer__total_training_steps=3,
        trainer__save_freq="never",
        data__val_files=folder / "test.jsonl",
        data__val_max_samples=9,
    )
    alone = [word.replace("two-dpo", "one-dpo") for word in argv]
    reward_trainer.main(alone)
    run_ranks(*REWARD, *argv)
    for one, two in zip(*(timeless(metrics_of(folder / run)) for run in ("one-dpo", "two-dpo")), strict=True):
        assert two == {key: pytest.approx(value, rel=1e-3, abs=2e-4) for key, value in one.items()}


# DPO


def test_dpo_begins_at_log_2_and_moves_the_policy_towards_the_chosen_answers(folder: Path) -> None:
    metrics = train(folder, "dpo", algorithm__name="dpo", data__train_max_samples=8, trainer__total_training_steps=16)
    assert metrics[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-6) and metrics[0]["train/margin"] == 0
    assert metrics[-1]["train/margin"] > 1 and metrics[-1]["train/accuracy"] == 1 and metrics[-1]["train/loss"] < 0.4
    gains = [[step[f"train/{side}_reward"] for side in ("chosen", "rejected")] for step in metrics]
    assert gains[0] == [0, 0] and gains[-1][0] > gains[-1][1]
    assert AutoModelForCausalLM.from_pretrained(folder / "dpo" / "global_step_16").config.architectures == ["Qwen2ForCausalLM"]


@pytest.fixture
def pairs(folder: Path) -> Documents:
    config = PairsConfig(cache_dir=str(folder / "cache"), max_length=256)
    return load_documents(config, PairColumns.of(config), str(folder / "train.jsonl"), load_tokenizer(str(folder / "model")), max_samples=6)


def with_reference(engine: Engine, pairs: Documents, loader: Loader) -> Documents:
    """The pairs with the log-probabilities that the engine gives them now."""
    found = score(engine, pairs, loader.micro_batches(pairs, np.arange(len(pairs))))
    return replace(pairs, values={"ref_logprob_M": [found[number] for number in range(2 * len(pairs))]})


def gradient_of_trl(trainer: object, model: torch.nn.Module, pairs: Documents) -> tuple[float, Tensor]:
    """TRL's loss and gradient on the same token ids; it trains all that follows the prompt, here all up to the stop token."""
    examples = []
    for row in range(len(pairs)):
        (chosen, chosen_mask), (rejected, rejected_mask) = pairs.document(2 * row), pairs.document(2 * row + 1)
        prompt = int(chosen_mask.argmax())
        ends = [int(np.flatnonzero(mask)[-1]) + 1 for mask in (chosen_mask, rejected_mask)]
        ids = {"prompt_ids": chosen[:prompt], "chosen_ids": chosen[prompt : ends[0]], "rejected_ids": rejected[prompt : ends[1]]}
        examples.append({name: values.tolist() for name, values in ids.items()})
    loss = trainer.compute_loss(model, trainer.data_collator(examples))  # type: ignore[attr-defined]
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("share_prompts", [False, True])
def test_dpo_has_the_loss_and_the_gradient_of_trl(folder: Path, pairs: Documents, tmp_path: Path, share_prompts: bool) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    dist.start()
    try:
        engine = engine_of(folder / "model")
        loader = Loader(pairs, Packing(1, 260 if share_prompts else 512, share_prompts=share_prompts), rows_per_step=len(pairs), seed=1)
        loader = replace(loader, documents=with_reference(engine, pairs, loader))
        policy = AutoModelForCausalLM.from_pretrained(folder / "model")
        torch.manual_seed(3)
        with torch.no_grad():  # a policy that has left its reference
            for mine, other in zip(engine.scorer.model.parameters(), policy.parameters(), strict=True):
                mine.add_(0.02 * torch.randn_like(mine))
                other.copy_(mine)
        step = loader.step(0)
        assert len(step.micro_batches) > 1
        assert any(batch.prefixes is not None for batch in step.micro_batches) == share_prompts
        metrics = engine.backward(step.micro_batches, dpo.Loss(dpo.Settings(beta=0.3)))
        gradient = torch.cat([p.grad.flatten() for p in engine.trained])
    finally:
        dist.stop()
    rows = datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    options = {"report_to": [], "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "beta": 0.3}
    config = trl.DPOConfig(str(tmp_path), **options)
    reference = AutoModelForCausalLM.from_pretrained(folder / "model")
    trainer = trl.DPOTrainer(
        policy, ref_model=reference, args=config, train_dataset=rows, processing_class=load_tokenizer(str(folder / "model"))
    )
    loss, expected = gradient_of_trl(trainer, policy.eval(), pairs)
    assert abs(loss - math.log(2)) > 1e-3 and metrics["loss"].item() == pytest.approx(loss, rel=1e-5)
    assert ((gradient - expected).norm() / expected.norm()).item() < 1e-5


def test_dpo_of_an_adapter_has_the_loss_and_the_gradient_of_trl_whose_reference_is_the_model_without_it(
    folder: Path, pairs: Documents, tmp_path: Path
) -> None:
    peft, trl, datasets = (pytest.importorskip(name) for name in ("peft", "trl", "datasets"))
    tokenizer = load_tokenizer(str(folder / "model"))
    rows = datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    options = {"report_to": [], "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "beta": 0.3}
    trainer = trl.DPOTrainer(
        AutoModelForCausalLM.from_pretrained(folder / "model"),
        args=trl.DPOConfig(str(tmp_path), **options),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    theirs = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    dist.start()
    try:
        model = ModelConfig(str(folder / "model"), lora_rank=4)
        built = build(model, OptimConfig(clip_grad=1e9), tokenizer, decided(model), stop_ids=pairs.stop_ids, seed=1)
        loader = Loader(pairs, Packing(1, 512), rows_per_step=len(pairs), seed=1)
        loader = replace(loader, documents=with_reference(built.engine, pairs, loader))
        mine = {name: p for name, p in built.adapted.named_parameters() if p.requires_grad}
        torch.manual_seed(3)
        with torch.no_grad():  # an adapter that has learned something
            for name, weight in theirs.items():
                weight.copy_(mine[name] + 0.1 * torch.randn_like(weight))
                mine[name].copy_(weight)
        metrics = built.engine.backward(loader.step(0).micro_batches, dpo.Loss(dpo.Settings(beta=0.3)))
    finally:
        dist.stop()
    loss, _ = gradient_of_trl(trainer, trainer.model.eval(), pairs)
    assert abs(loss - math.log(2)) > 1e-3 and metrics["loss"].item() == pytest.approx(loss, rel=1e-5)
    assert mine.keys() == theirs.keys() and len(mine) == 2 * 7 * 2
    found, expected = (torch.cat([of[name].grad.flatten() for name in theirs]) for of in (mine, theirs))
    assert ((found - expected).norm() / expected.norm()).item() < 1e-5


def test_dpo_of_an_adapter_is_held_to_what_it_starts_from_resumes_and_leaves_the_base_alone(folder: Path) -> None:
    adapter: dict[str, object] = {"algorithm__name": "dpo", "model__lora_rank": 4, "optim__lr": 1e-2}
    whole = train(folder, "lora", **adapter, trainer__save_freq=STEPS // 2)
    assert whole[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-6) and whole[-1]["train/margin"] != 0
    half, last = (folder / f"lora/global_step_{step}" for step in (STEPS // 2, STEPS))
    rest = train(folder, "lora-rest", **adapter, trainer__resume_mode="resume_path", trainer__resume_from_path=half)
    assert [step["train/loss"] for step in rest] == [step["train/loss"] for step in whole[STEPS // 2 :]]
    names = {path.name for path in last.iterdir()}
    assert "adapter_model.safetensors" in names and "model.safetensors" not in names
    on = train(folder, "lora-on", algorithm__name="dpo", model__lora_adapter_path=last, trainer__total_training_steps=1)
    assert on[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-6) and on[0]["train/margin"] == 0
    assert on[0]["train/chosen_logprob"] != whole[0]["train/chosen_logprob"], "it starts from the base and not from the adapter"


# Errors


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"algorithm__name": "dpoo"}, "no algorithms named 'dpoo'"),
        ({"algorithm__name": "grpo"}, "algorithm.name=grpo: is no method of preferences"),
        ({"algorithm__beta": 0.1}, "algorithm.beta: is a key of dpo, dpo_norm, .*; bradley_terry has no such key"),
        ({"algorithm__name": "dpo", "algorithm__beta": 0}, "algorithm.beta: 0.0 is not positive"),
        ({"algorithm__name": "dpo", "algorithm__label_smoothing": 0.5}, "algorithm.label_smoothing: 0.5 is not below a half"),
        ({"data__max_tokens_per_micro_batch": 300}, "cannot hold a pair"),
        ({"model__lora_rank": 8}, "model.lora_rank: a reward model is trained whole"),
        ({"model__lora_adapter_path": "adapter"}, "model.lora_adapter_path: a reward model is trained whole"),
        ({"model__context_parallel_size": 2}, "model.context_parallel_size: context parallelism is not supported"),
        (
            {"algorithm__name": "dpo", "model__context_parallel_size": 2},
            "model.context_parallel_size: context parallelism is not supported",
        ),
        ({"algorithm__name": "dpo", "model__lora_rank": 8, "model__target_modules": "[foo]"}, "no module matches 'foo'"),
        ({"data__prompt_key": "question"}, "column 'question' is missing"),
        ({"data__max_length": 40}, "rows are longer than data.max_length=40"),
        ({"model__partial_pretrain": "./nowhere"}, "no such model directory"),
    ],
)
def test_a_wrong_input_is_an_error_with_its_place(changes: dict[str, Any], said: str, folder: Path) -> None:
    with pytest.raises(UserError, match=said):
        train(folder, "wrong", **changes)


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reward_trainer.main(words(folder, "dry", trainer__dry_run=True))
    said = capsys.readouterr().out
    assert "rows 4,000 read, 4,000 used" in said and "a reward model, 8 steps (1,000 an epoch) of 4 pairs" in said
    assert not (folder / "dry").exists()
