"""A directory is taken for what it is, in every command."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import as_words
from tiny import qwen2_config, write_problems_and_model
from transformers import AutoModelForTokenClassification, Qwen2ForSequenceClassification

import verl
from verl.errors import UserError
from verl.models.kind import ADAPTER, CRITIC, LANGUAGE_MODEL, REWARD_MODEL, check_kind, kind_of

KINDS = {
    "model": LANGUAGE_MODEL,
    "reward": REWARD_MODEL,
    "critic": CRITIC,
    "adapter": ADAPTER,
    "reward_adapter": f"{ADAPTER} of {REWARD_MODEL}",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One directory of each kind, with tokenizers."""
    folder = write_problems_and_model(tmp_path_factory.mktemp("kinds"), train_rows=12, test_rows=4)
    for name, kind in (("reward", Qwen2ForSequenceClassification), ("critic", AutoModelForTokenClassification)):
        config = qwen2_config(num_labels=1)
        model = kind.from_config(config) if kind is AutoModelForTokenClassification else kind(config)
        model.save_pretrained(folder / name)
    for name, task, base in (("adapter", "CAUSAL_LM", "model"), ("reward_adapter", "SEQ_CLS", "reward")):
        settings = {"peft_type": "LORA", "task_type": task, "base_model_name_or_path": str(folder / base)}
        (folder / name).mkdir()
        (folder / name / "adapter_config.json").write_text(json.dumps(settings))
        (folder / name / "adapter_model.safetensors").touch()
    for name in ("reward", "critic", "adapter", "reward_adapter"):
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(folder / "model" / file, folder / name / file)
    (folder / "pairs.jsonl").write_text('{"prompt": "1 + 1?", "chosen": "2", "rejected": "3"}\n' * 4)
    return folder


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_is_recognised(name: str, folder: Path) -> None:
    assert kind_of(str(folder / name)) == KINDS[name]


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        ("Gemma3ForConditionalGeneration", LANGUAGE_MODEL),
        ("GPT2LMHeadModel", LANGUAGE_MODEL),
        ("LlamaForRewardModelWithGating", REWARD_MODEL),
        ("Qwen2ForProcessRewardModel", REWARD_MODEL),
        ("BertForMaskedLM", "a model with another head"),
        ("DebertaV2ForQuestionAnswering", "a model with another head"),
    ],
)
def test_an_architecture_has_its_kind(architecture: str, kind: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    assert kind_of(str(tmp_path)) == kind


@pytest.mark.parametrize("text", ["", "[]", "{", '{"architectures": 3}', '{"architectures": [3]}', "null"])
def test_a_damaged_config_is_left_to_those_who_read_it(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    assert kind_of(str(tmp_path)) in (None, LANGUAGE_MODEL)


def test_an_adapter_of_a_reward_model_is_known_by_its_base_too(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(folder / "reward")}))
    assert kind_of(str(tmp_path)) == f"{ADAPTER} of {REWARD_MODEL}"


def test_a_name_of_the_hub_and_an_empty_directory_are_not_judged(tmp_path: Path) -> None:
    assert kind_of("org/name") is None and kind_of(str(tmp_path)) is None
    check_kind("org/name", (LANGUAGE_MODEL,))


def sft(folder: Path, **changes: object) -> None:
    verl.sft(*as_words({"data.train_files": folder / "train.jsonl", "trainer.default_local_dir": folder / "sft"}, changes))


def ppo(folder: Path, **changes: object) -> None:
    keys = {
        "data.train_files": folder / "train.jsonl",
        "model.partial_pretrain": folder / "model",
        "trainer.default_local_dir": folder / "rl",
    }
    verl.ppo(*as_words({**keys, "trainer.default_local_dir": folder / "rl", "algorithm.name": "ppo"}, changes))


def reward(folder: Path, **changes: object) -> None:
    verl.reward(*as_words({"data.train_files": folder / "pairs.jsonl", "trainer.default_local_dir": folder / "pairs"}, changes))


def evaluate(folder: Path, model: Path) -> None:
    verl.evaluate({"model_path": model, "test_file": folder / "test.jsonl", "output_dir": folder / "eval"})


def chat(model: Path) -> None:
    from verl import chat as chat_module
    from verl.config.commands import ChatConfig

    chat_module.open_chat(ChatConfig(model_path=str(model)))


NO_MODEL = ("reward", "critic", "adapter", "reward_adapter")
NO_ANSWER = ("reward", "critic", "reward_adapter")
COMMANDS: dict[str, tuple[tuple[str, ...], str, Callable[[Path, Path], object]]] = {
    "sft": (NO_MODEL, "a language model", lambda folder, path: sft(folder, model__partial_pretrain=path)),
    "sft, adapter": (
        ("model", "reward", "critic", "reward_adapter"),
        "a LoRA adapter",
        lambda folder, path: sft(folder, model__partial_pretrain=folder / "model", model__lora_adapter_path=path),
    ),
    "ppo, policy": (("reward", "critic"), "a language model", lambda folder, path: ppo(folder, model__partial_pretrain=path)),
    "ppo, adapter": (
        ("model", "reward", "critic", "reward_adapter"),
        "a LoRA adapter",
        lambda folder, path: ppo(folder, model__lora_adapter_path=path),
    ),
    "ppo, critic": (
        ("adapter", "reward_adapter"),
        "a critic or a language model or a reward model",
        lambda folder, path: ppo(folder, critic__partial_pretrain=path),
    ),
    "ppo, reward model": (
        ("critic", "adapter", "reward_adapter"),
        "a reward model",
        lambda folder, path: ppo(folder, reward_model__path=path),
    ),
    "reward": (
        ("critic", "adapter", "reward_adapter"),
        "a language model or a reward model",
        lambda folder, path: reward(folder, model__partial_pretrain=path),
    ),
    "dpo": (NO_MODEL, "a language model", lambda folder, path: reward(folder, algorithm__name="dpo", model__partial_pretrain=path)),
    "eval": (NO_ANSWER, "a language model or a LoRA adapter", evaluate),
    "chat": (NO_ANSWER, "a language model or a LoRA adapter", lambda folder, path: chat(path)),
    "load_rollout": (NO_ANSWER, "a language model or a LoRA adapter", lambda folder, path: verl.load_rollout(path)),
    "export": (
        NO_ANSWER,
        "a language model or a LoRA adapter",
        lambda folder, path: verl.export({"source": path, "directory": folder / "out"}),
    ),
}
GIVEN = [(command, name) for command, (names, _, _) in COMMANDS.items() for name in names]


@pytest.mark.parametrize(("command", "name"), GIVEN)
def test_what_is_something_else_is_refused_by_name(command: str, name: str, folder: Path) -> None:
    _, wanted, call = COMMANDS[command]
    with pytest.raises(UserError) as capture:
        call(folder, folder / name)
    told = str(capture.value)
    assert str(folder / name) in told and f"is {KINDS[name]}" in told and f", not {wanted}" in told and "fix: give " in told


@pytest.mark.parametrize("name", ["adapter", "reward_adapter"])
def test_a_policy_that_is_an_adapter_is_refused(name: str, folder: Path) -> None:
    with pytest.raises(UserError, match="is an adapter, not a whole model"):
        ppo(folder, model__partial_pretrain=folder / name)


def test_a_reward_model_that_is_a_language_model_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="is a language model without a scoring head"):
        ppo(folder, reward_model__path=folder / "model")
