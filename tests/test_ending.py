"""A run ends with what came of it, and with commands that a shell takes as they are."""

import json
import shlex
from pathlib import Path

import pytest
from runs import run_with

from verl.config.load import load_config
from verl.config.pairs import RewardTrainerConfig
from verl.config.sft import SFTConfig
from verl.ending import ending
from verl.errors import Stopped
from verl.run import Run

METRICS = [
    {"step": 1, "train/loss": 3.0, "train/tokens": 100},
    {"step": 2, "train/loss": 2.0, "train/tokens": 2000, "val/loss": 1.0},
    {"step": 3, "train/loss": 1.0, "train/tokens": 3000, "val/loss": 2.0},
]


def checkpoint(folder: Path, config: dict[str, object], name: str = "config.json") -> Path:
    folder.mkdir(parents=True)
    (folder / name).write_text(json.dumps(config))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = run_with(tmp_path / "my run", "data.val_files=my test.jsonl", "trainer.max_seconds=25", total_steps=3)
    run.step = 3
    run.checkpoint = checkpoint(run.directory / "global_step_3", {"architectures": ["Qwen2ForCausalLM"]})
    return run


def test_it_says_loss_time_tokens_and_the_best_step(run: Run) -> None:
    first, second, *_ = ending(run, METRICS, 83.0).splitlines()
    assert first == "done: 3 steps in 1:23 · train/loss 3.0000 → 1.0000 · 3,000 tokens"
    assert second == "best val/loss: 1 at step 2 of 2 validations"
    assert ending(run, METRICS[:1], 1.0).startswith("done: 1 step in 0:01 · train/loss 3.0000 · 100 tokens\n")


def test_the_time_of_a_resumed_run_is_that_of_its_own_steps(run: Run) -> None:
    run.start_step = 1
    assert ending(run, METRICS, 60.0).startswith("done: 3 steps, 2 of them in 1:00 · ")


def test_a_run_that_stopped_early_says_of_how_many_steps_and_goes_on_with_more_patience(tmp_path: Path) -> None:
    words = ["data.val_files=b", "trainer.best_metric=val/loss", "trainer.patience=3", f"trainer.default_local_dir={tmp_path}"]
    run = Run(load_config(SFTConfig, ["data.train_files=a", "model.partial_pretrain=c", *words]))
    run.step, run.total_steps, run.checkpoint = 3, 7, checkpoint(tmp_path / "global_step_3", {})
    first, *_, last = ending(run, METRICS, 83.0).splitlines()
    assert first.startswith("done: 3 of 7 steps in 1:23 · ")
    assert last == f"  verl sft --config {tmp_path / 'config.yaml'} trainer.patience=6"


def test_a_stopped_run_shows_the_commands_and_goes_on_with_its_own_config(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run.total_steps = 7
    with pytest.raises(Stopped):
        run.leave(3)
    first, second, *_, last = capsys.readouterr().out.splitlines()
    assert first.startswith("stopped by ") and second == f"the model is in {run.checkpoint}; next:"
    assert shlex.split(last) == ["verl", "sft", "--config", str(run.directory / "config.yaml")]
    run.checkpoint = None
    with pytest.raises(Stopped):
        run.leave(3)
    assert "next:" not in capsys.readouterr().out


def test_its_commands_are_quoted_for_the_shell(run: Run, tmp_path: Path) -> None:
    commands = [shlex.split(line) for line in ending(run, METRICS, 1.0).splitlines() if line.startswith("  verl ")]
    model = str(run.directory / "global_step_3")
    assert ["verl", "eval", f"model_path={model}", "test_file=my test.jsonl", f"output_dir={run.directory / 'eval'}"] in commands
    assert ["verl", "chat", model] in commands
    assert ["verl", "export", model, str(tmp_path / "my run-model")] in commands
    assert ["verl", "sft", "--config", str(run.directory / "config.yaml"), "trainer.total_epochs=2"] in commands


def test_the_best_checkpoint_is_named_where_there_is_one(run: Run) -> None:
    checkpoint(run.directory / "global_step_2", {})
    (run.directory / "best").symlink_to("global_step_2")
    text = ending(run, METRICS, 1.0)
    assert f"the best model is in {run.directory / 'global_step_2'}; next:" in text and "global_step_3" not in text


def test_an_adapter_goes_on_to_reinforcement_learning_after_its_export(run: Run, tmp_path: Path) -> None:
    run.checkpoint = checkpoint(run.directory / "global_step_4", {"task_type": "CAUSAL_LM"}, "adapter_config.json")
    text = ending(run, METRICS, 1.0)
    assert f"verl ppo model.partial_pretrain={shlex.quote(str(tmp_path / 'my run-model'))}" in text


def test_a_reward_model_is_for_ppo_and_not_for_a_chat(tmp_path: Path) -> None:
    words = ["data.train_files=a", "model.partial_pretrain=b", f"trainer.default_local_dir={tmp_path}"]
    run = Run(load_config(RewardTrainerConfig, words))
    scorer: dict[str, object] = {"architectures": ["Qwen2ForSequenceClassification"]}
    run.checkpoint = checkpoint(tmp_path / "global_step_3", {**scorer, "id2label": {"0": "LABEL_0"}})
    text = ending(run, METRICS, 1.0)
    assert f"verl ppo reward_model.path={run.checkpoint}" in text and "verl chat" not in text and "verl eval" not in text
    run.checkpoint = checkpoint(tmp_path / "global_step_4", scorer)  # transformers writes no labels where there are two
    text = ending(run, METRICS, 1.0)
    assert f"verl eval model_path={run.checkpoint}" in text and "verl chat" not in text and "verl ppo" not in text


def test_without_a_checkpoint_it_says_so(run: Run) -> None:
    run.checkpoint = None
    assert "no checkpoint was saved" in ending(run, METRICS, 1.0) and "next:" not in ending(run, METRICS, 1.0)


def test_what_cannot_be_read_at_the_end_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("verl.run.read_metrics", lambda directory: 1 / 0)
    with run_with(tmp_path, "trainer.logger=console") as run:
        run.start_logging(0, 1)
        run.log(1, {"train/loss": 1.0})
    assert "its metrics cannot be read: ZeroDivisionError" in (tmp_path / "train.log").read_text()


def test_the_next_command_starts_as_many_processes_and_repeats_no_schedule(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.total_steps, run.config["rollout"] = 3, {"replay": "schedule.jsonl"}
    for ranks, here, gpus in (("2", "2", " --gpus 2"), ("4", "2", ""), ("1", "1", "")):
        monkeypatch.setenv("WORLD_SIZE", ranks)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
        last = ending(run, METRICS, 1.0).splitlines()[-1]
        assert last.startswith(f"  verl sft{gpus} --config ") and " rollout.replay=null trainer." in last
