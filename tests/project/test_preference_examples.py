"""The worked examples of docs/preferences.md, at small size, and the benchmark of memory."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pages import commands, links, text_of
from places import ROOT

from verl.config.load import load_config
from verl.config.pairs import RewardTrainerConfig
from verl.data.preferences import READS
from verl.plugin import load
from verl.trainer import fsdp_sft_trainer, reward_trainer

FOLDER = ROOT / "examples" / "preferences"
METHODS = sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem != "start")
SMALL = ["trainer.total_training_steps=2", "trainer.test_freq=2", "data.train_batch_size=4", "trainer.logger=[]"]


def module_of(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rows, fewer of them, and the start."""
    folder = tmp_path_factory.mktemp("reader")
    make_rows: Any = module_of(FOLDER / "make_rows.py")
    make_rows.TRAIN, make_rows.TEST = 40, 4
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        make_rows.main(Path("preferences"))
        fsdp_sft_trainer.main(["--config", str(FOLDER / "start.yaml"), *SMALL[:1], *SMALL[2:]])
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_an_example_trains_and_validates(method: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    reward_trainer.main(["--config", str(FOLDER / f"{method}.yaml"), *SMALL])
    steps = [json.loads(line) for line in (folder / "preferences" / method / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 2 and {"val/accuracy", "val/margin"} <= steps[-1].keys()
    assert (folder / "preferences" / method / "global_step_2" / "config.json").is_file()


def test_every_policy_method_has_an_example_and_its_file_says_what_it_reads() -> None:
    plugins = RewardTrainerConfig().algorithm.plugins
    built_in = {name for name, module in plugins.built_in().items() if module.scorer == "token_logprobs"}
    assert set(METHODS) == built_in
    for name in METHODS:
        config = load_config(RewardTrainerConfig, ["--config", str(FOLDER / f"{name}.yaml")])
        reads = getattr(load("verl.algorithms", name), "reads", "pairs")
        assert config.algorithm.name == name and reads in READS
        assert (config.data.margin_key is not None) == (reads == "margins")


def test_the_page_has_the_commands_and_a_figure_of_each_method() -> None:
    page = text_of("docs/preferences.md")
    assert ["verl", "reward", "--config", "examples/preferences/dpo.yaml"] in commands(page)
    linked = {link.path.name for link in links("docs/preferences.md")}
    assert {f"{name}.yaml" for name in METHODS} <= linked
    for name in METHODS:
        assert f"| `{name}` |" in page


# The benchmark


sys.path.insert(0, str(ROOT / "benchmarks"))

import preference_memory  # type: ignore[import-not-found]  # noqa: E402


def test_the_benchmark_measures_the_same_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "tiny", "--cpu", "--pairs", "1", "--prompt-tokens", "16", "--answer-tokens", "8", "--steps", "1"]
    assert preference_memory.main([*words, "--only", "sft lora; dpo lora, adapter off", "--out", str(tmp_path / "out.json")]) == 0
    sft, dpo = json.loads((tmp_path / "out.json").read_text())["results"]
    assert sft["tokens"] == dpo["tokens"] > 2 * (16 + 8) and dpo["ratio"] == pytest.approx(dpo["peak_gib"] / sft["peak_gib"])
    assert "wanted: at most 1.15" in capsys.readouterr().out


def test_the_benchmark_says_why_a_contestant_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "tiny", "--cpu", "--pairs", "1", "--prompt-tokens", "16", "--answer-tokens", "8", "--steps", "1"]
    assert preference_memory.main([*words, "--only", "sft lora", "--keys", "optim.lr=-1"]) == 1
    assert "exit code 2" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no contestant nothing"):
        preference_memory.main(["--only", "nothing"])


def test_the_table_says_whether_the_ratio_is_as_wanted() -> None:
    results = [preference_memory.Result("sft", 10, 2.0), preference_memory.Result("dpo, stored", 10, 2.5, 1.25)]
    _, first, second = preference_memory.table(results, on_gpu=True).splitlines()
    assert first.split() == ["sft", "10", "2.00"] and second.split()[-2:] == ["1.250", "no"]
