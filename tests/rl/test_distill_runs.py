"""Runs of `verl ppo algorithm.name=distill`: alone and beside a reward, on one process and two, resumed, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rl_runs import check_same, run_on, train, words, write_folder
from runs import lines_of, metrics_of, timeless
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from verl import dist
from verl.config.load import load_config
from verl.config.ppo import PPOConfig
from verl.errors import UserError
from verl.models.load import load_tokenizer
from verl.rl.method import load_method
from verl.trainer import fsdp_sft_trainer, ppo_trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student, a wider teacher of another architecture whose embeddings have rows of filler, and an adapter of the student."""
    folder = write_folder(tmp_path_factory.mktemp("distill"))
    write_teacher(folder / "teacher", folder / "model")
    return folder


def write_teacher(path: Path, student: Path, *, seed: int = 3) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(student)
    torch.manual_seed(seed)
    shape: dict[str, Any] = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "initializer_range": 0.1,
    }
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer) + 8, max_position_embeddings=512, **shape)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def of_teacher(folder: Path, **changes: object) -> dict[str, object]:
    alone = {"algorithm__name": "distill", "teacher__partial_pretrain": folder / "teacher", "reward__name": "null"}
    return {**alone, "rollout__samples_per_prompt": 2, **changes}


def test_a_student_learns_from_its_teacher_alone_and_says_which(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = train(folder, "alone", **of_teacher(folder, optim__lr=3e-3, trainer__total_training_steps=8))
    assert found[-1]["rl/divergence"] < 0.7 * found[0]["rl/divergence"]
    assert all(line["train/loss"] == pytest.approx(line["rl/divergence"]) and line["rl/rollout_difference"] < 1e-5 for line in found)
    said = capsys.readouterr().out
    assert "LlamaForCausalLM" in said and "frozen; reverse divergence over all tokens, temperature 1" in said
    assert "equal rewards" not in said and "reference: none" in said


def test_a_prompt_that_is_shared_by_its_answers_changes_nothing(folder: Path) -> None:
    changes = of_teacher(folder, teacher__divergence="mix", teacher__top_k=20, rollout__samples_per_prompt=4)
    shared, alone = (
        train(folder, f"prompts-{how}", **changes, data__share_prompts=how, data__max_tokens_per_micro_batch=tokens)
        for how, tokens in (("auto", 300), ("never", 200))
    )
    assert "prompts: shared" in (folder / "prompts-auto" / "train.log").read_text()
    for here, there in zip(shared, alone, strict=True):
        for name in ("train/loss", "train/grad_norm", "rl/divergence", "rl/teacher_gap", "rl/teacher_agreement"):
            assert here[name] == pytest.approx(there[name], rel=1e-4, abs=1e-6), name


def test_two_processes_learn_the_same_from_an_adapter_as_a_teacher_and_a_reward_beside_it(folder: Path) -> None:
    """Sharded, the student an adapter too."""
    train_adapter(folder)
    changes: dict[str, object] = {"teacher__partial_pretrain": folder / "adapter", "reward__name": folder / "vowels.py"}
    changes |= {"teacher__weight": 0.5, "algorithm__kl_coef": 0.1, "algorithm__keep_reference": "true", "algorithm__updates_per_step": 2}
    changes = of_teacher(folder, **changes, model__lora_rank=4, optim__lr=1e-2, rollout__samples_per_prompt=4)
    expected, found = run_on(1, folder, "one", **changes), run_on(2, folder, "two", model__strategy="fsdp2", **changes)
    check_same(found, expected)
    for here, there in zip(metrics_of(found), metrics_of(expected), strict=True):
        for name in ("rl/divergence", "rl/teacher_gap", "rl/teacher_agreement"):
            assert here[name] == pytest.approx(there[name], rel=1e-4, abs=1e-5), name
        assert here["rl/divergence"] > 0


def train_adapter(folder: Path) -> None:
    given = [f"data.train_files={folder}/train.jsonl", f"model.partial_pretrain={folder}/model", "model.lora_rank=4", "optim.lr=1e-2"]
    given += [f"data.cache_dir={folder}/cache", f"trainer.default_local_dir={folder}/of-adapter", "trainer.total_training_steps=3"]
    checkpoint = fsdp_sft_trainer.train(load_config(fsdp_sft_trainer.SFTConfig, given)).checkpoint
    assert checkpoint is not None
    dist.stop()
    shutil.copytree(checkpoint, folder / "adapter")


def test_a_resumed_run_is_the_uninterrupted_one_and_another_teacher_is_refused(folder: Path, tmp_path: Path) -> None:
    changes = of_teacher(folder, teacher__partial_pretrain=shutil.copytree(folder / "teacher", tmp_path / "teacher"))
    train(folder, "cut", **changes, trainer__total_training_steps=2)
    resumed = train(folder, "cut", **changes)
    assert timeless(resumed) == timeless(train(folder, "whole", **changes))
    with pytest.raises(UserError, match=r"teacher\.temperature: 1\.0 -> 2\.0"):
        train(folder, "cut", **changes, teacher__temperature=2.0, trainer__total_training_steps=6)
    write_teacher(tmp_path / "teacher", folder / "model", seed=4)
    with pytest.raises(UserError, match=r"content of teacher\.partial_pretrain"):
        train(folder, "cut", **changes, trainer__total_training_steps=6)


def other_tokens(folder: Path, into: Path) -> Path:
    """A teacher that knows a token which the student's tokenizer does not have."""
    shutil.copytree(folder / "teacher", into)
    tokenizer = load_tokenizer(str(into))
    tokenizer.add_tokens(["<think>"])
    tokenizer.save_pretrained(into)
    return into


def test_a_teacher_with_another_tokenizer_is_refused_with_the_token(folder: Path, tmp_path: Path) -> None:
    other = other_tokens(folder, tmp_path / "other")
    with pytest.raises(UserError, match="another tokenizer than the student: 1 tokens differ, such as '<think>'") as error:
        train(folder, "tokens", **of_teacher(folder, teacher__partial_pretrain=other))
    assert error.value.where == f"teacher.partial_pretrain={other}" and error.value.fix
    assert not list((folder / "tokens").glob("*"))


REFUSED: dict[str, tuple[dict[str, object], str]] = {
    "no teacher": ({"teacher__partial_pretrain": "null", "reward__name": "gsm8k"}, "learns from a teacher"),
    "a method without": ({"algorithm__name": "reinforce", "reward__name": "gsm8k"}, "learns from no teacher"),
    "no such model": ({"teacher__partial_pretrain": "./nowhere"}, "nowhere"),
    "weight 0": ({"teacher__weight": 0.0}, r"found 0\.0"),
    "beta 1": ({"teacher__beta": 1.0}, r"found 1\.0"),
    "no divergence": ({"teacher__divergence": "l2"}, "l2"),
    "top 0": ({"teacher__top_k": 0}, "0"),
    "temperature": ({"teacher__temperature": 0}, "not positive"),
    "no reward beside it": ({"teacher__weight": 0.5}, "neither a reward nor a reward model"),
    "one answer": ({"teacher__weight": 0.5, "reward__name": "gsm8k", "rollout__samples_per_prompt": 1}, "compares the answers"),
    "penalty without a reward": ({"algorithm__kl_coef": 0.1, "algorithm__keep_reference": "true"}, "no part in the loss"),
    "groups without a reward": ({"algorithm__dynamic_sampling": "true"}, "no part in the loss"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_right_is_refused_before_anything_is_written(folder: Path, name: str) -> None:
    changes, said = REFUSED[name]
    with pytest.raises(UserError, match=said) as error:
        ppo_trainer.main(words(folder, "refused", **of_teacher(folder, **changes)))
    assert error.value.where and error.value.fix
    assert not (folder / "refused").exists()


def test_answers_of_older_weights_need_a_correction_only_beside_a_reward(folder: Path) -> None:
    def method(**changes: object) -> object:
        return load_method(load_config(PPOConfig, words(folder, "stale", **of_teacher(folder, rollout__staleness=1, **changes))))

    assert method()
    beside: dict[str, object] = {"teacher__weight": 0.5, "reward__name": "gsm8k"}
    with pytest.raises(UserError, match="older weights"):
        method(**beside)
    assert method(**beside, algorithm__importance_weights="truncate")


def test_validation_needs_no_reward_either(folder: Path) -> None:
    train(folder, "validated", **of_teacher(folder, trainer__total_training_steps=1, data__val_files=folder / "test.jsonl"))
    lines = lines_of(folder / "validated" / "rollouts" / "validation_1.jsonl")
    assert len(lines) == 20 and json.dumps(lines[0])
