"""Data sets on the Hub: configurations and splits, from the cache that `datasets` keeps, without a network."""

import json
from collections.abc import Sequence
from pathlib import Path

import datasets
import pyarrow as pa  # type: ignore[import-untyped]
import pytest

from verl.data import hub
from verl.data.source import content_hash, describe_sources, read_rows, resolve_entries, resolve_files, size_bytes
from verl.errors import UserError

TRAIN, TEST = "data.train_files", "test_file"


@pytest.fixture(autouse=True)
def hub_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "LOADED", {})
    return tmp_path


def write_data_set(folder: Path, name: str, configs: Sequence[str] = ("default",), splits: Sequence[str] = ("train", "test")) -> None:
    """Write a data set as `datasets` keeps it after a download; each split has one row, which names it."""
    short = name.rpartition("/")[2]
    for config in configs:
        path = folder / name.replace("/", "___") / config / "0.0.0" / ("a" * 40)
        path.mkdir(parents=True)
        for split in splits:
            table = pa.table({"question": [f"{config} {split}"], "answer": ["2"]})
            with pa.OSFile(str(path / f"{short}-{split}.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
                writer.write_table(table)
        info = {
            "builder_name": short,
            "dataset_name": short,
            "config_name": config,
            "version": {"version_str": "0.0.0", "major": 0, "minor": 0, "patch": 0},
            "features": {column: {"dtype": "string", "_type": "Value"} for column in ("question", "answer")},
            "splits": {split: {"name": split, "num_bytes": 100, "num_examples": 1, "dataset_name": short} for split in splits},
        }
        (path / "dataset_info.json").write_text(json.dumps(info))


def questions(name: str, key: str) -> list[object]:
    return [row.values["question"] for row in read_rows(name, key)]


def error_of(name: str, key: str = TRAIN) -> UserError:
    with pytest.raises(UserError) as caught:
        list(read_rows(name, key))
    return caught.value


def test_training_takes_train_and_evaluation_takes_test(hub_folder: Path) -> None:
    write_data_set(hub_folder, "org/name")
    assert questions("org/name", TRAIN) == ["default train"]
    assert questions("org/name", TEST) == questions("org/name", "data.val_files") == ["default test"]
    (row,) = read_rows("org/name")
    assert row.where == "org/name:default:train row 1"


def test_evaluation_takes_validation_where_there_is_no_test(hub_folder: Path) -> None:
    write_data_set(hub_folder, "org/name", splits=("train", "validation"))
    assert questions("org/name", TEST) == ["default validation"]


def test_evaluation_does_not_take_train_unless_it_is_named(hub_folder: Path) -> None:
    write_data_set(hub_folder, "org/name", splits=("train",))
    error = error_of("org/name", TEST)
    assert error.what == "the data set has no split for evaluation (test or validation); it has train"
    assert error.fix == "name the split: org/name:default:train"
    assert questions("org/name::train", TEST) == ["default train"]


def test_a_configuration_and_a_split_can_be_named(hub_folder: Path) -> None:
    write_data_set(hub_folder, "org/name", ("main", "socratic"))
    assert questions("org/name:socratic", TRAIN) == ["socratic train"]
    assert questions("org/name:main:test", TRAIN) == ["main test"]
    entries = resolve_entries(["org/name:main", "org/name:socratic:test"])
    assert describe_sources(entries) == [
        "org/name: configuration main, split train (of train, test)",
        "org/name: configuration socratic, split test (of train, test)",
    ]


def test_several_configurations_are_listed_in_full(hub_folder: Path) -> None:
    write_data_set(hub_folder, "org/name", ("main", "socratic"))
    error = error_of("org/name")
    assert error.what == "the data set has several configurations: main, socratic"
    assert error.fix == "name one: org/name:main or org/name:socratic"
    assert error_of("org/name:mian").what == "the data set has no configuration mian: main, socratic"


def test_a_missing_split_lists_those_that_exist(hub_folder: Path) -> None:
    write_data_set(hub_folder, "org/name", splits=("train", "test"))
    assert error_of("org/name:default:dev").what == "the data set has no split dev; it has train, test"
    write_data_set(hub_folder, "org/tests", splits=("test", "validation"))
    assert error_of("org/tests").what == "the data set has no split train; it has test, validation"


def test_configurations_and_splits_have_caches_of_their_own(hub_folder: Path) -> None:
    write_data_set(hub_folder, "org/name", ("main", "socratic"))
    names = ("org/name:main", "org/name:socratic", "org/name:main:test")
    sources = [resolve_files(name) for name in names]
    assert sources == [["org/name:main:train"], ["org/name:socratic:train"], ["org/name:main:test"]]
    assert len({content_hash(one) for one in sources}) == 3 and all(size_bytes(one) for one in sources)


@pytest.mark.parametrize(
    ("message", "configs"),
    [
        (
            "Config name is missing.\nPlease pick one among the available configs: ['main', 'socratic']\nExample of usage: …",
            "main, socratic",
        ),
        ("BuilderConfig 'x' not found. Available: ['main', 'socratic']", "main, socratic"),
    ],
)
def test_what_datasets_says_online_is_understood(monkeypatch: pytest.MonkeyPatch, message: str, configs: str) -> None:
    def load(*_: object) -> None:
        raise ValueError(message)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert error_of("org/name").what == f"the data set has several configurations: {configs}"


def test_only_the_wanted_columns_of_a_data_set_are_decoded(hub_folder: Path) -> None:
    write_data_set(hub_folder, "org/name")
    (row,) = read_rows("org/name", wanted=lambda names: ("answer",))
    assert row.values == {"answer": "2"} and row.unread == {"question": None}
    with pytest.raises(UserError, match=r"'text' is missing \(found: answer, question\)"):
        row.text("text", "data.text_key")
    (whole,) = read_rows("org/name")
    assert whole.values == {"question": "default train", "answer": "2"} and not whole.unread
