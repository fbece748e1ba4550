"""Early stopping: the run ends where the best metric has not become better for so many validations, and says so again."""

import json
from pathlib import Path

import pytest
import rl_runs
import sft_runs
from places import run_ranks
from runs import SFT, metrics_of, timeless
from tiny import write_problems_and_model

from verl.engine import checkpoint
from verl.engine.damage import read_position
from verl.errors import UserError
from verl.trainer.validation import Validation

LOSSES = {1: 3.0, 2: 2.0, 3: 2.5, 4: float("nan"), 5: 2.2, 6: 1.5, 7: 1.0}
RUN: dict[str, object] = {
    "trainer__total_training_steps": 7,
    "trainer__test_freq": 1,
    "trainer__save_freq": -1,
    "trainer__best_metric": "val/loss",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_problems_and_model(tmp_path_factory.mktemp("patience"))


@pytest.fixture
def given_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The validation after each step gives a loss of LOSSES."""
    monkeypatch.setattr(Validation, "_losses", lambda self, step, most=None: {"val/loss": LOSSES.get(step, 9.0)})


def train(folder: Path, output: Path, **changes: object) -> list[dict[str, float]]:
    words = {"data__val_files": folder / "test.jsonl", **RUN, "trainer__default_local_dir": output, **changes}
    sft_runs.fsdp_sft_trainer.main(sft_runs.words(folder, "unused", **words))
    return metrics_of(output)


def steps_of(output: Path) -> list[str]:
    return [path.name for path in checkpoint.committed(output)]


WHY = "val/loss has not become better in 3 validations (the best was 2 at step 2)"


@pytest.mark.usefixtures("given_losses")
@pytest.mark.parametrize("async_save", [False, True])
def test_a_run_without_a_better_validation_ends_with_a_checkpoint_and_says_why(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], async_save: bool
) -> None:
    metrics = train(folder, tmp_path / "out", trainer__patience=3, trainer__async_save=async_save)
    assert len(metrics) == 5
    assert steps_of(tmp_path / "out") == ["global_step_1", "global_step_2", "global_step_5"]
    assert (tmp_path / "out/best").resolve().name == "global_step_2"
    said = capsys.readouterr().out.splitlines()
    (why,) = (number for number, line in enumerate(said) if line.startswith("stopped early"))
    assert said[why].startswith(f"stopped early after step 5 of 7: {WHY}; to go on, give the same command with trainer.patience=6")
    assert said[why + 1].startswith("done: 5 of 7 steps in ")
    assert f"the best model is in {tmp_path / 'out/global_step_2'}; next:" in said[why + 2 :]
    assert said[-1].endswith(f"--config {tmp_path / 'out/config.yaml'} trainer.patience=6")
    train(folder, tmp_path / "out", trainer__patience=3)  # started again, it says the same and trains nothing
    again = capsys.readouterr().out.splitlines()
    assert said[why] in again
    assert metrics_of(tmp_path / "out") == metrics


@pytest.mark.usefixtures("given_losses")
@pytest.mark.parametrize(("patience", "steps"), [(6, 7), ("null", 7), (4, 7)])
def test_with_more_patience_or_none_the_run_goes_on(folder: Path, tmp_path: Path, patience: object, steps: int) -> None:
    whole = train(folder, tmp_path / "whole")
    train(folder, tmp_path / "out", trainer__patience=3)
    assert timeless(train(folder, tmp_path / "out", trainer__patience=patience)) == timeless(whole)
    assert len(whole) == steps


@pytest.mark.usefixtures("given_losses")
def test_the_count_survives_a_resume(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after step 4, where one more validation ends the run."""
    real = Validation.measure

    def killed(self: Validation, step: int) -> dict[str, float]:
        if step == 5:
            raise KeyboardInterrupt
        return real(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(Validation, "measure", killed)
        with pytest.raises(KeyboardInterrupt):
            train(folder, tmp_path / "out", trainer__patience=3, trainer__save_freq=4)
    waited = read_position(tmp_path / "out/global_step_4").waited
    assert waited is not None and (waited.best, waited.step, waited.validations) == (2.0, 2, 2)
    assert len(train(folder, tmp_path / "out", trainer__patience=3, trainer__save_freq=4)) == 5


@pytest.mark.usefixtures("given_losses")
def test_a_count_over_other_validation_rows_begins_anew(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(folder, tmp_path / "out", trainer__patience=4, trainer__total_training_steps=5)
    longer = {"trainer__patience": 4, "data__val_max_samples": 5, "trainer__resume_override": True}
    assert len(train(folder, tmp_path / "out", **longer)) == 7
    assert "the count of validations begins anew" in capsys.readouterr().out


def test_two_ranks_stop_after_the_same_step(folder: Path, tmp_path: Path) -> None:
    """A learning rate of 0 leaves the loss as it is, so that the second validation is the first without a better one."""
    keys = {"data__val_files": folder / "test.jsonl", **RUN, "trainer__patience": 2, "optim__lr": 0, "trainer__default_local_dir": tmp_path}
    said = run_ranks(*SFT, *sft_runs.words(folder, "unused", **keys))
    assert said.count("stopped early after step 3 of 7: val/loss has not become better in 2 validations") == 1
    assert [len(metrics_of(tmp_path)), steps_of(tmp_path)] == [3, ["global_step_1", "global_step_3"]]


def test_sample_answers_choose_the_best_checkpoint(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from verl.trainer.samples import Samples

    scores = {1: 0.0, 2: 0.5, 3: 0.5, 4: 0.25}
    monkeypatch.setattr(Samples, "answer", lambda self, step: {"val/exact_match": scores[step]})
    changes = {"trainer__best_metric": "val/exact_match", "trainer__patience": 2, "samples__rows": 2}
    assert len(train(folder, tmp_path / "out", **changes)) == 4
    record = json.loads((tmp_path / "out/best_checkpoint.json").read_text())
    assert record == {"checkpoint": "global_step_2", "metric": "val/exact_match", "mode": "max", "value": 0.5}


def test_reinforcement_learning_stops_early_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rl_runs.write_folder(tmp_path)
    keys = {"trainer__best_metric": "val/reward", "trainer__patience": 1, "trainer__test_freq": 1, "trainer__total_training_steps": 6}
    metrics = rl_runs.train(tmp_path, "out", data__val_files=tmp_path / "train.jsonl", data__val_max_samples=2, optim__lr=0, **keys)
    assert metrics[-1]["step"] == 2
    assert "stopped early after step 2 of 6: val/reward has not become better in 1 validation " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainer__best_metric": "null", "trainer__patience": 3}, "set trainer.best_metric, such as val/loss"),
        ({"trainer__patience": 0}, "trainer.patience: found 0"),
    ],
)
def test_patience_that_cannot_be_is_refused(folder: Path, tmp_path: Path, changes: dict[str, object], message: str) -> None:
    from verl.config.load import load_config
    from verl.config.sft import SFTConfig

    with pytest.raises(UserError, match=message):
        load_config(SFTConfig, sft_runs.words(folder, "unused", data__val_files=folder / "test.jsonl", **{**RUN, **changes}))
