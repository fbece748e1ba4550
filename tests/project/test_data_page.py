"""docs/data.md: its examples of files, mixtures and data sets are what the code reads."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from verl.config.commands import EvalConfig
from verl.config.load import load_config
from verl.config.sft import SFTConfig
from verl.data.row import Row
from verl.data.source import HUB_ID, read_rows, resolve_entries

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")


def blocks(section: str, language: str) -> list[str]:
    (text,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def rows(folder: Path, content: str, suffix: str) -> list[Row]:
    (folder / f"a.{suffix}").write_text(content, encoding="utf-8")
    return list(read_rows(str(folder / f"a.{suffix}")))


def test_the_examples_of_files_are_read_as_the_page_says(tmp_path: Path) -> None:
    with_nan, inside, numbers = (rows(tmp_path, block, "jsonl") for block in blocks("Files", "jsonl"))
    assert [row.text("answer", "data.response_key")[-2:] for row in with_nan] == ["12", "10"]
    assert "score" in with_nan[0].values and "score" not in with_nan[1].values
    assert inside[0].text("reward_model.ground_truth", "data.response_key") == "4"
    assert inside[0].text("extra_info.answer", "data.response_key") == "2 + 2 = 4"
    assert [row.text("answer", "data.response_key") for row in numbers] == ["42", "49"]
    (table,) = blocks("Files", "csv")
    assert [row.values for row in rows(tmp_path, table, "csv")] == [{"question": "How much is 1,5 + 1,5?", "answer": "3,0"}]


def test_the_commands_of_mixtures_are_configs_with_these_shares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("math", "chats"):
        (tmp_path / f"{name}.jsonl").write_text('{"a": 1}\n')
    (commands,), (settings,) = blocks("Mixtures", "bash"), blocks("Mixtures", "yaml")
    given = [shlex.split(command)[2:] for command in commands.splitlines()]
    (tmp_path / "mixture.yaml").write_text(settings)
    configs = [load_config(SFTConfig, [*words, "model.partial_pretrain=x"]) for words in (*given, ["--config", "mixture.yaml"])]
    shares = [[(entry.name, entry.weight, entry.rows) for entry in resolve_entries(config.data.train_files)] for config in configs]
    by_weight, by_rows = [("math.jsonl", 2.0, None), ("chats.jsonl", None, None)], [("math.jsonl", None, 5000), ("chats.jsonl", None, None)]
    assert shares == [by_weight, by_rows, by_weight]
    assert yaml.safe_load(settings)["data"]["train_files"] == configs[0].data.train_files


def test_the_commands_of_the_hub_name_data_sets() -> None:
    (commands,) = blocks("Data sets on the Hub", "bash")
    training, evaluation = (shlex.split(command)[2:] for command in commands.splitlines())
    assert HUB_ID.fullmatch(load_config(SFTConfig, [*training, "model.partial_pretrain=x"]).data.train_files)
    assert HUB_ID.fullmatch(load_config(EvalConfig, evaluation).test_file)
