"""Saves that are killed, or whose disk fails: nothing that was complete is lost, and the run goes on as if nothing had happened."""

import errno
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sft_runs
import torch
from faults.checkpoints import hashes
from forked import run_forked
from runs import SFT, command, metrics_of, timeless
from safetensors import SafetensorError
from tiny import write_model, write_problems_and_model

from verl.config.shared import OptimConfig
from verl.engine import checkpoint, draft
from verl.engine.damage import find_damage, find_newest
from verl.engine.engine import Engine
from verl.engine.position import Position
from verl.engine.scorers import TokenScorer
from verl.engine.stored_state import StoredState
from verl.errors import DiskError
from verl.manifest import Manifest
from verl.models.load import load_for_training
from verl.models.saved import export_model
from verl.trainer import fsdp_sft_trainer

RUN: dict[str, object] = {"trainer__total_training_steps": 6, "trainer__save_freq": 2, "trainer__max_ckpt_to_keep": 2}
ASYNC: dict[str, object] = {**RUN, "trainer__async_save": "true"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_problems_and_model(tmp_path_factory.mktemp("saves"))


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    sft_runs.train(folder, "whole", **RUN)
    return folder / "whole"


# Named points of a save: a function, and whether the process is killed before or after its call. The second call is that of step 4.
POINTS = [
    ("verl.engine.draft:Draft.begin", "after"),
    ("verl.engine.build:Built.export", "after"),
    ("verl.engine.stored_state:StoredState.write", "after"),
    ("verl.engine.draft:save_file", "after"),
    ("verl.engine.stored_state:StoredState.finish", "after"),
    ("verl.manifest:Manifest.write", "before"),
    ("verl.manifest:Manifest.write", "after"),
    ("verl.engine.draft:Draft._rename", "before"),
    ("verl.engine.draft:replace_text", "before"),  # between the rename and the tracker file
    ("verl.engine.draft:replace_text", "after"),
]
IN_THE_THREAD = [POINTS[2], POINTS[6], POINTS[8]]
IN_RETENTION = [("verl.engine.checkpoint:_delete", "before"), ("verl.engine.checkpoint:remove", "before")]
KILLED = """
import importlib, os, signal, sys
from verl.errors import exit_on_user_error
from verl.trainer.fsdp_sft_trainer import main

point, when, number = sys.argv[1], sys.argv[2], int(sys.argv[3])
module, _, name = point.partition(":")
place = importlib.import_module(module)
*parents, last = name.split(".")
for parent in parents:
    place = getattr(place, parent)
real, calls = getattr(place, last), 0

def call(*arguments, **options):
    global calls
    calls += 1
    if calls == number and when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    result = real(*arguments, **options)
    if calls == number:
        os.kill(os.getpid(), signal.SIGKILL)
    return result

setattr(place, last, call)
exit_on_user_error(main, sys.argv[4:])
"""


@pytest.mark.faults
@pytest.mark.parametrize(
    ("point", "when", "keys", "number"),
    [
        *((*point, RUN, 2) for point in POINTS),
        *((*point, ASYNC, 2) for point in IN_THE_THREAD),
        *((*point, {**RUN, "trainer__max_ckpt_to_keep": 1}, 1 if "_delete" in point[0] else 2) for point in IN_RETENTION),
    ],
)
def test_a_run_that_is_killed_while_saving_goes_on_bit_for_bit(
    point: str, when: str, keys: dict[str, object], number: int, folder: Path, whole: Path, tmp_path: Path
) -> None:
    (tmp_path / "killed.py").write_text(KILLED)
    words = [word.replace(str(folder / "out"), str(tmp_path / "out")) for word in sft_runs.words(folder, "out", **keys)]
    done = run_forked(tmp_path / "killed.py", point, when, number, *words, folder=tmp_path)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    there = [path for path in checkpoint.committed(tmp_path / "out") if find_damage(path) is None]
    assert there, "the checkpoint before is there"
    fsdp_sft_trainer.main(words)
    log = (tmp_path / "out/train.log").read_text()
    assert "resuming from" in log and "skipping" not in log
    assert hashes(tmp_path / "out/global_step_6") == hashes(whole / "global_step_6")
    assert timeless(metrics_of(tmp_path / "out")) == timeless(metrics_of(whole))
    assert not list((tmp_path / "out").glob("*.tmp"))
    assert (tmp_path / "out/latest_checkpointed_iteration.txt").read_text() == "6\n"


# Disks that fail

HERE = Position(step=2, tokens=100, supervised_tokens=50, rows=24, rows_per_step=4, seed=1, data_fingerprint="f")


class Saved:
    """A small model that is saved without a run."""

    def __init__(self, folder: Path):
        self.root = folder / "run"
        self._loaded = load_for_training(str(write_model(folder / "model")))
        self._engine = Engine(
            TokenScorer(self._loaded.model), OptimConfig(), total_steps=8, device=torch.device("cpu"), compute_dtype=torch.float32
        )

    def save(self, step: int) -> Path:
        export = partial(export_model, model=self._loaded.model, saved_dtypes=self._loaded.saved_dtypes)
        return checkpoint.save(self.root, self._engine, replace(HERE, step=step), export)


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> Any:
        raise error

    return fail


def quoted(number: int) -> SafetensorError:
    """The error of safetensors, which only quotes the system's."""
    return SafetensorError(f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})")


PLACES: dict[str, Callable[[pytest.MonkeyPatch, int], object]] = {
    "making the directory": lambda patch, number: patch.setattr(Path, "mkdir", raising(OSError(number, os.strerror(number)))),
    "writing the model": lambda patch, number: patch.setattr("verl.models.on_disk.save_file", raising(quoted(number))),
    "writing tensors": lambda patch, number: patch.setattr(StoredState, "write", raising(OSError(number, os.strerror(number)))),
    "writing random states": lambda patch, number: patch.setattr(draft, "save_file", raising(quoted(number))),
    "writing metadata": lambda patch, number: patch.setattr(StoredState, "finish", raising(OSError(number, os.strerror(number)))),
    "writing the manifest": lambda patch, number: patch.setattr(Manifest, "write", raising(OSError(number, os.strerror(number)))),
    "flushing": lambda patch, number: patch.setattr(os, "fsync", raising(OSError(number, os.strerror(number)))),
    "renaming": lambda patch, number: patch.setattr(Path, "rename", raising(OSError(number, os.strerror(number)))),
}
ERRORS = [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT]


@pytest.mark.faults
@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("number", ERRORS)
@pytest.mark.parametrize("place", PLACES)
def test_a_disk_that_fails_is_named_on_one_line_and_nothing_is_lost(place: str, number: int, tmp_path: Path) -> None:
    saved = Saved(tmp_path)
    before = saved.save(2)
    with pytest.MonkeyPatch.context() as patch:
        PLACES[place](patch, number)
        with pytest.raises(DiskError) as caught:
            saved.save(4)
    first, *rest = str(caught.value).splitlines()
    assert first.startswith(f"{saved.root}/global_step_4.tmp: cannot be written: {os.strerror(number)}") and first.endswith(" free)")
    assert caught.value.exit_code == 4 and len(rest) == 1
    assert find_newest(saved.root, print) == before and not (saved.root / "global_step_4.tmp").exists()
    assert find_newest(saved.root, print) != saved.save(4) == find_newest(saved.root, print), "with room again, it saves"


# Several processes


@pytest.mark.faults
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_write_beside_training_what_they_would_at_once(strategy: str, folder: Path) -> None:
    for output, words in (("sync", RUN), ("async", ASYNC)):
        keys = sft_runs.words(folder, f"{strategy}-{output}", model__strategy=strategy, **words)
        done = command(*SFT, *keys, processes=2)
        assert done.returncode == 0, done.stderr[-3000:]
    for step in (4, 6):
        assert hashes(folder / f"{strategy}-async/global_step_{step}") == hashes(folder / f"{strategy}-sync/global_step_{step}")


FAILS_ON_RANK_1 = """
import os, sys
from verl.engine.stored_state import StoredState
from verl.errors import exit_on_user_error
from verl.trainer.fsdp_sft_trainer import main

write = StoredState.write

def fails(self, *arguments):
    if os.environ["RANK"] == "1":
        raise OSError(28, "No space left on device")
    return write(self, *arguments)

StoredState.write = fails
exit_on_user_error(main, sys.argv[1:])
"""


@pytest.mark.faults
@pytest.mark.parametrize("keys", [RUN, ASYNC])
def test_a_disk_that_fails_on_one_process_ends_all(keys: dict[str, object], folder: Path, tmp_path: Path) -> None:
    (tmp_path / "fails.py").write_text(FAILS_ON_RANK_1)
    output = f"rank-fails-{'trainer__async_save' in keys}"
    done = command(tmp_path / "fails.py", *sft_runs.words(folder, output, **keys), processes=2, timeout=200)
    assert done.returncode != 0 and done.stderr.count("error: ") >= 1
    assert "global_step_2.tmp: cannot be written: No space left on device" in done.stderr
    assert not list((folder / output).glob("global_step_*"))
