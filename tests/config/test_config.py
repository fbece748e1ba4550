"""From a command line to a typed config, and every way to get it wrong."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

import verl
from verl.config.commands import ChatConfig, DemoConfig, EvalConfig
from verl.config.load import ALIASES, describe, load_config, to_yaml
from verl.config.objects import config_of
from verl.config.pairs import RewardTrainerConfig
from verl.config.plugin_settings import completed
from verl.config.ppo import PPOConfig
from verl.config.sft import SFTConfig
from verl.config.unknown_keys import REJECTED
from verl.errors import UserError

NEEDED = ["data.train_files=train.jsonl", "model.partial_pretrain=model"]
SOURCE = Path(verl.__file__).parent


def load(*words: str) -> SFTConfig:
    return load_config(SFTConfig, [*NEEDED, *words])


def error_of(*words: str) -> UserError:
    with pytest.raises(UserError) as caught:
        load(*words)
    return caught.value


def leaves(schema: type) -> list[str]:
    """Its keys, with the own ones of the method, the reward and the optimizer that are there by default."""
    return leaves_of(completed(schema()))


def leaves_of(config: object, prefix: str = "") -> list[str]:
    found: list[str] = []
    for f in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, f.name)
        found += leaves_of(value, f"{prefix}{f.name}.") if dataclasses.is_dataclass(value) else [f"{prefix}{f.name}"]
    return found


def test_values_have_the_types_of_their_keys() -> None:
    config: Any = load("optim.lr=2e-5", "optim.betas=[0.8,0.9]", "data.packing=false", "data.train_batch_size=64", "data.val_files=null")
    assert config.optim.lr == 2e-5
    assert config.optim.betas == [0.8, 0.9]
    assert config.data.packing is False
    assert config.data.train_batch_size == 64
    assert config.data.val_files is None


def test_values_stand_as_they_were_typed() -> None:
    config = load(
        "data.train_files=~/data/*.jsonl", "trainer.logger=[console,~/mine.py]", "trainer.experiment_name=a=b c", "model.strategy=fsdp"
    )
    assert config.data.train_files == "~/data/*.jsonl"
    assert config.trainer.logger == ["console", "~/mine.py"]
    assert config.trainer.experiment_name == "a=b c"
    assert config.model.strategy == "fsdp"


def test_the_directory_follows_the_names() -> None:
    assert load("trainer.project_name=p", "trainer.experiment_name=e").trainer.default_local_dir == "checkpoints/p/e"


def test_words_win_over_files_and_later_files_over_earlier(tmp_path: Path) -> None:
    (tmp_path / "first.yaml").write_text("optim: {lr: 1e-3, clip_grad: 3}\ntrainer:\n  seed: 3\n")
    (tmp_path / "second.yaml").write_text("optim.lr: 1e-4\noptim.clip_grad: 4\n")
    config = load("--config", f"{tmp_path}/first.yaml", "optim.lr=1e-5", f"--config={tmp_path}/second.yaml")
    assert (config.optim.lr, config.optim.clip_grad, config.trainer.seed) == (1e-5, 4.0, 3)


def test_a_written_config_reads_back_as_itself(tmp_path: Path) -> None:
    config: Any = load("optim.lr=2e-5", "trainer.logger=[console,wandb]", "data.train_files=[a.jsonl,b.csv]", "trainer.save_freq=10")
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(SFTConfig, ["--config", f"{tmp_path}/config.yaml"]) == config


@pytest.mark.parametrize(
    ("word", "what", "fix"),
    [
        ("optim.learning_rate=1", "unknown key 'optim.learning_rate'", "did you mean"),
        ("data.promt_key=q", "unknown key 'data.promt_key'", "did you mean data.prompt_key?"),
        ("prompt_key=q", "unknown key 'prompt_key'", "did you mean data.prompt_key?"),
        ("data.shuffle=1", "unknown key 'data.shuffle'", "--help lists all keys"),
        ("trainer.swanlab=1", "unknown key 'trainer.swanlab'", "--help lists all keys"),
        ("leraning_rate=1", "unknown key 'leraning_rate'", "did you mean optim.lr?"),
        ("model.lora=1", "unknown key 'model.lora'", "did you mean model.lora_rank?"),
        ("optim=1", "optim is a group of keys", "optim.lr"),
        ("--lr", "there is no option '--lr'", "optim.lr=<value>"),
        ("train.jsonl", "'train.jsonl' is a file, and no key names it", "data.train_files=train.jsonl"),
        ("--config", "--config names no file", "--config FILE.yaml"),
    ],
)
def test_an_unknown_word_names_the_nearest_one(word: str, what: str, fix: str) -> None:
    error = error_of(word)
    assert what in str(error)
    assert fix in (error.fix or "")


@pytest.mark.parametrize(("schema", "key"), [(SFTConfig, "data.train_files"), (EvalConfig, "test_file")])
def test_a_file_without_a_key_gets_the_key_of_its_command_only(schema: type, key: str) -> None:
    with pytest.raises(UserError) as error:
        load_config(schema, ["train.jsonl"])
    assert error.value.fix == f"write {key}=train.jsonl"


@pytest.mark.parametrize(
    "word", ["optim.lr=fast", "data.packing=maybe", "data.max_length=1.5", "optim.betas=0.9", "data.train_files=[a", "trainer.seed=null"]
)
def test_a_value_of_the_wrong_type_names_its_key(word: str) -> None:
    assert error_of(word).where == word.partition("=")[0]


@pytest.mark.parametrize(
    ("words", "where"),
    [
        ("data.truncation=middle", "data.truncation"),
        ("data.max_length=1", "data.max_length"),
        ("data.train_batch_size=0", "data.train_batch_size"),
        ("data.train_max_samples=0", "data.train_max_samples"),
        ("data.max_tokens_per_micro_batch=100", "data.max_tokens_per_micro_batch"),
        ("data.messages_key=m data.text_key=t", "data"),
        ("data.tools_key=t data.text_key=text", "data.tools_key"),
        ("data.train_turns=first", "data.train_turns"),
        ("data.text_is_rendered=true data.messages_key=messages", "data.text_is_rendered"),
        ("model.strategy=fsdp3", "model.strategy"),
        ("model.compute_dtype=float16", "model.compute_dtype"),
        ("optim.lr=-1", "optim.lr"),
        ("optim.lr=.nan", "optim.lr"),
        ("optim.betas=[0.9]", "optim.betas"),
        ("optim.betas=[0.9,1.0]", "optim.betas"),
        ("optim.clip_grad=0", "optim.clip_grad"),
        ("optim.lr_scheduler=step", "optim.lr_scheduler"),
        ("optim.warmup_steps_ratio=10", "optim.warmup_steps_ratio"),
        ("trainer.resume_mode=resume_path", "trainer.resume_mode"),
        ("trainer.resume_from_path=x", "trainer.resume_mode"),
        ("trainer.save_freq=0", "trainer.save_freq"),
        ("trainer.test_freq=never", "trainer.test_freq"),
        ("trainer.max_ckpt_to_keep=0", "trainer.max_ckpt_to_keep"),
        ("trainer.total_epochs=0", "trainer.total_epochs"),
    ],
)
def test_what_cannot_be_meant_names_its_key(words: str, where: str) -> None:
    error = error_of(*words.split())
    assert error.where == where
    assert error.fix


def test_what_must_be_given_is_asked_for_at_once() -> None:
    with pytest.raises(UserError, match=r"data\.train_files and model\.partial_pretrain must be given"):
        load_config(SFTConfig, [])


@pytest.mark.parametrize(
    ("text", "place", "found"),
    [
        ("optim:\n  lr: 1\n  lr: 2\n", ":3", "'lr' is given twice, first on line 2"),
        ("optim: [\n", ":2", "not YAML"),
        ("- a\n", "", "found a list, expected keys and values"),
        ("- {role: user, content: Hello}\n", "", "a list of chat messages, which is data"),
        ("- {from: human, value: Hello}\n", "", "a list of chat messages, which is data"),
        ("Hello", "", "found text, expected keys and values"),
        ("", "", "the config file has no keys"),
        ("---\n", "", "the config file has no keys"),
        ("# optim: {lr: 1}\n", "", "the config file has no keys"),
        ("~\n", "", "the config file has no keys"),
        ("---\n---\noptim: {lr: 1}\n", ":2", "a second YAML document begins here"),
        ("optim: {lr: 1}\n---\n", ":2", "a second YAML document begins here"),
        ("optim:\n  lrr: 1\n", "", "unknown key 'optim.lrr'"),
        ("optim:\n  lr: fast\n", ": optim.lr", "fast"),
    ],
)
def test_a_wrong_file_is_named_with_the_line(tmp_path: Path, text: str, place: str, found: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    error = error_of("--config", str(path))
    assert error.where == f"{path}{place}"
    assert found in error.what


def test_a_missing_file_is_named() -> None:
    assert error_of("--config", "nowhere.yaml").where == "nowhere.yaml"


@pytest.mark.parametrize("value", ["${oc.env:HOME}", "${oc.decode:x}"])
def test_a_config_reads_nothing_from_the_environment(value: str) -> None:
    assert "supports only ${key};" in (error_of(f"trainer.project_name={value}").fix or "")


def test_a_reference_to_nothing_is_an_error() -> None:
    error = error_of("trainer.project_name=${nothing.here}")
    assert (error.where, error.fix) == ("trainer.project_name", "correct the ${…} in the value")


@pytest.mark.parametrize(("written", "read"), sorted(ALIASES.items()))
def test_upstream_spellings_are_read(written: str, read: str) -> None:
    assert read in leaves(SFTConfig)
    value = "0.5" if "ratio" in written else "{'x': 1}" if "kwargs" in written else "x"
    group, name = read.split(".")
    assert str(getattr(getattr(load(f"{written}={value}"), group), name)) == value


@pytest.mark.parametrize(
    "words",
    [
        ["data.chat_template_kwargs={enable_thinking: false}"],
        ["+data.apply_chat_template_kwargs.enable_thinking=False"],
        ["data.chat_template_kwargs.enable_thinking=true", "data.chat_template_kwargs.enable_thinking=false"],
    ],
)
def test_a_mapping_is_given_whole_or_by_its_keys(words: list[str], tmp_path: Path) -> None:
    config = load(*words)
    assert config.data.chat_template_kwargs == {"enable_thinking": False}
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    assert load_config(SFTConfig, ["--config", str(tmp_path / "run.yaml")]) == config
    assert config_of(SFTConfig, [config]) == config


@pytest.mark.parametrize("key", sorted(REJECTED))
def test_upstream_keys_without_a_place_here_are_answered_with_keys_that_exist(key: str) -> None:
    error = error_of(f"{key}=1")
    assert "is not supported here" in error.what
    named = re.findall(r"\b(?:data|model|optim|trainer)\.[a-z_.]*[a-z_]", error.fix or "")
    assert all(any(leaf == name or leaf.startswith(f"{name}.") for leaf in leaves(SFTConfig)) for name in named)


@pytest.mark.parametrize("schema", [SFTConfig, PPOConfig, RewardTrainerConfig, EvalConfig, ChatConfig, DemoConfig])
def test_help_shows_every_key(schema: type) -> None:
    shown = re.findall(r"^  ([\w.]+)=", describe(schema), re.MULTILINE)
    assert shown == leaves(schema)


# It has one value, and config.py sees to that.
ONE_VALUE = {"model.strategy"}


def unread(schema: type, text: str) -> list[str]:
    return [key for key in leaves(schema) if key not in ONE_VALUE and not re.search(rf"\.{key.rpartition('.')[2]}\b", text)]


@pytest.mark.parametrize("schema", [SFTConfig, PPOConfig, RewardTrainerConfig, EvalConfig, ChatConfig, DemoConfig])
def test_every_key_is_read_by_code(schema: type) -> None:
    files = [path for path in SOURCE.rglob("*.py") if path.name not in ("config.py", "py")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    assert unread(schema, text) == []


def test_a_key_that_no_code_reads_is_noticed() -> None:
    assert "optim.clip_grad" in unread(SFTConfig, "config.optim.lr")
    assert "optim.lr" not in unread(SFTConfig, "config.optim.lr")
