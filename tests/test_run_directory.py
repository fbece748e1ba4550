"""A run's directory stands for its newest complete checkpoint, or its best one, and this is said."""

import json
from pathlib import Path

import pytest

from verl import run_directory
from verl.config.commands import ChatConfig, EvalConfig
from verl.config.load import load_config
from verl.config.ppo import PPOConfig
from verl.config.sft import SFTConfig
from verl.errors import UserError
from verl.manifest import Entry, Manifest, entry_of


def write_step(run: Path, step: int, loss: float | None = None) -> Path:
    folder = run / f"global_step_{step}"
    (folder / "trainer").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "trainer" / "state.json").write_text(json.dumps({"validation": {} if loss is None else {"val/loss": loss}}))
    files: dict[str, Entry] = {name: entry_of(folder / name) for name in ("config.json", "trainer/state.json")}
    Manifest("0.1", step, 1, files).write(folder)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run_directory._said.clear()
    for step, loss in ((2, 2.0), (10, 1.0), (9, 3.0)):
        write_step(tmp_path / "run", step, loss)
    return tmp_path / "run"


def test_the_newest_complete_one_is_taken_and_said(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert load_config(ChatConfig, [f"model_path={run}"]).model_path == str(run / "global_step_10")
    said = f"model_path={run} is a run's directory: taking its newest complete checkpoint, global_step_10\n"
    assert capsys.readouterr().err == said
    (run / "global_step_10" / "config.json").write_text("{ }")  # another size
    assert load_config(ChatConfig, [f"model_path={run}"]).model_path == str(run / "global_step_9")
    assert "global_step_10 is damaged (config.json has 3 bytes, not 2)" in capsys.readouterr().err


def test_best_is_the_recorded_one_or_else_that_of_least_validation_loss(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert load_config(ChatConfig, ["--best", f"model_path={run}"]).model_path == str(run / "global_step_10")
    record = {"checkpoint": "global_step_2", "metric": "val/exact_match", "mode": "max", "value": 0.5}
    (run / "best_checkpoint.json").write_text(json.dumps(record))
    assert load_config(ChatConfig, ["--best", f"model_path={run}"]).model_path == str(run / "global_step_2")
    assert "taking its best checkpoint (val/exact_match 0.5), global_step_2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("schema", "words", "key"),
    [
        (EvalConfig, "test_file=a output_dir=b model_path={run}", "model_path"),
        (SFTConfig, "data.train_files=a model.partial_pretrain={run}", "model.partial_pretrain"),
        (SFTConfig, "data.train_files=a model.partial_pretrain=m model.lora_adapter_path={run}", "model.lora_adapter_path"),
        (
            SFTConfig,
            "data.train_files=a model.partial_pretrain=m trainer.resume_mode=resume_path trainer.resume_from_path={run}",
            "trainer.resume_from_path",
        ),
        (PPOConfig, "data.train_files=a model.partial_pretrain=m reward_model.path={run}", "reward_model.path"),
        (PPOConfig, "data.train_files=a model.partial_pretrain=m critic.partial_pretrain={run}", "critic.partial_pretrain"),
    ],
)
def test_each_key_of_a_checkpoint_takes_it(schema: type, words: str, key: str, run: Path) -> None:
    config: object = load_config(schema, words.format(run=run).split())
    for name in key.split("."):
        config = getattr(config, name)
    assert config == str(run / "global_step_10")


def test_a_model_is_taken_as_it_is(run: Path) -> None:
    (run / "config.json").write_text("{}")
    assert load_config(ChatConfig, [f"model_path={run}"]).model_path == str(run)
    assert load_config(ChatConfig, ["model_path=Qwen/Qwen2.5-0.5B"]).model_path == "Qwen/Qwen2.5-0.5B"


def test_a_changed_checkpoint_without_a_manifest_is_a_model_like_any_other(run: Path) -> None:
    (run / "global_step_10" / "manifest.json").unlink()
    assert load_config(ChatConfig, [f"model_path={run}"]).model_path == str(run / "global_step_10")


def test_a_run_without_a_complete_checkpoint_is_refused(tmp_path: Path) -> None:
    for name in ("config.yaml", "train.log"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match="the run has saved none"):
        load_config(ChatConfig, [f"model_path={tmp_path}"])
    (write_step(tmp_path, 1) / "config.json").unlink()
    with pytest.raises(UserError, match=r"global_step_1: config\.json is missing"):
        load_config(ChatConfig, [f"model_path={tmp_path}"])


def test_best_without_a_validation_or_a_runs_directory_is_refused(tmp_path: Path) -> None:
    write_step(tmp_path / "run", 1)
    with pytest.raises(UserError, match="the best is not known"):
        load_config(ChatConfig, ["--best", f"model_path={tmp_path / 'run'}"])
    with pytest.raises(UserError, match="no key names a run's directory"):
        load_config(ChatConfig, ["--best", "model_path=Qwen/Qwen2.5-0.5B"])
