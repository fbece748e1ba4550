"""Names stay what was typed: a key that holds text keeps the text, on the command line, in files and in Python."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from verl.config.assignments import argument, assignments_in, type_of
from verl.config.load import load_config, to_yaml
from verl.config.objects import config_of
from verl.config.pairs import RewardTrainerConfig
from verl.config.sft import SFTConfig
from verl.errors import UserError

NEEDED = ["data.train_files=train.jsonl", "model.partial_pretrain=model"]
LIKE_NUMBERS = ["1.10", "007", "2025_11", "12:30", "1e5", "0x1F", "1_000", "+1", ".5", ".inf", "2025-11-28"]
LIKE_WORDS = ["on", "off", "yes", "No", "true", "False", "null", "Null", "~"]


def named(*words: str) -> SFTConfig:
    return load_config(SFTConfig, [*NEEDED, *words])


def file_with(tmp_path: Path, text: str) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return f"--config={path}"


@pytest.mark.parametrize("name", LIKE_NUMBERS + LIKE_WORDS)
def test_a_name_that_looks_like_something_else_is_kept_as_typed(name: str, tmp_path: Path) -> None:
    typed = named(f"trainer.experiment_name={name}").trainer
    assert (typed.experiment_name, typed.default_local_dir) == (name, f"checkpoints/verl-sft/{name}")
    in_file = named(file_with(tmp_path, f"trainer:\n  experiment_name: {name}\n")).trainer
    assert (in_file.experiment_name, in_file.default_local_dir) == (name, f"checkpoints/verl-sft/{name}")


@pytest.mark.parametrize("name", [*LIKE_NUMBERS, *LIKE_WORDS, "[draft]", "{a}", "[INST] hi", "=", "<<", "a # b", '"'])
def test_what_a_run_writes_down_of_its_names_reads_back_as_itself(name: str, tmp_path: Path) -> None:
    config = named(f"trainer.experiment_name={name}", f"data.messages_key={'x' if name in LIKE_WORDS else name}")
    assert config.trainer.experiment_name == name
    assert load_config(SFTConfig, [file_with(tmp_path, to_yaml(config))]) == config == config_of(SFTConfig, [config])


@pytest.mark.parametrize("word", ["null", "~", "Null"])
def test_a_key_that_may_be_null_is_null(word: str, tmp_path: Path) -> None:
    assert named("data.messages_key=a", f"data.messages_key={word}").data.messages_key is None
    assert named(file_with(tmp_path, f"data.messages_key: {word}\n")).data.messages_key is None
    assert named(f'data.messages_key="{word}"').data.messages_key == word


def test_quotes_of_yaml_are_not_part_of_the_text() -> None:
    assert named("trainer.experiment_name='on'").trainer.experiment_name == "on"
    assert named('trainer.experiment_name="1.10"').trainer.experiment_name == "1.10"


def test_other_keys_have_their_own_types(tmp_path: Path) -> None:
    words = [
        "optim.lr=1e-5",
        "data.packing=false",
        "trainer.save_freq=10",
        "trainer.total_training_steps=1_000",
        "data.train_batch_size=null",
    ]
    config = named(*words)
    in_file = named(file_with(tmp_path, "\n".join(word.replace("=", ": ") for word in words)))
    assert config == in_file
    assert (config.optim.lr, config.data.packing, config.trainer.save_freq, config.trainer.total_training_steps) == (1e-5, False, 10, 1000)


def test_a_missing_text_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.yaml: trainer\.experiment_name"):
        named(file_with(tmp_path, "trainer:\n  experiment_name:\n"))
    with pytest.raises(UserError, match=r"trainer\.experiment_name"):
        config_of(SFTConfig, [*NEEDED, {"trainer": {"experiment_name": None}}])


def test_merged_and_oddly_named_keys_of_a_file_are_read(tmp_path: Path) -> None:
    text = "trainer: &names\n  project_name: 1.10\n  experiment_name: on\nmore: {<<: *names, experiment_name: 007}\non: 1\n2: x\n"
    found = {one.key: one.value_for(str) for one in assignments_in(Path(file_with(tmp_path, text).partition("=")[2]))}
    assert found == {
        "trainer.project_name": "1.10",
        "trainer.experiment_name": "on",
        "more.project_name": "1.10",
        "more.experiment_name": "007",
        "on": "1",
        "2": "x",
    }


@dataclass
class Keys:
    names: list[str]
    some: list[str] | None
    mode: Literal["on", "off"]
    labels: dict[str, str]
    numbers: list[float]
    anything: Any


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("names", "[1.10, 007, on, 'x y', null]", ["1.10", "007", "on", "x y", "null"]),
        ("some", "[12:30]", ["12:30"]),
        ("some", "null", None),
        ("mode", "off", "off"),
        ("labels", "{a: 1.10, b: on}", {"a": "1.10", "b": "on"}),
        ("labels.a", "1.10", "1.10"),
        ("numbers", "[1e-5, 2]", [1e-5, 2]),
        ("anything", "[1.10, true, text]", [1.1, True, "text"]),
        ("unknown", "1.10", 1.1),
    ],
)
def test_texts_inside_lists_and_of_every_kind_of_key_are_kept(key: str, text: str, expected: object, tmp_path: Path) -> None:
    kind = type_of(Keys([], None, "on", {}, [], None), key)
    assert argument(key, text).value_for(kind) == expected
    if not text.startswith("{"):  # a mapping in a file is several keys
        (in_file,) = assignments_in(Path(file_with(tmp_path, f"key: {text}\n").partition("=")[2]))
        assert in_file.value_for(kind) == expected


def test_the_keys_of_plugins_keep_their_texts(tmp_path: Path) -> None:
    plugin = tmp_path / "007.py"
    plugin.write_text(
        "from dataclasses import dataclass, field\nscorer, values = 'token_logprobs', ()\nclass Loss: ...\n"
        "@dataclass\nclass Settings:\n    version: str = '1'\n    tags: list[str] = field(default_factory=list)\n"
    )
    words = [f"algorithm.name={plugin}", "algorithm.version=1.10", "algorithm.tags=[on,2025_11]"]
    config: Any = load_config(RewardTrainerConfig, [*NEEDED, *words])
    assert (config.algorithm.version, config.algorithm.tags) == ("1.10", ["on", "2025_11"])


def test_a_list_that_cannot_be_read_is_an_error_where_a_list_is_asked_for() -> None:
    assert argument("k", "[INST] hi").value_for(str) == "[INST] hi"
    with pytest.raises(UserError, match="cannot read the value"):
        argument("k", "[INST] hi").value_for(list[str])


@pytest.mark.parametrize("name", ["~nobody-here/model", "~\ud800/model", "~a\0b"])
def test_the_home_of_nobody_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"model\.partial_pretrain"):
        load_config(SFTConfig, ["data.train_files=a.jsonl", f"model.partial_pretrain={name}"])
