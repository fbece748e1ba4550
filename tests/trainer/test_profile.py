"""The trace of a few steps: which steps are in it, what is written, and the share of the time in which the GPU was busy."""

import gzip
import json
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from tiny import write_problems_and_model

from verl import dist
from verl.config.load import load_config
from verl.config.sft import SFTConfig
from verl.data.loader import Step
from verl.errors import UserError
from verl.run import Run
from verl.trainer import fsdp_sft_trainer
from verl.trainer.profile import Trace, covered, profiled, read_gpu_trace


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_problems_and_model(tmp_path_factory.mktemp("profile"), 40, 5)


def train(folder: Path, output: str, *more: str) -> Path:
    keys = [f"data.train_files={folder}/train.jsonl", f"model.partial_pretrain={folder}/model", f"data.cache_dir={folder}/cache"]
    keys += ["data.max_length=256", f"trainer.default_local_dir={folder / output}", "trainer.total_training_steps=6"]
    fsdp_sft_trainer.main([*keys, "trainer.save_freq=never", *more])
    return folder / output


def test_a_run_traces_the_step_it_was_told_and_the_two_after_it(folder: Path) -> None:
    run = train(folder, "traced", "trainer.profile_step=3")
    assert {path.name for path in (run / "profile").iterdir()} == {"step_3_rank_0.json.gz", "step_3_rank_0.txt"}
    first, head, *rows = (run / "profile" / "step_3_rank_0.txt").read_text().splitlines()
    assert re.fullmatch(r"profile of steps 3-5: [\d,]+ ms per step", first)
    assert head.split() == ["ms", "count", "name"]
    times = [float(row.split()[0]) for row in rows]
    assert len(rows) == 30 and times == sorted(times, reverse=True) and times[0] > 0
    assert f"{first}; written to {run / 'profile'}" in (run / "train.log").read_text()


def test_a_run_that_never_saves_leaves_no_checkpoint_and_one_that_is_not_traced_no_profile(folder: Path) -> None:
    run = train(folder, "plain")
    assert sorted(path.name for path in run.iterdir()) == ["config.yaml", "environment.json", "metrics.jsonl", "train.log"]


class Told:
    """A run's directory, and what was said."""

    def __init__(self, directory: Path):
        self.directory, self.said = directory, ""

    def say(self, text: str) -> None:
        self.said += text


def steps(first: int, last: int) -> list[Step]:
    """Numbers as logged, from 1."""
    return [Step(number - 1, 0, 0, 0, []) for number in range(first, last + 1)]


@pytest.mark.parametrize(("first_step", "span"), [(1, "1-3"), (4, "4-6"), (5, "5-6"), (6, "6-6")])
def test_the_loop_gets_every_step_and_the_trace_ends_with_the_run(first_step: int, span: str, tmp_path: Path) -> None:
    told, given = Told(tmp_path), steps(1, 6)
    assert list(profiled(given, first_step, torch.device("cpu"), cast(Run, told))) == given
    assert told.said.startswith(f"profile of steps {span}: ")


def test_a_step_that_the_run_does_not_have_is_told(tmp_path: Path) -> None:
    told = Told(tmp_path)
    assert len(list(profiled(steps(5, 6), 3, torch.device("cpu"), cast(Run, told)))) == 2
    assert told.said == "trainer.profile_step=3: this run had no such step; no profile was written"


def test_the_time_of_a_step_is_that_of_the_loops_work_on_it(tmp_path: Path) -> None:
    told = Told(tmp_path)
    for step in profiled(steps(1, 6), 2, torch.device("cpu"), cast(Run, told)):
        time.sleep(0.1 if 2 <= step.number + 1 <= 4 else 1)  # a step too many, or too few, would show
    milliseconds = int(re.search(r"([\d,]+) ms", told.said)[1].replace(",", ""))
    assert 100 <= milliseconds < 300


@pytest.mark.parametrize(
    ("intervals", "length"),
    [([], 0), ([(0, 2), (5, 6)], 3), ([(0, 10), (2, 3), (9, 12)], 12), ([(4, 6), (0, 5)], 6), ([(1, 2), (1, 2)], 1)],
)
def test_work_side_by_side_counts_once(intervals: list[tuple[float, float]], length: float) -> None:
    assert covered(intervals) == length


def test_only_what_ran_on_the_gpu_makes_it_busy(tmp_path: Path) -> None:
    def event(category: str, start: float, duration: float, name: str = "gemm") -> dict[str, object]:
        return {"ph": "X", "cat": category, "ts": start, "dur": duration, "name": name}

    events = [event("kernel", 0, 400_000), event("kernel", 500_000, 100_000), event("gpu_memcpy", 300_000, 200_000, "copy")]
    events += [event("cuda_runtime", 0, 1_000_000, "launch"), {"ph": "M", "name": "process_name"}]
    with gzip.open(tmp_path / "trace.json.gz", "wt") as file:
        json.dump({"traceEvents": events}, file)
    found = read_gpu_trace(tmp_path / "trace.json.gz", seconds=1.2)
    assert found.busy_share == pytest.approx(0.5)
    assert [(item.name, item.milliseconds, item.count) for item in found.items] == [("gemm", 500, 2), ("copy", 200, 1)]
    assert found.describe(20, 3) == "profile of steps 20-22: 400 ms per step, GPU busy 50.0%"


@pytest.mark.parametrize(
    ("words", "message"), [(["0"], "found 0"), (["7", "trainer.total_training_steps=6"], "step 7 is after the last one, 6")]
)
def test_a_step_that_cannot_be_is_an_error(words: list[str], message: str) -> None:
    step, *more = words
    with pytest.raises(UserError, match=message) as error:
        load_config(SFTConfig, ["data.train_files=a.jsonl", "model.partial_pretrain=m", f"trainer.profile_step={step}", *more])
    assert error.value.where == "trainer.profile_step"


@pytest.mark.gpu
def test_a_host_that_keeps_the_gpu_waiting_is_seen(tmp_path: Path) -> None:
    device = dist.start()
    square = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    shares = SimpleNamespace()
    for name, pause in (("steady", 0.0), ("waiting", 0.2)):
        square @ square
        trace = Trace(device)
        for _ in range(3):
            for _ in range(100):
                square @ square
            torch.cuda.synchronize()
            time.sleep(pause)
        setattr(shares, name, trace.finish(tmp_path / f"{name}.json.gz").busy_share)
    dist.stop()
    assert shares.steady > 0.9
    assert 0.1 < shares.waiting < 0.7
