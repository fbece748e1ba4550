"""What is odd about a run is said on its first lines, or once when it shows; what cannot come right is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rl_runs import train as train_rl
from rl_runs import write_folder
from sft_runs import train, words
from tiny import write_problems_and_model

from verl.engine.engine import Engine
from verl.errors import UserError
from verl.trainer import fsdp_sft_trainer
from verl.trainer.oddities import LossWatch, RewardWatch


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_problems_and_model(tmp_path_factory.mktemp("oddities"), train_rows=12, test_rows=4)


SHORT: dict[str, object] = {"trainer__total_training_steps": 1, "trainer__save_freq": "never"}


def said(folder: Path, capsys: pytest.CaptureFixture[str], **changes: object) -> list[str]:
    """The warnings of a run of one step."""
    capsys.readouterr()
    train(folder, "odd", **{**SHORT, **changes})
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]


def test_an_ordinary_run_is_not_warned_of(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(folder, capsys, data__val_files=folder / "test.jsonl") == []


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"optim__lr": 0.5}, "optim.lr=0.5 is very high"),
        ({"optim__lr": 0}, "optim.lr=0: nothing is learned"),
        ({"optim__warmup_steps_ratio": 1}, "the whole run is warm-up"),
        ({"trainer__test_freq": 1}, "trainer.test_freq=1 has no effect: there is no data.val_files"),
        ({"data__train_batch_size": 64}, "data.train_batch_size=64 is more than the 12 rows of data.train_files"),
        ({"data__max_length": 100_000}, "data.max_length=100,000 is beyond the model's 2,048 positions"),
    ],
)
def test_an_odd_setting_is_said(folder: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], warning: str) -> None:
    (found,) = said(folder, capsys, **changes)
    assert warning in found


def test_copies_and_validation_rows_that_are_trained_are_counted(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = (folder / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join([*rows, *rows[:3], rows[0]]))
    (tmp_path / "val.jsonl").write_text("".join([*(folder / "test.jsonl").read_text().splitlines(keepends=True), *rows[:2]]))
    files = {"data__train_files": tmp_path / "train.jsonl", "data__val_files": tmp_path / "val.jsonl"}
    for _ in range(2):  # the second run reads the cache
        copies, shared = said(folder, capsys, **files)
        assert f"data.train_files: 4 of 16 rows are copies of earlier rows, the first {tmp_path}/train.jsonl:13" in copies
        assert f"data.val_files: 2 of 6 rows are training rows too, the first {tmp_path}/val.jsonl:5" in shared


def test_the_same_question_with_another_answer_is_no_copy(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"question": "1 + 1", "answer": str(n)}) + "\n" for n in range(6)))
    assert said(folder, capsys, data__train_files=tmp_path / "a.jsonl") == []


def test_a_loss_that_trebles_is_said_once(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real, factors = Engine.train_step, iter([1.0, 2.9, 3.5, 9.0])

    def scaled(*given: Any, **options: Any) -> dict[str, torch.Tensor]:
        out = real(*given, **options)
        return {**out, "loss": torch.tensor(4.0 * next(factors))}

    monkeypatch.setattr(Engine, "train_step", scaled)
    (found,) = said(folder, capsys, trainer__total_training_steps=4)
    assert "warning: step 3: the loss is 14, over 3 times the first one (4)" in found


class Said:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def test_a_small_loss_may_treble_without_a_word() -> None:
    run: Any = Said()
    watch = LossWatch(run)
    for step, loss in enumerate([0.01, 0.04, 0.5]):
        watch.see(step, loss)
    assert run.lines == []


def test_equal_rewards_are_said_when_they_begin_and_when_they_last() -> None:
    run: Any = Said()
    watch = RewardWatch(run)
    for step, found in enumerate(["equal", None, "equal", "equal", "equal", "equal", "equal"], 1):
        watch.see(step, found)
    assert [line.split(":")[1] for line in run.lines] == [" step 1", " step 3", " step 5"]
    assert "nothing is learned" in run.lines[2]


def test_memory_that_runs_out_names_the_step_the_row_the_plan_and_the_key(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = Engine.train_step, iter(range(9))

    def fails(*given: Any, **options: Any) -> dict[str, torch.Tensor]:
        if next(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(*given, **options)

    monkeypatch.setattr(Engine, "train_step", fails)
    with pytest.raises(UserError, match="the GPU ran out of memory") as caught:
        fsdp_sft_trainer.main(words(folder, "memory", trainer__total_training_steps=3))
    assert caught.value.where == "step 2"
    assert "the longest row of the step has" in caught.value.what and "the plan's figure is" in caught.value.what
    assert any(key in str(caught.value.fix) for key in ("micro_batch", "lora_rank", "gradient_checkpointing", "optim.name"))


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")])
def test_memory_of_the_machine_that_runs_out_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fails(*given: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(Engine, "train_step", fails)
    with pytest.raises(UserError, match=r"step 1: this machine ran out of memory: it has \d+\.\d GiB; the longest row"):
        train(folder, "host", **SHORT)


def test_memory_that_runs_out_while_loading_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(fsdp_sft_trainer, "build", fails)
    with pytest.raises(UserError, match="the GPU ran out of memory"):
        train(folder, "loading", **SHORT)


def test_other_errors_of_a_step_are_not_taken_for_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given: Any, **options: Any) -> None:
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(Engine, "train_step", fails)
    with pytest.raises(RuntimeError, match="shapes"):
        train(folder, "other", **SHORT)


def test_memory_that_runs_out_in_reinforcement_learning_names_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = Engine.score, iter(range(99))

    def fails(*given: Any, **options: Any) -> Any:
        if next(calls) == 3:  # the first two see whether the model holds still
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*given, **options)

    monkeypatch.setattr(Engine, "score", fails)
    with pytest.raises(UserError, match=r"step [12]: the GPU ran out of memory(?s:.*)rollout.max_new_tokens"):
        train_rl(write_folder(tmp_path), "memory", trainer__total_training_steps=3)


def test_a_run_without_differences_between_rewards_is_said_to_learn_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_folder(tmp_path)
    (folder / "half.py").write_text("def score(prompt, response, row):\n    return 0.5\n")
    train_rl(folder, "equal", reward__name=folder / "half.py", trainer__total_training_steps=4, trainer__save_freq="never")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: step")]
    assert len(lines) == 2 and "equal rewards" in lines[0] and "step 3: the same for 3 steps: all advantages are zero" in lines[1]
