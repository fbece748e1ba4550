"""Two runs in a directory, and runs that resume with changes: refused with what differs, or in a directory of their own."""

import json
import os
import re
import shutil
import signal
import socket
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from forked import run_forked
from rl_runs import REWARD
from rl_runs import words as rl_words
from runs import SFT, as_words, command, losses, metrics_of
from tiny import write_problems_and_model

from verl.commands import PPO
from verl.commands import REWARD as REWARD_COMMAND
from verl.commands import SFT as SFT_COMMAND
from verl.config import trajectory
from verl.config.commands import EvalConfig, ExportConfig
from verl.config.load import load_config
from verl.config.objects import _leaves, _tree
from verl.config.sft import SFTConfig
from verl.directory import begin_files, claim, recorded_settings, settings_of
from verl.durable import replace_text
from verl.engine import checkpoint
from verl.engine.damage import find_damage
from verl.engine.skipped import tell
from verl.errors import UserError
from verl.eval.sft_evaluator import evaluate
from verl.lock import LockedError, Owner, take
from verl.manifest import entry_of
from verl.models.export import export
from verl.models.tiny import write_tiny_model
from verl.run import Run
from verl.trainer import fsdp_sft_trainer, ppo_trainer, reward_trainer

STEPS = 4


def names_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("there", [[], ["checkpoints/mine/notes.txt"], ["checkpoints/mine/train.log", "checkpoints/other/train.log"]])
def test_a_run_that_cannot_begin_leaves_what_was_there_and_nothing_else(there: list[str], tmp_path: Path) -> None:
    for name in there:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine\n")
    before = names_in(tmp_path)
    with pytest.raises(UserError, match="no such column"):
        fail_in(tmp_path / "checkpoints/mine", UserError("no such column"), lambda run: run.start_logging(0, 5))
    assert names_in(tmp_path) == before
    assert all((tmp_path / name).read_text().startswith("mine\n") for name in there)


def test_a_run_that_has_begun_or_whose_directory_has_other_files_meanwhile_is_left(tmp_path: Path) -> None:
    def train(run: Run) -> None:
        run.start_logging(0, 5)
        run.log(1, {"train/loss": 1.0})

    with pytest.raises(UserError, match="not finite"):
        fail_in(tmp_path / "trained", UserError("the loss is not finite"), train)
    assert {"trained/train.log", "trained/metrics.jsonl", "trained/config.yaml"} <= names_in(tmp_path)
    with pytest.raises(UserError, match="no such column"):
        fail_in(tmp_path / "written", UserError("no such column"), lambda run: (run.directory / "notes.txt").touch())
    assert {"written/train.log", "written/notes.txt"} <= names_in(tmp_path)
    with pytest.raises(ZeroDivisionError):
        fail_in(tmp_path / "broken", ZeroDivisionError(), lambda run: None)
    assert "broken/train.log" in names_in(tmp_path)


def test_a_late_error_of_a_command_reaches_the_terminal_and_leaves_no_directory(folder: Path, tmp_path: Path) -> None:
    given = {"data.train_files": folder / "train.jsonl", "data.prompt_key": "qestion", "model.partial_pretrain": folder / "model"}
    done = run_forked(*SFT, *as_words(given, {}), folder=tmp_path)
    assert (done.returncode, "column 'qestion' is missing" in done.stderr) == (2, True), done.stderr
    assert not any(name.startswith("checkpoints") for name in names_in(tmp_path))


def fail_in(directory: Path, error: Exception, work: Callable[[Run], object]) -> None:
    """Begin a run in a directory, do some work in it, and fail."""
    words = ["data.train_files=a", "model.partial_pretrain=b", f"trainer.default_local_dir={directory}", "trainer.logger=console"]
    with Run(load_config(SFTConfig, words)) as run:
        work(run)
        raise error


def words(folder: Path, output: str | None, **changes: object) -> list[str]:
    keys: dict[str, object] = {
        "data.train_files": folder / "train.jsonl",
        "data.cache_dir": folder / "cache",
        "data.train_batch_size": 6,
        "data.micro_batch_size_per_gpu": 2,
        "data.max_length": 256,
        "data.num_workers": 1,
        "model.partial_pretrain": folder / "model",
        "trainer.total_training_steps": STEPS,
        "trainer.save_freq": 2,
        "trainer.logger": "[]",
        "optim.lr": 1e-3,
        **({} if output is None else {"trainer.default_local_dir": folder / output}),
    }
    return as_words(keys, changes)


def run(folder: Path, output: str | None, **changes: object) -> None:
    fsdp_sft_trainer.main(words(folder, output, **changes))


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob("global_step_*"))


def contents(directory: Path) -> dict[str, bytes]:
    """Every file but the log, which a refused run may add a line to."""
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file() and path.name != "train.log"
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_problems_and_model(tmp_path_factory.mktemp("directory"))
    write_tiny_model(folder / "other_model", (folder / "train.jsonl").read_text().splitlines(), seed=7)
    (folder / "vowels.py").write_text(REWARD)
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """A finished run of all weights."""
    run(folder, "whole")
    return folder / "whole"


@pytest.fixture(scope="module")
def adapter(folder: Path) -> Path:
    """A finished run of an adapter."""
    run(folder, "adapter", model__lora_rank=4, model__lora_dropout=0.1)
    return folder / "adapter"


@pytest.fixture
def copied(folder: Path, whole: Path, tmp_path: Path) -> Callable[[str], Path]:
    """The run of all weights under another name, to be changed by a test."""

    def copy(name: str) -> Path:
        target = folder / f"{tmp_path.name}_{name}"
        shutil.copytree(whole, target)
        return target

    return copy


# Resuming with changes

CHANGED: dict[str, dict[str, object]] = {
    "learning rate": {"optim__lr": 2e-3},
    "scheduler": {"optim__lr_scheduler": "linear"},
    "weight decay": {"optim__weight_decay": 0.1},
    "betas": {"optim__betas": "[0.8,0.95]"},
    "clipping": {"optim__clip_grad": 0.5},
    "warm-up": {"optim__warmup_steps_ratio": 0.5},
    "final learning rate": {"optim__min_lr_ratio": 0.1},
    "optimizer": {"optim__name": "adamw_8bit"},
    "batch": {"data__train_batch_size": 8},
    "packing": {"data__packing": "false"},
    "max_length": {"data__max_length": 300},
    "seed": {"trainer__seed": 2},
    "arithmetic": {"model__compute_dtype": "bfloat16"},
    "an adapter": {"model__lora_rank": 4},
}
CHANGED_ADAPTER: dict[str, dict[str, object]] = {
    "rank": {"model__lora_rank": 8},
    "alpha": {"model__lora_alpha": 32},
    "rsLoRA": {"model__use_rslora": "true"},
    "DoRA": {"model__use_dora": "true"},
    "dropout": {"model__lora_dropout": 0.2},
    "modules": {"model__target_modules": "[q_proj]"},
    "trained tokens": {"model__trainable_tokens": "stop"},
}


def refused(capture: pytest.ExceptionInfo[UserError], changes: dict[str, object]) -> None:
    told = str(capture.value)
    for key, value in changes.items():
        line = next(line for line in told.splitlines() if line.strip().startswith(f"{key.replace('__', '.')}: "))
        assert " -> " in line and str(value).strip("[]").split(",")[0] in line.replace('"', "")
    assert "trainer.resume_mode=disable" in told and "trainer.resume_override=true" in told


@pytest.mark.parametrize("change", CHANGED)
def test_a_change_of_what_is_learned_stops_the_run_and_is_shown(change: str, folder: Path, whole: Path) -> None:
    before = contents(whole)
    with pytest.raises(UserError) as capture:
        run(folder, "whole", **CHANGED[change])
    refused(capture, CHANGED[change])
    assert contents(whole) == before


@pytest.mark.parametrize("change", CHANGED_ADAPTER)
def test_a_change_of_the_adapter_stops_the_run_and_is_shown(change: str, folder: Path, adapter: Path) -> None:
    with pytest.raises(UserError) as capture:
        run(folder, "adapter", **{"model__lora_rank": 4, "model__lora_dropout": 0.1, **CHANGED_ADAPTER[change]})
    refused(capture, CHANGED_ADAPTER[change])


def test_another_base_model_under_an_adapter_stops_the_run(folder: Path, adapter: Path) -> None:
    with pytest.raises(UserError) as capture:
        run(folder, "adapter", model__lora_rank=4, model__lora_dropout=0.1, model__partial_pretrain=folder / "other_model")
    refused(capture, {"model__partial_pretrain": folder / "other_model"})


def test_another_model_under_the_same_name_stops_the_run(folder: Path, adapter: Path, tmp_path: Path) -> None:
    shutil.move(folder / "model", tmp_path / "kept")
    shutil.copytree(folder / "other_model", folder / "model")
    try:
        with pytest.raises(UserError, match=r"content of model\.partial_pretrain: "):
            run(folder, "adapter", model__lora_rank=4, model__lora_dropout=0.1)
    finally:
        shutil.rmtree(folder / "model")
        shutil.move(tmp_path / "kept", folder / "model")


NEUTRAL: dict[str, dict[str, object]] = {
    "logger and saving": {"trainer__logger": "console", "trainer__save_freq": 1, "trainer__max_ckpt_to_keep": 9, "trainer__test_freq": 3},
    "micro-batches": {"data__micro_batch_size_per_gpu": 3, "data__num_workers": 2},
    "memory": {"model__enable_gradient_checkpointing": "false", "model__compile": "false"},
    "names": {"trainer__project_name": "p", "trainer__experiment_name": "e"},
}


@pytest.mark.parametrize("change", NEUTRAL)
def test_a_change_of_what_is_not_learned_does_not(change: str, folder: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(folder, "whole", **NEUTRAL[change])
    said = capsys.readouterr().out
    assert said.startswith("resuming from ") and "nothing left to do: 4 of 4 steps are done" in said
    assert "optim.lr=0.001" in said and f"data.train_files={folder / 'train.jsonl'}" in said, "with which settings"


def test_a_run_that_was_killed_before_it_removed_an_old_checkpoint_removes_it_when_it_is_started_again(folder: Path, whole: Path) -> None:
    shutil.copytree(whole, folder / "killed")
    run(folder, "killed", trainer__max_ckpt_to_keep=1)
    assert [path.name for path in checkpoint.committed(folder / "killed")] == ["global_step_4"]


def test_a_model_and_rows_that_have_moved_are_the_same(
    folder: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "model", tmp_path / "moved")
    (tmp_path / "rows.jsonl").write_bytes((folder / "train.jsonl").read_bytes())
    run(folder, "whole", model__partial_pretrain=tmp_path / "moved", data__train_files=tmp_path / "rows.jsonl")
    assert "nothing left to do" in capsys.readouterr().out


def test_other_rows_are_said_in_words_and_by_key(folder: Path, whole: Path) -> None:
    with pytest.raises(UserError, match=r"the training rows changed \(80 rows then, 30 now\)") as capture:
        run(folder, "whole", data__train_max_samples=30)
    refused(capture, {"data__train_max_samples": 30})


def test_with_the_override_the_run_goes_on_and_says_with_what(copied: Callable[[str], Path], folder: Path, capsys: Any) -> None:
    directory = copied("override")
    run(folder, directory.name, optim__lr=2e-3, trainer__resume_override="true", trainer__total_training_steps=6)
    said = capsys.readouterr().out
    assert said.startswith(f"resuming from {directory / 'global_step_4'}\n")
    assert "optim.lr: 0.001 -> 0.002" in said and "goes on with what is new (trainer.resume_override=true)" in said
    assert [line["step"] for line in metrics_of(directory)] == [1, 2, 3, 4, 5, 6]
    run(folder, directory.name, optim__lr=2e-3, trainer__total_training_steps=6)  # it is now the run of these settings
    with pytest.raises(UserError, match=r"optim\.lr: 0\.002 -> 0\.001"):
        run(folder, directory.name)


@pytest.mark.faults
def test_with_the_override_other_rows_are_trained(copied: Callable[[str], Path], folder: Path, capsys: Any) -> None:
    directory = copied("rows")
    run(folder, directory.name, data__train_max_samples=30, trainer__resume_override="true", trainer__total_training_steps=5)
    assert "80 rows then, 30 now" in capsys.readouterr().out and names(directory)[-1] == "global_step_5"


@pytest.mark.parametrize("key", ["trainer__total_training_steps", "trainer__total_epochs"])
def test_a_longer_run_goes_on_and_says_that_its_learning_rate_is_another_one(
    key: str, copied: Callable[[str], Path], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = copied(f"longer by {key}")
    changes = {key: 6} if key == "trainer__total_training_steps" else {key: 1, "trainer__total_training_steps": "null"}
    run(folder, directory.name, **changes)
    said = capsys.readouterr().out
    assert re.search(r"warning: this run has \d+ steps, and the run of this checkpoint 4: from here on, its learning rate .* -> ", said)
    steps = [line["step"] for line in metrics_of(directory)]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > 4


@pytest.mark.faults
def test_a_longer_run_whose_rate_does_not_depend_on_it_only_trains_on(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    constant: dict[str, object] = {"optim__lr_scheduler": "constant", "optim__warmup_steps_ratio": 0}
    run(folder, "constant", **constant)
    run(folder, "constant", **constant, trainer__total_training_steps=6)
    assert "the run now has 6 steps in place of 4" in capsys.readouterr().out
    run(folder, "constant-6", **constant, trainer__total_training_steps=6)
    assert losses(metrics_of(folder / "constant")) == losses(metrics_of(folder / "constant-6"))


def test_a_checkpoint_without_settings_is_compared_with_the_config_beside_it(copied: Callable[[str], Path], folder: Path) -> None:
    directory = copied("old")
    forget_settings(directory)
    with pytest.raises(UserError, match=r"optim\.lr: 0\.001 -> 0\.002"):
        run(folder, directory.name, optim__lr=2e-3)


def test_one_without_any_record_says_so(copied: Callable[[str], Path], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = copied("older")
    forget_settings(directory)
    (directory / "config.yaml").unlink()
    run(folder, directory.name)
    assert "does not record its settings" in capsys.readouterr().out


def forget_settings(directory: Path) -> None:
    """As older versions wrote them."""
    for path in directory.glob("global_step_*/trainer/state.json"):
        state = json.loads(path.read_text())
        del state["settings"], state["total_steps"]
        path.write_text(json.dumps(state, indent=2) + "\n")
        manifest = path.parent.parent / "manifest.json"
        listed = json.loads(manifest.read_text())
        listed["files"]["trainer/state.json"] = asdict(entry_of(path))
        manifest.write_text(json.dumps(listed))


# Other ways to begin


def test_a_new_run_is_not_mixed_with_another_ones_checkpoints(folder: Path, whole: Path) -> None:
    before = contents(whole)
    with pytest.raises(UserError, match=r"has checkpoints of another run \(global_step_2 to global_step_4\)") as capture:
        run(folder, "whole", trainer__resume_mode="disable")
    assert "trainer.default_local_dir" in str(capture.value) and contents(whole) == before


def test_a_new_run_may_have_a_directory_without_checkpoints(folder: Path) -> None:
    (folder / "empty").mkdir()
    run(folder, "empty", trainer__resume_mode="disable", trainer__total_training_steps=1)
    assert names(folder / "empty") == ["global_step_1"]


def named(checkpoint_path: Path) -> dict[str, object]:
    return {"trainer__resume_mode": "resume_path", "trainer__resume_from_path": checkpoint_path}


def test_a_named_checkpoint_with_other_settings_is_refused_too(folder: Path, whole: Path) -> None:
    with pytest.raises(UserError) as capture:
        run(folder, "elsewhere", optim__lr=2e-3, **named(whole / "global_step_2"))
    refused(capture, {"optim__lr": 2e-3})


def test_going_back_below_later_checkpoints_is_refused(folder: Path, whole: Path) -> None:
    with pytest.raises(UserError, match="has later checkpoints than global_step_2, up to global_step_4"):
        run(folder, "whole", **named(whole / "global_step_2"))


@pytest.mark.parametrize("name", ["best", "best/", "../whole/best", "global_step_2/", "../whole/global_step_2"])
def test_a_link_or_another_spelling_goes_back_below_no_later_checkpoint_either(name: str, folder: Path, whole: Path) -> None:
    if not (whole / "best").is_symlink():
        (whole / "best").symlink_to("global_step_2")
    with pytest.raises(UserError, match="has later checkpoints than global_step_2, up to global_step_4"):
        run(folder, "whole", **named(f"{whole}/{name}"))  # type: ignore[arg-type]


def test_a_run_of_another_command_does_not_go_on_even_with_the_override(folder: Path, whole: Path) -> None:
    before = contents(whole)
    with pytest.raises(UserError, match='command: "verl sft" -> "verl reward"'):
        reward_trainer.main(reward_words(folder, whole, "trainer.resume_override=true"))
    assert contents(whole) == before


def reward_words(folder: Path, output: Path, *more: str) -> list[str]:
    rows = [{"prompt": "1 + 1?", "chosen": "2", "rejected": "3"}] * 8
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {"data.train_files": folder / "pairs.jsonl", "model.partial_pretrain": folder / "model", "trainer.default_local_dir": output}
    return [*as_words({**keys, "trainer.total_training_steps": STEPS}, {}), *more]


@pytest.mark.parametrize("below", ["", "deeper/still", "trainer"])
@pytest.mark.parametrize("what", ["run", "eval", "export", "link"])
def test_nothing_is_written_into_a_checkpoint(what: str, below: str, folder: Path, whole: Path, tmp_path: Path) -> None:
    before, step = contents(whole), whole / "global_step_4"
    (tmp_path / "link").symlink_to(step)
    into = step / below if what != "link" else tmp_path / "link" / below
    commands = {
        "eval": lambda: evaluate(EvalConfig(model_path=str(step), test_file=str(folder / "test.jsonl"), output_dir=str(into))),
        "export": lambda: export(ExportConfig(source=str(step), directory=str(into))),
    }
    with pytest.raises(UserError, match=r"the checkpoint \S+/global_step_4, which may not be changed\n  fix: .*outside it"):
        commands.get(what, lambda: run(folder, str(into)))()
    assert contents(whole) == before and find_damage(step) is None and not list(whole.rglob("deeper"))


def test_a_named_checkpoint_is_not_continued_among_another_runs(folder: Path, whole: Path, copied: Callable[[str], Path]) -> None:
    directory = copied("target")
    with pytest.raises(UserError, match="has checkpoints of another run"):
        run(folder, directory.name, **named(whole / "global_step_2"))


@pytest.mark.faults
def test_the_same_command_goes_on_after_a_named_checkpoint(folder: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(folder, "branch", **named(whole / "global_step_2"))
    shutil.rmtree(folder / "branch" / "global_step_4")
    run(folder, "branch", trainer__save_freq=1, **named(whole / "global_step_2"))
    capsys.readouterr()
    run(folder, "branch", **named(whole / "global_step_2"))
    said = capsys.readouterr().out
    assert said.startswith(f"resuming from {folder / 'branch' / 'global_step_4'}, which this run has written since it started from")
    assert [line["step"] for line in metrics_of(folder / "branch")] == [3, 4]


def test_the_newest_of_the_same_directory_may_be_named(folder: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(folder, "whole", **named(whole / "global_step_4"))
    assert "nothing left to do" in capsys.readouterr().out


# The default place


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path("checkpoints/verl-sft")


def test_in_the_default_place_other_settings_have_a_directory_of_their_own(
    folder: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short: dict[str, object] = {"trainer__total_training_steps": 1}
    for number, (rate, directory) in enumerate(((1e-3, "run"), (2e-3, "run-2"), (3e-3, "run-3"))):
        run(folder, None, optim__lr=rate, **short)
        first = capsys.readouterr().out.splitlines()[0]
        assert (
            first.startswith(f"starting a new run in {place / directory}: {place / 'run'} has a run with other settings (optim.lr: ")
            or not number
        )
    for rate, directory in ((2e-3, "run-2"), (1e-3, "run"), (3e-3, "run-3")):
        run(folder, None, optim__lr=rate, **short)
        assert capsys.readouterr().out.startswith(f"resuming from {place / directory / 'global_step_1'}")
    assert yaml.safe_load((place / "run-2" / "config.yaml").read_text())["trainer"]["default_local_dir"] == str(place / "run-2")
    run(folder, None, optim__lr=1e-3, **short, trainer__resume_mode="disable")
    assert capsys.readouterr().out.startswith(f"starting a new run in {place / 'run-4'} (trainer.resume_mode=disable): ")
    run(folder, None, optim__lr=3.5e-3, **short, trainer__resume_override="true")
    first = capsys.readouterr().out.splitlines()[0]
    assert "goes on in" in first and "with other settings (trainer.resume_override=true)" in first
    assert sorted(path.name for path in place.iterdir()) == ["run", "run-2", "run-3", "run-4"]


@pytest.mark.faults
def test_a_directory_in_which_no_step_was_done_is_used_again(folder: Path, place: Path) -> None:
    (place / "run").mkdir(parents=True)
    (place / "run" / "config.yaml").write_text("optim:\n  lr: 5.0\n")
    (place / "run" / "metrics.jsonl").write_text("")
    run(folder, None, trainer__total_training_steps=1)
    assert names(place / "run") == ["global_step_1"]


def test_a_run_beside_one_with_other_settings_that_still_runs_has_its_own_directory(
    folder: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "run").mkdir(parents=True)
    other = take(place / "run", "other settings", print)
    run(folder, None, trainer__total_training_steps=1)
    assert f"{place / 'run'} is in use by a run with other settings" in capsys.readouterr().out
    assert names(place / "run-2") == ["global_step_1"] and names(place / "run") == []
    other.release()


def test_the_same_command_twice_at_once_is_refused(folder: Path, place: Path) -> None:
    (place / "run").mkdir(parents=True)
    mine = settings_of(load_config(SFTConfig, words(folder, None)))
    from verl.directory import _purpose

    first = take(place / "run", _purpose(mine), print)
    with pytest.raises(LockedError, match="in use by process"):
        run(folder, None)
    first.release()
    assert not (place / "run-2").exists()


def test_a_directory_of_that_name_that_the_user_named_is_not_numbered(folder: Path, place: Path, whole: Path) -> None:
    run(folder, None, trainer__total_training_steps=1)
    with pytest.raises(UserError, match="this run has other settings"):
        run(folder, None, trainer__total_training_steps=1, optim__lr=2e-3, trainer__default_local_dir=place.resolve() / "run")


# Two runs


def test_a_second_run_is_refused_and_touches_nothing(copied: Callable[[str], Path], folder: Path) -> None:
    directory = copied("busy")
    (directory / "global_step_6.tmp").mkdir()
    (directory / "global_step_6.tmp" / "half").write_text("of the first run")
    first = take(directory, "training", print)
    before = contents(directory)
    with pytest.raises(LockedError) as capture:
        run(folder, directory.name)
    assert f"process {os.getpid()} on {socket.gethostname()}" in str(capture.value) and contents(directory) == before
    first.release()


@pytest.mark.parametrize("trainer", ["ppo", "reward", "eval"])
def test_so_is_one_of_another_kind(trainer: str, folder: Path, tmp_path: Path) -> None:
    from verl.eval import sft_evaluator

    keys = {"data.train_files": folder / "train.jsonl", "model.partial_pretrain": folder / "model", "trainer.default_local_dir": tmp_path}
    of_eval = {"model_path": folder / "model", "test_file": folder / "test.jsonl", "output_dir": tmp_path}
    first = take(tmp_path, "training", print)
    module: Any = {"ppo": ppo_trainer, "reward": reward_trainer, "eval": sft_evaluator}[trainer]
    with pytest.raises(LockedError, match="in use by process"):
        module.main(as_words(of_eval if trainer == "eval" else keys, {}))
    first.release()


def test_the_lock_of_a_killed_run_is_taken_over_after_the_first_line(
    copied: Callable[[str], Path], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = copied("killed")
    dead = replace(Owner.this_process("training"), pid=2**22 + 1)
    (directory / "lock").write_text(json.dumps(asdict(dead)))
    for name in ("." + "0" * 32, "." + "f" * 32, "notes.tmp", "global_step_notes.tmp"):
        (directory / name).touch()
    (directory / "best.tmp").symlink_to("global_step_1")
    for name in ("metrics.jsonl", "config.yaml", "latest_checkpointed_iteration.txt", "trainer_state.json", "best.json"):
        killed_while_replacing(directory / name)
    (directory / "rollouts").mkdir()
    killed_while_replacing(directory / "rollouts" / "step_1.jsonl")
    assert len(list(directory.rglob("*.tmp"))) == 9
    run(folder, directory.name)
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("resuming from") and said[1].startswith(f"took over {directory}/lock from process {2**22 + 1}")
    left = {path.name for path in directory.iterdir()}
    expected = {path.name for path in (folder / "whole").iterdir()} | {"notes.tmp", "global_step_notes.tmp", "rollouts"}
    assert left == expected and not [*(directory / "rollouts").iterdir()], (
        "marks and temporary files are swept but not a user's own, and the lock is gone"
    )


@pytest.mark.parametrize("place", ["file", "folder"])
def test_rows_of_skipped_updates_are_not_written_through_a_link(place: str, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "step_1.jsonl").write_text("precious")
    skipped = tmp_path / "run" / "skipped"
    if place == "folder":
        skipped.parent.mkdir()
        skipped.symlink_to(victim)
    else:
        skipped.mkdir(parents=True)
        (skipped / "step_1.jsonl").symlink_to(victim / "step_1.jsonl")
    said = tell("step 1", "loss nan", "the update was skipped", [{"place": "here"}], skipped / "step_1.jsonl")
    assert (victim / "step_1.jsonl").read_text() == "precious"
    assert ("could not be written" in said) == (place == "folder")


def killed_while_replacing(path: Path) -> None:
    """Leave what a process leaves that is killed after it has written the new file, before the new one takes the old one's place."""
    process = os.fork()
    if process == 0:
        os.replace = lambda *_: os._exit(9)
        replace_text(path, "half")
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9


@pytest.mark.faults
def test_a_run_whose_directory_was_taken_over_writes_no_checkpoint(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from verl.run import Run

    log = Run.log

    def stolen(self: Run, step: int, metrics: dict[str, float]) -> None:
        log(self, step, metrics)
        if step == 1:
            (self.directory / "lock").unlink()
            (self.directory / "lock").write_text(json.dumps(asdict(replace(Owner.this_process("x"), pid=77, host="node-7", token="other"))))

    monkeypatch.setattr(Run, "log", stolen)
    with pytest.raises(LockedError, match="this run stops: the directory now belongs to process 77 on node-7"):
        run(folder, str(tmp_path / "stolen"))
    assert names(tmp_path / "stolen") == []


def test_a_directory_that_was_removed_is_an_error_of_one_line(tmp_path: Path) -> None:
    config = load_config(SFTConfig, ["data.train_files=x", "model.partial_pretrain=x", f"trainer.default_local_dir={tmp_path / 'run'}"])
    held = claim(config)
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(UserError, match="cannot be written: No such file or directory"):
        held.check()
    held.release()


@pytest.mark.faults
def test_all_ranks_of_a_second_run_end_together(copied: Callable[[str], Path], folder: Path) -> None:
    directory = copied("ranks")
    first = take(directory, "training", print)
    done = command(*SFT, *words(folder, directory.name), processes=2, timeout=120)
    first.release()
    assert done.returncode != 0 and done.stderr.count("error: ") == 1 and "exitcode  : 2" in done.stderr
    assert f"process {os.getpid()} on" in done.stderr


@pytest.mark.faults
@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_cannot_be_written_is_refused(folder: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot be written: Permission denied"):
        run(folder, str(tmp_path / "run"))


# Reinforcement learning and preferences

ONE_STEP: dict[str, object] = {"trainer__total_training_steps": 1, "trainer__logger": "[]"}
RL_CHANGED: dict[str, dict[str, object]] = {
    "method": {"algorithm__name": "rloo"},
    "a key of the method": {"algorithm__kl_coef": 0.1},
    "updates": {"algorithm__updates_per_step": 2},
    "temperature": {"rollout__temperature": 0.7},
    "answers": {"rollout__samples_per_prompt": 2},
    "length of answers": {"rollout__max_new_tokens": 10},
    "reward": {"reward__name": "gsm8k"},
    "prompts": {"data__prompts_per_step": 2},
}


@pytest.fixture(scope="module")
def reinforced(folder: Path) -> Path:
    ppo_trainer.main(rl_words(folder, "reinforced", **ONE_STEP))
    return folder / "reinforced"


def test_a_run_of_another_command_does_not_go_on(folder: Path, whole: Path) -> None:
    with pytest.raises(UserError, match='command: "verl sft" -> "verl ppo"'):
        ppo_trainer.main(rl_words(folder, "whole", **ONE_STEP))


@pytest.mark.parametrize("change", RL_CHANGED)
def test_reinforcement_learning_is_compared_too(change: str, folder: Path, reinforced: Path) -> None:
    with pytest.raises(UserError) as capture:
        ppo_trainer.main(rl_words(folder, "reinforced", **{**ONE_STEP, **RL_CHANGED[change]}))
    refused(capture, RL_CHANGED[change])


def test_a_longer_reinforcement_learning_goes_on_and_an_edited_reward_is_said(
    folder: Path, reinforced: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its learning rate is constant."""
    (folder / "vowels.py").write_text(REWARD + "# edited\n")
    ppo_trainer.main(rl_words(folder, "reinforced", trainer__total_training_steps=2, trainer__logger="[]"))
    said = capsys.readouterr().out
    assert f"reward.name={folder / 'vowels.py'} has been edited since this checkpoint" in said
    assert "the run now has 2 steps in place of 1" in said and [line["step"] for line in metrics_of(reinforced)] == [1, 2]


# The record of settings


def test_every_key_has_one_kind() -> None:
    keys = {key for command in (SFT_COMMAND, PPO, REWARD_COMMAND) for key, _ in _leaves(_tree(command.schema()()))}
    keys = {key.removeprefix("critic.") if key.startswith("critic.optim.") else key for key in keys}
    listed = [key for kind in trajectory.KINDS.values() for key in kind.split()]
    assert len(listed) == len(set(listed)), "a key is there twice"
    assert keys - set(listed) == set(), "give these keys a kind in verl/config/trajectory.py"
    assert set(listed) - keys == set(), "these keys are no longer there"


def test_settings_are_read_back_from_yaml_as_they_are() -> None:
    from verl.config.load import to_yaml

    given = ["data.train_files=[a.jsonl,{path: b.jsonl, weight: 2.0}]", "model.partial_pretrain=org/name", "optim.lr=1e-5"]
    for schema in (SFT_COMMAND, PPO, REWARD_COMMAND):
        config = load_config(schema.schema(), [*given, "trainer.experiment_name=1.10"])
        assert trajectory.values_of(yaml.safe_load(to_yaml(config))) == trajectory.values_of(config)


def test_the_default_engine_and_the_one_that_it_takes_are_no_change() -> None:
    before, now = ({"rollout.name": json.dumps(name), "optim.lr": "1e-05"} for name in ("native", "auto"))
    assert trajectory.changes(before, now) == [] == trajectory.changes(now, before)
    assert [str(change) for change in trajectory.changes({**before, "rollout.name": '"hf"'}, now)] == ['rollout.name: "hf" -> "auto"']


@pytest.mark.parametrize("text", ["", "[]", "a: [", "optim: 3\n", "\x00", "trainer:\n  default_local_dir: [1]\n", "optim: {lr: {a: 1}}\n"])
def test_a_damaged_record_is_no_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    (tmp_path / "global_step_3" / "trainer").mkdir(parents=True)
    (tmp_path / "global_step_3" / "trainer" / "state.json").write_text(text)
    assert isinstance(recorded_settings(tmp_path), dict)


# metrics.jsonl


def line(step: int, **more: float) -> str:
    return json.dumps({"step": step, **more}) + "\n"


def test_metrics_have_one_line_of_each_committed_step(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(line(0) + line(1) + line(2) + line(2, again=1) + line(3) + '{"step": 4, "tr')
    begin_files(tmp_path, "optim: {lr: 1}\n", 2, print)
    assert (tmp_path / "metrics.jsonl").read_text() == line(0) + line(1) + line(2, again=1)
    assert not (tmp_path / "metrics.jsonl.tmp").exists()


def test_metrics_are_replaced_so_that_a_kill_leaves_the_old_or_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "metrics.jsonl").write_text(line(1) + line(2))

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("verl.durable.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        begin_files(tmp_path, "", 1, print)
    assert (tmp_path / "metrics.jsonl").read_text() == line(1) + line(2)


def test_metrics_of_other_settings_are_set_aside(tmp_path: Path) -> None:
    said: list[str] = []
    for rate in (1, 2, 2):
        begin_files(tmp_path, f"optim: {{lr: {rate}}}\n", 0, said.append)
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write(line(rate))
    assert (tmp_path / "metrics-1.jsonl").read_text() == line(1) and (tmp_path / "metrics.jsonl").read_text() == line(2)
    assert "metrics-1.jsonl" in said[0] and "other settings" in said[0]


def test_metrics_whose_checkpoints_were_moved_away_are_set_aside_too(tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "metrics.jsonl").write_text(line(1) + line(2))
    (tmp_path / "config.yaml").write_text("optim: {lr: 1}\n")
    begin_files(tmp_path, "optim: {lr: 1}\n", 0, said.append)
    assert (tmp_path / "metrics-1.jsonl").read_text() == line(1) + line(2) and not (tmp_path / "metrics.jsonl").exists()
    assert said == ["metrics.jsonl of the run before, which has no checkpoint here, is now metrics-1.jsonl"]


@pytest.mark.faults
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("trainer", ["sft", "ppo"])
def test_a_run_killed_around_a_commit_has_each_step_once(trainer: str, when: str, folder: Path, tmp_path: Path) -> None:
    """SIGKILL right before, or right after, the second checkpoint is committed; the same command then goes on."""
    (tmp_path / "kills.py").write_text(KILLS)
    output = tmp_path / "run"
    module = {"sft": fsdp_sft_trainer, "ppo": ppo_trainer}[trainer].__name__
    keys = (
        words(folder, str(output))
        if trainer == "sft"
        else rl_words(folder, str(output), trainer__save_freq=1, trainer__total_training_steps=3)
    )
    killed = run_forked(tmp_path / "kills.py", module, when, *keys, folder=tmp_path, timeout=200)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    done = run_forked("-m", module, *keys, folder=tmp_path, timeout=200)
    assert done.returncode == 0 and done.stdout.startswith("resuming from"), done.stderr[-2000:]
    assert "took over" in done.stdout.splitlines()[1]
    assert [line["step"] for line in metrics_of(output)] == list(range(1, 5 if trainer == "sft" else 4))


KILLS = """
import importlib, os, signal, sys
from pathlib import Path
rename = Path.rename
commits = [0]
def killing(self, target):
    if str(target).rpartition("_")[2].isdecimal() and self.name.endswith(".tmp"):
        commits[0] += 1
        if commits[0] == 2 and sys.argv[2] == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        rename(self, target)
        if commits[0] == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return target
    return rename(self, target)
Path.rename = killing
if __name__ == "__main__":
    importlib.import_module(sys.argv[1]).main(sys.argv[3:])
"""
