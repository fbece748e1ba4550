"""Full and broken disks: one line with the path, what is needed and what is free, exit code 4, and no work is lost.

The disks are patched writes, a limit on file sizes, /dev/full, a directory that may not be written and, where this process may mount one,
a small tmpfs.
"""

import errno
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from faults.input_commands import Ended, run_command
from places import ROOT
from runs import lines_of
from sft_runs import words
from tiny import write_problems_and_model

from verl import disk, durable
from verl import run as run_module
from verl.data import cache
from verl.engine import checkpoint, draft
from verl.engine.stored_state import StoredState
from verl.errors import DiskError, UserError
from verl.eval import report, sft_evaluator
from verl.manifest import Manifest
from verl.models import export
from verl.trainer import fsdp_sft_trainer, room

ERRORS = ("ENOSPC", "EIO", "EROFS", "EDQUOT", "EACCES", "EMFILE")
FEW: dict[str, object] = {"trainer__total_training_steps": 4, "trainer__save_freq": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Problems, a small model, and a run of two checkpoints."""
    folder = write_problems_and_model(tmp_path_factory.mktemp("disk"), train_rows=24, test_rows=4, narrow=False)
    assert train(folder, "good").code == 0
    return folder


def train(folder: Path, output: str, **changes: object) -> Ended:
    return run_command(fsdp_sft_trainer.main, words(folder, output, **{**FEW, **changes}))


def broken(name: str, path: str = "file") -> OSError:
    number = getattr(errno, name)
    return OSError(number, os.strerror(number), path)


def assert_disk_error(ended: Ended, name: str = "ENOSPC", *, place: str = "") -> None:
    """One line that says what failed where, with the free space; exit code 4."""
    assert ended.code == 4, ended.out[-500:] + ended.err
    assert ended.err.startswith("error: ") and ended.err.count("error: ") == 1 and "Traceback" not in ended.err
    assert os.strerror(getattr(errno, name)) in ended.err and place in ended.err and "\n  fix: " in ended.err
    assert re.search(r"\d(\.\d)? (GiB|MiB|KiB|bytes) free", ended.err), ended.err


# While a checkpoint is written


def fails_at(monkeypatch: pytest.MonkeyPatch, where: str, error: BaseException, *, after: int = 0) -> None:
    """Let one of the steps of writing a checkpoint fail, the second checkpoint's with `after=1`."""
    owner, name = {
        "weights": (safetensors.torch, "serialize_file"),
        "state": (StoredState, "write"),
        "random states": (draft, "save_file"),
        "manifest": (Manifest, "write"),
        "flush": (draft, "flush"),
        "rename": (draft.Draft, "_rename"),
    }[where]
    real: Callable[..., Any] = getattr(owner, name)
    calls = iter(range(10**6))

    def call(*given: object, **options: object) -> Any:
        if next(calls) >= after:
            raise error
        return real(*given, **options)

    monkeypatch.setattr(owner, name, call)


@pytest.mark.parametrize("name", ["ENOSPC", *(pytest.param(name, marks=pytest.mark.faults) for name in ERRORS[1:])])
def test_a_checkpoint_that_cannot_be_written_is_named_and_the_one_before_remains(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    shutil.copytree(folder / "good", folder / name, ignore=shutil.ignore_patterns("global_step_4"))
    fails_at(monkeypatch, "random states", broken(name))
    ended = train(folder, name)
    assert_disk_error(ended, name, place="" if name == "EMFILE" else "file")
    assert [path.name for path in sorted((folder / name).glob("global_step_*"))] == ["global_step_2"]
    monkeypatch.undo()
    assert train(folder, name).code == 0  # the same command goes on
    assert same_weights(folder / name / "global_step_4", folder / "good" / "global_step_4")


@pytest.mark.faults
@pytest.mark.parametrize("where", ["weights", "state", "random states", "manifest", "flush", "rename"])
def test_wherever_a_checkpoint_fails_nothing_incomplete_is_left(folder: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    fails_at(monkeypatch, where, broken("ENOSPC"))
    assert_disk_error(train(folder, f"at {where}"))
    assert not list((folder / f"at {where}").glob("global_step_*"))


@pytest.mark.faults
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
            "No space left on device",
        ),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"), "the file was cut short"),
        (OSError(28, "Error writing bytes to file. Detail: [errno 28] No space left on device"), "No space left on device"),
    ],
)
def test_errors_of_libraries_that_come_from_a_disk_are_told_as_such(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    fails_at(monkeypatch, "state", error)
    ended = train(folder, "library")
    assert ended.code == 4 and said in ended.err and "global_step_2.tmp" in ended.err and "needed" in ended.err and "free" in ended.err


@pytest.mark.faults
def test_another_error_while_saving_is_not_taken_for_one_of_the_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fails_at(monkeypatch, "state", RuntimeError("a mistake in the code"))
    with pytest.raises(RuntimeError, match="a mistake"):
        train(folder, "mistake")


def same_weights(one: Path, other: Path) -> bool:
    return (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


# Before anything is written


def room_of(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    for owner in (disk, room):
        monkeypatch.setattr(owner, "free_bytes", lambda path: free)


def test_a_disk_too_small_for_one_checkpoint_is_refused_before_training(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room_of(monkeypatch, 20 * 2**20)
    ended = train(folder, "small")
    assert ended.code == 2 and "step 1" not in ended.out
    assert re.search(r"no space on the disk for a checkpoint: \d+\.\d MiB needed, 20\.0 MiB free", ended.err)
    assert all(way in ended.err for way in ("make room", "trainer.default_local_dir", "model.lora_rank", "trainer.save_freq=never"))
    assert train(folder, "small", trainer__save_freq="never").code == 0


@pytest.mark.faults
def test_a_tight_disk_is_said_with_the_arithmetic(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room_of(monkeypatch, 64 * 2**20)
    ended = train(folder, "tight", trainer__save_freq=1)
    assert ended.code == 0 and re.search(r"warning: .*tight: 4 checkpoints of 2\d\.\d MiB will not fit on the disk", ended.out)
    assert "trainer.max_ckpt_to_keep=1" in ended.out
    assert "will not fit" not in train(folder, "tight_kept", trainer__save_freq=1, trainer__max_ckpt_to_keep=1).out


@pytest.mark.faults
def test_the_size_that_is_planned_is_the_size_that_is_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned: list[int] = []
    monkeypatch.setattr(room, "compared", lambda config, directory, each, saves: planned.append(each))
    assert train(folder, "size").code == 0
    written = disk.folder_bytes(folder / "size" / "global_step_4")
    tokenizer = sum(path.stat().st_size for path in (folder / "size" / "global_step_4").glob("*.json"))
    assert 0 <= written - planned[0] < tokenizer + 500_000


def test_room_is_looked_at_before_each_save(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "free_bytes", lambda path: 2**40)
    monkeypatch.setattr(disk, "free_bytes", lambda path: 2**20)
    ended = train(folder, "filled")
    assert ended.code == 4 and re.search(
        r"global_step_2\.tmp: no space left on the disk for a checkpoint \(\d+\.\d MiB needed, 1\.0 MiB free\)", ended.err
    )


def test_old_checkpoints_that_will_be_removed_count() -> None:
    assert [room.number_of_new(keep, 9, there) for keep, there in ((None, 0), (-1, 3), (2, 0), (2, 1), (2, 7), (20, 0))] == [
        9,
        9,
        3,
        2,
        1,
        9,
    ]
    assert [room.number_of_saves(every, 10, 4) for every in (-1, 1, 3, "epoch")] == [1, 10, 4, 3]


# Metrics, logs and the cache


def test_a_metrics_line_that_fails_is_told_once_and_written_with_the_next(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, tries = durable.append_text, iter(range(100))

    def append(path: Path, text: str, **options: Any) -> None:
        if path.name == "metrics.jsonl" and next(tries) < 2:
            raise broken("ENOSPC", str(path))
        real(path, text, **options)

    monkeypatch.setattr(run_module, "append_text", append)
    ended = train(folder, "metrics")
    assert ended.code == 0 and ended.out.count("metrics.jsonl: cannot be written: No space left") == 1
    assert [line["step"] for line in lines_of(folder / "metrics" / "metrics.jsonl")] == [1, 2, 3, 4]


@pytest.mark.faults
def test_metrics_that_could_never_be_written_are_in_the_result(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def append(path: Path, text: str, **options: Any) -> None:
        raise broken("EIO", str(path))

    monkeypatch.setattr(run_module, "append_text", append)
    from verl.config.load import load_config
    from verl.config.sft import SFTConfig

    result = fsdp_sft_trainer.train(load_config(SFTConfig, words(folder, "never", **FEW)))
    assert [line["step"] for line in result.metrics] == [1, 2, 3, 4] and result.checkpoint is not None


@pytest.mark.faults
def test_a_line_that_fails_half_written_leaves_no_half(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    durable.append_text(path, "first\n")
    limited("verl.durable", f"append_text(Path({str(path)!r}), 'x' * 10_000)", limit=5000)
    assert path.read_text() == "first\n"


def limited(module: str, call: str, *, limit: int) -> None:
    """Run a call in a process whose files may have so many bytes; it must raise an OSError."""
    code = (
        f"import resource\nfrom pathlib import Path\nfrom {module} import *\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\ntry:\n    {call}\nexcept OSError:\n    raise SystemExit(7)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 7, done.stderr


@pytest.mark.faults
@pytest.mark.parametrize("name", ["trainer_state.json", "train.log"])
def test_a_file_for_people_that_fails_does_not_end_the_run(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for function in ("append_text", "replace_text"):
        real = getattr(durable, function)

        def fails(path: Path, text: str, real: Callable[..., None] = real, **options: Any) -> None:
            if path.name == name:
                raise broken("ENOSPC", str(path))
            real(path, text, **options)

        monkeypatch.setattr(run_module, function, fails)
    ended = train(folder, f"people {name}")
    assert ended.code == 0 and ended.out.count(f"{name}: cannot be written") == 1
    assert (folder / f"people {name}" / "global_step_4").is_dir()


@pytest.mark.parametrize("name", ["ENOSPC", *(pytest.param(name, marks=pytest.mark.faults) for name in ERRORS[1:])])
def test_rows_that_cannot_be_cached_are_trained_without_the_cache(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def fails(path: Path, tables: object) -> None:
        raise broken(name, str(path))

    monkeypatch.setattr(cache, "_write", fails)
    output = folder / f"uncached {name}"
    ended = train(folder, output.name, data__cache_dir=folder / f"cache {name}")
    assert ended.code == 0 and ended.out.count("are kept in memory, not in the cache") == 1
    assert same_weights(output / "global_step_4", folder / "good" / "global_step_4")
    assert not list((folder / f"cache {name}").rglob("*.tmp"))


# Evaluation and export


def evaluation(folder: Path, output: str) -> list[str]:
    return [
        f"model_path={folder / 'good' / 'global_step_4'}",
        f"test_file={folder / 'test.jsonl'}",
        f"output_dir={folder / output}",
        "max_new_tokens=4",
    ]


@pytest.mark.faults
@pytest.mark.parametrize("name", ["ENOSPC", "EIO", "EROFS"])
def test_results_of_an_evaluation_that_cannot_be_written_are_still_shown(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    output, real = f"results {name}", durable.replace_text

    def fails(path: Path, text: str, **options: Any) -> None:
        if text:
            raise broken(name, str(path))
        real(path, text, **options)

    monkeypatch.setattr(report, "replace_text", fails)
    ended = run_command(sft_evaluator.main, evaluation(folder, output))
    assert_disk_error(ended, name, place="predictions.jsonl")
    assert "exact match" in ended.out and "questions" in ended.out


@pytest.mark.faults
def test_a_disk_too_small_for_the_answers_is_said_before_they_are_generated(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "free_bytes", lambda path: 1000)
    assert "make room" in run_command(sft_evaluator.main, evaluation(folder, "few bytes")).out


def test_an_export_that_fails_leaves_nothing_and_says_what_it_needs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(export, "export_model", fails)
    ended = run_command(export.main, [str(folder / "good" / "global_step_4"), str(folder / "exported")])
    assert_disk_error(ended, place="exported")
    assert "needed" in ended.err and not (folder / "exported").exists() and not list(folder.glob(".exported*"))


@pytest.mark.faults
def test_an_export_is_refused_where_it_will_not_fit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "free_bytes", lambda path: 10)
    ended = run_command(export.main, [str(folder / "good" / "global_step_4"), str(folder / "exported")])
    assert ended.code == 4 and re.search(
        r"no space left on the disk for the exported model \(\d\.\d MiB needed, 10 bytes free\)", ended.err
    )


# Real disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 24 MiB, which holds one checkpoint of the small model."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(place)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("only root may mount a small disk")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.faults
def test_a_real_full_disk_keeps_the_checkpoint_that_fits(folder: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "BESIDES", 0)
    output = small_disk / "run"
    ended = run_command(fsdp_sft_trainer.main, words(folder, "x", **{**FEW, "trainer__default_local_dir": output}))
    assert ended.code == 4 and ended.err.count("error: ") == 1 and "global_step_4.tmp" in ended.err, ended.err
    assert [path.name for path in output.glob("global_step_*")] == ["global_step_2"]
    assert checkpoint.find_damage(output / "global_step_2") is None


@pytest.mark.faults
def test_a_real_limit_on_file_sizes_is_one_line(folder: Path) -> None:
    given = ["sft", *words(folder, "limited", **FEW)]
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (2**21, 2**21)); "
        f"from verl.cli import main; sys.argv[1:] = {given!r}; main()"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 4 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.count("error: ") == 1 and "global_step_2.tmp" in done.stderr


@pytest.mark.faults
def test_output_that_nobody_can_take_does_not_end_a_run(folder: Path) -> None:
    given = words(folder, "dev_full", **FEW)
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "verl", "sft", *given],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    assert "standard output cannot be written" in (folder / "dev_full" / "train.log").read_text()
    assert (folder / "dev_full" / "global_step_4").is_dir()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_may_not_be_written_is_named(folder: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    ended = run_command(fsdp_sft_trainer.main, words(folder, "x", **{**FEW, "trainer__default_local_dir": tmp_path / "run"}))
    assert ended.code == 2 and "Permission denied" in ended.err


# What counts as an error of the disk


@pytest.mark.parametrize(
    "error", [ConnectionRefusedError(111, "Connection refused"), OSError("no such model"), ValueError("x"), UserError("x")]
)
def test_other_errors_are_not_the_disks(error: Exception) -> None:
    assert disk.disk_error(error) is None


def test_an_error_inside_another_is_found() -> None:
    outer = RuntimeError("saving failed")
    outer.__cause__ = broken("EDQUOT", "/x/y")
    found = disk.disk_error(outer, needed=2**30)
    assert isinstance(found, DiskError) and found.where == "/x/y" and "1.0 GiB needed" in found.what
    with pytest.raises(DiskError, match="/x/y"), disk.disk_errors_named("/z"):
        raise outer
