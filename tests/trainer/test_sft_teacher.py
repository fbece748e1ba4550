"""Fine-tuning with a teacher: what is learned, resumed, planned and refused."""

import shutil
from pathlib import Path

import pytest
from runs import metrics_of, timeless
from sft_runs import train, words
from tiny import write_problems_and_model

from verl import dist
from verl.errors import UserError
from verl.models.load import load_tokenizer
from verl.trainer import fsdp_sft_trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student, and the same model as a teacher, fine-tuned."""
    folder = write_problems_and_model(tmp_path_factory.mktemp("taught"))
    train(folder, "fine-tuned", optim__lr=5e-3)
    dist.stop()
    shutil.copytree(folder / "fine-tuned" / "global_step_20", folder / "teacher")
    return folder


def of_teacher(folder: Path, **changes: object) -> dict[str, object]:
    return {"teacher__partial_pretrain": folder / "teacher", "data__val_files": folder / "test.jsonl", **changes}


def test_a_model_does_not_differ_from_itself(folder: Path) -> None:
    changes = of_teacher(folder, model__partial_pretrain=folder / "teacher", trainer__total_training_steps=1)
    (found,) = train(folder, "itself", **changes)
    assert abs(found["train/divergence"]) < 1e-6 and found["train/teacher_agreement"] == 1.0 and abs(found["train/teacher_gap"]) < 1e-6
    assert found["train/loss"] == pytest.approx(found["train/divergence"], abs=1e-6)


def test_a_student_comes_nearer_to_its_teacher_and_a_resumed_run_is_the_uninterrupted_one(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = of_teacher(folder, teacher__weight=0.8, teacher__top_k=50, trainer__test_freq=10)
    whole = train(folder, "whole", **changes)
    dist.stop()
    assert whole[-1]["val/divergence"] < 0.7 * whole[0]["train/divergence"]
    last = whole[-1]
    assert last["val/loss"] == pytest.approx(0.8 * last["val/divergence"] + 0.2 * last["val/cross_entropy"], rel=1e-5)
    assert "frozen; forward divergence over its 50 likeliest tokens, the others as one" in capsys.readouterr().out
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("verl.trainer.loop.due", _due_then_stopped)
        with pytest.raises(KeyboardInterrupt):
            train(folder, "cut", **changes, trainer__save_freq=5)
    dist.stop()
    resumed = train(folder, "cut", **changes, trainer__save_freq=5)
    assert timeless(resumed) == timeless(whole)


def _due_then_stopped(every: int | str, done: int, ends_epoch: bool, last: bool) -> bool:
    if done == 8:
        raise KeyboardInterrupt
    return every != "never" and (last or done % int(every) == 0 if int(every) > 0 else last)


def test_a_teacher_that_has_changed_is_told(folder: Path, tmp_path: Path) -> None:
    changes = of_teacher(folder, teacher__partial_pretrain=shutil.copytree(folder / "teacher", tmp_path / "teacher"))
    train(folder, "changed", **changes, trainer__total_training_steps=1)
    dist.stop()
    shutil.copytree(folder / "model", tmp_path / "teacher", dirs_exist_ok=True)
    with pytest.raises(UserError, match=r"content of teacher\.partial_pretrain"):
        train(folder, "changed", **changes, trainer__total_training_steps=2)


@pytest.mark.parametrize("dry_run", ["false", "true"])
def test_another_tokenizer_is_refused_before_rows_are_read(folder: Path, tmp_path: Path, dry_run: str) -> None:
    other = shutil.copytree(folder / "model", tmp_path / "other")
    tokenizer = load_tokenizer(str(other))
    tokenizer.add_tokens(["<think>"])
    tokenizer.save_pretrained(other)
    changes = of_teacher(folder, teacher__partial_pretrain=other, trainer__dry_run=dry_run, data__train_files="absent.jsonl")
    with pytest.raises(UserError, match="another tokenizer than the student"):
        fsdp_sft_trainer.main(words(folder, "refused", **changes))


def test_metrics_of_a_teacher_may_choose_the_best_checkpoint(folder: Path) -> None:
    train(
        folder, "best", **of_teacher(folder, trainer__best_metric="val/divergence", trainer__test_freq=5, trainer__total_training_steps=6)
    )
    assert (folder / "best" / "best").exists() and "val/divergence" in metrics_of(folder / "best")[-1]
