"""Checkpoints that are written beside training are those of their step; the best one is kept."""

import errno
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rl_runs
import sft_runs
from faults.checkpoints import hashes
from runs import timeless
from tiny import write_problems_and_model

from verl.engine import checkpoint
from verl.engine.damage import find_damage
from verl.engine.draft import Draft
from verl.engine.engine import Engine
from verl.engine.stored_state import StoredState
from verl.errors import DiskError, Stopped, UserError
from verl.trainer import fsdp_sft_trainer
from verl.trainer.best import Best
from verl.trainer.validation import Validation

RUN: dict[str, object] = {"trainer__total_training_steps": 4, "trainer__save_freq": 2}
ASYNC: dict[str, object] = {**RUN, "trainer__async_save": "true"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_problems_and_model(tmp_path_factory.mktemp("saving"))


@pytest.fixture(scope="module")
def sync(folder: Path) -> Path:
    sft_runs.train(folder, "sync", **RUN)
    return folder / "sync"


def same(found: Path, expected: Path, *steps: int) -> None:
    for step in steps:
        assert hashes(found / f"global_step_{step}") == hashes(expected / f"global_step_{step}")


def test_a_checkpoint_has_the_weights_of_its_step_though_the_next_step_has_run(
    folder: Path, sync: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = threading.Event()

    def step(self: Engine, *arguments: Any) -> Any:
        result = train_step(self, *arguments)
        if arguments[2] == 2:  # counted from 0: the step after the first save
            trained.set()
        return result

    def late(self: StoredState, *arguments: Any) -> Any:
        assert trained.wait(60)
        return write(self, *arguments)

    train_step, write = Engine.train_step, StoredState.write
    monkeypatch.setattr(Engine, "train_step", step)
    monkeypatch.setattr(StoredState, "write", late)
    sft_runs.train(folder, "async", **ASYNC)
    same(folder / "async", sync, 2, 4)


def test_a_copy_that_is_not_one_shows(folder: Path, sync: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: with the engine's own tensors in place of copies, the file has weights of a later step."""
    from verl.engine.host_copy import HostCopy

    trained = threading.Event()
    train_step, write = Engine.train_step, StoredState.write
    monkeypatch.setattr(HostCopy, "take", lambda self, tensors: dict(tensors))
    monkeypatch.setattr(Engine, "train_step", lambda self, *a: (train_step(self, *a), trained.set() if a[2] == 2 else None)[0])
    monkeypatch.setattr(StoredState, "write", lambda self, *a: (trained.wait(60), write(self, *a))[1])
    sft_runs.train(folder, "shared", **ASYNC)
    assert hashes(folder / "shared/global_step_2") != hashes(sync / "global_step_2")


def test_a_run_resumes_bit_for_bit_from_a_checkpoint_that_was_written_beside_training(folder: Path) -> None:
    whole = sft_runs.train(folder, "whole", **{**ASYNC, "trainer__max_ckpt_to_keep": 3})
    shutil.rmtree(folder / "whole/global_step_4")
    assert timeless(sft_runs.train(folder, "whole", **ASYNC)) == timeless(whole)


@pytest.mark.parametrize("kind", ["adapter", "sharded"])
def test_adapters_and_sharded_weights_are_written_as_they_would_be_at_once(kind: str, folder: Path) -> None:
    changes: dict[str, object] = {"model__lora_rank": 4} if kind == "adapter" else {"model__fsdp_config__cpu_offload": "true"}
    for output, words in ((f"{kind}-sync", RUN), (f"{kind}-async", ASYNC)):
        sft_runs.train(folder, output, **words, **changes)
    same(folder / f"{kind}-async", folder / f"{kind}-sync", 2, 4)


def test_a_critic_and_the_position_of_its_run_are_written_too(tmp_path: Path) -> None:
    rl_runs.write_folder(tmp_path)
    words = {"algorithm__name": "ppo", "trainer__total_training_steps": 2, "trainer__save_freq": 1}
    first = rl_runs.train(tmp_path, "sync", **words)
    second = rl_runs.train(tmp_path, "async", trainer__async_save="true", **words)
    assert timeless(first) == timeless(second)
    same(tmp_path / "async", tmp_path / "sync", 1, 2)


def failing(real: Callable[..., Any], at: int, number: int = errno.ENOSPC) -> Callable[..., Any]:
    """A function whose call number `at` fails as a disk does."""
    calls = 0

    def call(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            raise OSError(number, os.strerror(number))
        return real(*arguments, **options)

    return call


def test_a_write_that_fails_beside_training_ends_the_run_with_the_disk_s_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StoredState, "write", failing(StoredState.write, 2, errno.EIO))
    with pytest.raises(DiskError, match=r"global_step_4\.tmp: cannot be written: Input/output error") as caught:
        sft_runs_train(folder, "fails", **{**ASYNC, "trainer__total_training_steps": 6})
    assert caught.value.exit_code == 4
    assert sorted(path.name for path in (folder / "fails").glob("global_step_*")) == ["global_step_2"]
    assert find_damage(folder / "fails/global_step_2") is None


def sft_runs_train(folder: Path, output: str, **changes: object) -> None:
    """Run in this process, with errors raised."""
    from verl.config.load import load_config
    from verl.config.sft import SFTConfig
    from verl.trainer.fsdp_sft_trainer import train

    train(load_config(SFTConfig, sft_runs.words(folder, output, **changes)))


def test_a_signal_while_a_checkpoint_is_written_waits_for_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(self: Draft, *arguments: Any) -> Any:
        if self.position.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            threading.Event().wait(1)
        return commit(self, *arguments)

    commit = Draft.commit
    monkeypatch.setattr(Draft, "commit", slow)
    with pytest.raises(Stopped) as caught:
        sft_runs_train(folder, "signal", **{**ASYNC, "trainer__total_training_steps": 50})
    steps = {int(path.name.rpartition("_")[2]) for path in checkpoint.committed(folder / "signal")}
    assert 2 in steps and caught.value.checkpoint == folder / "signal" / f"global_step_{max(steps)}"
    assert find_damage(caught.value.checkpoint) is None and not list((folder / "signal").glob("*.tmp"))


# The best checkpoint

BEST: dict[str, object] = {
    "trainer__best_metric": "val/loss",
    "trainer__max_ckpt_to_keep": 1,
    "trainer__test_freq": 1,
    "trainer__save_freq": -1,
}


def with_losses(losses: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the validations of a run give these losses; the first is asked for names before the first step."""
    given = iter(losses)
    monkeypatch.setattr(Validation, "_losses", lambda *_, **__: {"val/loss": next(given)})


def test_the_best_checkpoint_is_kept_besides_the_newest(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_losses([0, 3.0, 1.0, 2.0, float("nan")], monkeypatch)
    sft_runs.train(folder, "best", data__val_files=folder / "test.jsonl", **{**RUN, **BEST})
    assert [path.name for path in checkpoint.committed(folder / "best")] == ["global_step_2", "global_step_4"]
    assert (folder / "best/best").resolve().name == "global_step_2"
    found = json.loads((folder / "best/best_checkpoint.json").read_text())
    assert found == {"checkpoint": "global_step_2", "metric": "val/loss", "mode": "min", "value": 1.0}
    with_losses([0, 1.5, 0.5], monkeypatch)  # a resumed run knows the best so far
    longer = {**RUN, **BEST, "trainer__total_training_steps": 5, "trainer__resume_override": True}
    sft_runs.train(folder, "best", data__val_files=folder / "test.jsonl", **longer)
    assert (folder / "best/best").resolve().name == "global_step_2"
    longer["trainer__total_training_steps"] = 6
    with_losses([0, 0.5], monkeypatch)
    sft_runs.train(folder, "best", data__val_files=folder / "test.jsonl", **longer)
    assert (folder / "best/best").resolve().name == "global_step_6"
    assert [path.name for path in checkpoint.committed(folder / "best")] == ["global_step_6"]


class Killed(BaseException):
    """In place of a kill: nothing in verl catches it."""


def kill_before(place: Any, name: str, call: int, patch: pytest.MonkeyPatch) -> None:
    """End the run, as a kill would, before a call of a function."""
    calls, real = iter(range(1, 100)), getattr(place, name)

    def killed(*arguments: Any, **options: Any) -> Any:
        if next(calls) == call:
            raise Killed
        return real(*arguments, **options)

    patch.setattr(place, name, killed)


@pytest.mark.parametrize(
    ("place", "name", "async_save"), [(Best, "keep", False), (Best, "_link", False), (checkpoint, "prune", False), (Best, "keep", True)]
)
def test_a_kill_after_the_commit_of_the_best_checkpoint_does_not_lose_it(
    place: Any, name: str, async_save: bool, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = {**RUN, **BEST, "data__val_files": folder / "test.jsonl", "trainer__async_save": async_save}
    words["trainer__default_local_dir"] = out = tmp_path / "out"
    with monkeypatch.context() as patch:
        kill_before(place, name, 1, patch)
        with_losses([0, 1.0, 2.0, 2.0, 2.0], patch)  # a save beside training may take more than one step
        with pytest.raises(Killed):
            sft_runs.train(folder, "unused", **words)
    later = 4 - int(checkpoint.committed(out)[-1].name.rpartition("_")[2])
    with_losses([0, *[3.0] * later], monkeypatch)
    fsdp_sft_trainer.main(sft_runs.words(folder, "unused", **words))
    assert [path.name for path in checkpoint.committed(out)] == ["global_step_1", "global_step_4"]
    assert (out / "best").resolve().name == "global_step_1"
    assert json.loads((out / "best_checkpoint.json").read_text())["value"] == 1.0


def test_the_best_is_linked_though_the_run_was_killed_after_its_last_commit(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = {**RUN, **BEST, "data__val_files": folder / "test.jsonl", "trainer__default_local_dir": tmp_path / "out"}
    with monkeypatch.context() as patch:
        kill_before(Best, "keep", 2, patch)
        with_losses([0, 2.0, 3.0, 3.0, 1.0], patch)
        with pytest.raises(Killed):
            sft_runs.train(folder, "unused", **words)
    fsdp_sft_trainer.main(sft_runs.words(folder, "unused", **words))
    assert (tmp_path / "out/best").resolve().name == "global_step_4"


def test_values_over_other_validation_rows_are_not_compared(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = {**RUN, **BEST, "data__val_files": folder / "test.jsonl", "trainer__default_local_dir": tmp_path / "out"}
    with_losses([0, 5.0, 1.0, 2.0], monkeypatch)
    fsdp_sft_trainer.main(sft_runs.words(folder, "unused", **{**words, "trainer__total_training_steps": 3}))
    with_losses([0, 4.0], monkeypatch)
    (tmp_path / "other.jsonl").write_text("".join((folder / "test.jsonl").read_text().splitlines(keepends=True)[1:]))
    fsdp_sft_trainer.main(sft_runs.words(folder, "unused", **{**words, "data__val_files": tmp_path / "other.jsonl"}))
    assert (tmp_path / "out/best").resolve().name == "global_step_4"
    said = (tmp_path / "out/train.log").read_text().splitlines()
    assert [line for line in said if "other validation rows" in line and "global_step_2 to global_step_3" in line]


def test_a_metric_that_validation_does_not_log_is_refused_before_training(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("verl.config.best.ANSWERS", ("loss", "accuracy"))  # as if it were known only when it has been measured
    words = {**RUN, "trainer__best_metric": "val/accuracy", "data__val_files": folder / "test.jsonl"}
    with pytest.raises(UserError, match=r"does not log val/accuracy\n  fix: one of val/loss"):
        sft_runs_train(folder, "no-metric", **words)
    assert not (folder / "no-metric/metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainer__best_metric": "train/loss"}, "did you mean val/loss"),
        ({"trainer__best_metric": "val/loss", "data__val_files": "null"}, "data.val_files"),
        ({"trainer__best_metric": "val/loss", "trainer__save_freq": "never"}, "trainer.save_freq"),
        ({"trainer__best_metric": "val/odd"}, "does not measure val/odd"),
        ({"trainer__best_metric": "val/loss", "trainer__best_mode": "least"}, "one of min or max"),
        ({"trainer__best_mode": "min"}, "set trainer.best_metric"),
    ],
)
def test_keys_of_the_best_checkpoint_are_checked(changes: dict[str, object], message: str, folder: Path) -> None:
    with pytest.raises(UserError, match=message):
        sft_runs_train(folder, "keys", **{"data__val_files": folder / "test.jsonl", **changes})
