"""Loggers: one file each, and none of them can delay or stop a run."""

import csv
import json
import math
import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from forked import Forked
from places import ROOT
from runs import SECRET, run_with

from verl import pace
from verl.errors import UserError
from verl.loggers import console, mlflow, swanlab, tensorboard, trackio, wandb
from verl.loggers._fallback import Silent
from verl.loggers._redact import redact
from verl.run import Run, read_metrics

STEP = {"epoch": 0, "train/loss": 2.31, "train/lr": 2e-5, "train/grad_norm": 0.5, "train/tokens": 900, "perf/tokens_per_second": 1234.4}


def lines_of(run: Run) -> list[str]:
    return (run.directory / "train.log").read_text(encoding="utf-8").splitlines()


def test_the_console_says_a_plain_line_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(pace.time, "monotonic", lambda: now[0])
    run = run_with(tmp_path)
    logger = console.start(run)
    logger.log(12, STEP)
    now[0] = 100.5
    logger.log(13, {**STEP, "perf/peak_memory_gib": 12.34, "val/loss": 2.0})
    now[0] = 182.0
    logger.log(14, {"train/loss": 1.0, "rl/reward": -1e-9})
    logger.finish()
    first, second, third = lines_of(run)
    assert first == "step 12/500 · train/loss 2.3100 · lr 2.00e-05 · grad norm 0.500 · 1,234 tok/s"
    assert second == "step 13/500 · train/loss 2.3100 · lr 2.00e-05 · grad norm 0.500 · 1,234 tok/s · 12.3 GiB · val/loss 2 · eta 4:04"
    assert third == "step 14/500 · rl/reward 0.000 · train/loss 1.0000 · eta 5:32:06"


def test_a_run_opens_its_loggers_and_closes_them(tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text(
        "class Logger:\n"
        "    def __init__(self, run): self.file = open(run.directory / 'own.txt', 'w')\n"
        "    def log(self, step, metrics): self.file.write(f'{step} {metrics}')\n"
        "    def finish(self): self.file.close()\n"
        "def start(run): return Logger(run)\n"
    )
    with run_with(tmp_path / "out", f"trainer.logger=[console,{own}]") as run:
        run.start_logging(0, 3)
        run.log(1, {"train/loss": 2.0})
    assert (tmp_path / "out" / "own.txt").read_text() == "1 {'train/loss': 2.0}"
    assert "step 1/3 · train/loss 2.0000" in lines_of(run)
    assert json.loads((tmp_path / "out" / "metrics.jsonl").read_text()) == {"step": 1, "train/loss": 2.0}


def test_the_example_logger_writes_a_csv(tmp_path: Path) -> None:
    with run_with(tmp_path, f"trainer.logger={ROOT}/examples/loggers/csv_logger.py") as run:
        run.start_logging(0, 3)
        run.log(1, {"train/loss": 2.0, "train/lr": 0.5})
    with (tmp_path / "metrics.csv").open() as file:
        assert list(csv.reader(file)) == [["step", "metric", "value"], ["1", "train/loss", "2.0"], ["1", "train/lr", "0.5"]]


# wandb


@pytest.fixture
def no_wandb_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment of a person who has never logged in."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    return {**kept, "HOME": str(tmp_path / "home")}


# Its terminal could be asked for a login, and would never answer.
ONE_STEP = """
import os, pty, sys
from pathlib import Path
from runs import run_with
from verl.loggers import wandb
terminal, other_end = pty.openpty()
os.dup2(other_end, 0)
sys.stdin = open(0)
assert sys.stdin.isatty()
run = run_with(Path(sys.argv[1]), "trainer.logger=" + sys.argv[2])
logger = wandb.start(run)
logger.log(1, {"train/loss": 2.0})
logger.finish()
"""


def one_step(directory: Path, environment: dict[str, str], names: str = "wandb") -> list[str]:
    """What a run that logs one step to wandb says."""
    script = directory.parent / "one_step.py"
    script.write_text(ONE_STEP)
    process = Forked([str(script), str(directory), names], directory.parent, environment)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert "wandb" not in said
    return (directory / "train.log").read_text(encoding="utf-8").splitlines()


def test_without_a_login_wandb_says_so_in_one_line_and_the_console_takes_its_place(tmp_path: Path, no_wandb_login: dict[str, str]) -> None:
    pytest.importorskip("wandb")
    said, step = one_step(tmp_path / "out", no_wandb_login)
    assert said.startswith("wandb: no login (wandb login, or WANDB_API_KEY")
    assert said.endswith("; logging to the console instead")
    assert step == "step 1/500 · train/loss 2.0000"


def test_wandb_offline_keeps_the_run_on_disk_without_its_secrets(tmp_path: Path, no_wandb_login: dict[str, str]) -> None:
    pytest.importorskip("wandb")
    (said,) = one_step(tmp_path / "out", {**no_wandb_login, "WANDB_MODE": "offline"})
    assert said.startswith(f"wandb: on disk, {tmp_path}/out/wandb/offline-run-")
    (written,) = (tmp_path / "out" / "wandb").glob("offline-run-*/run-*.wandb")
    content = written.read_bytes()
    assert b"train/loss" in content
    assert b"micro_batch_size_per_gpu" in content
    assert SECRET.encode() not in content
    assert b"secret-word" not in content


def test_a_missing_package_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    run = run_with(tmp_path, "trainer.logger=wandb")
    wandb.start(run).log(1, {"train/loss": 2.0})
    assert lines_of(run) == [
        'wandb: the package is not installed (pip install "verl[wandb]"); logging to the console instead',
        "step 1/500 · train/loss 2.0000",
    ]


def test_beside_the_console_wandb_falls_back_to_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with run_with(tmp_path, "trainer.logger=[console,wandb]") as run:
        run.start_logging(0, 500)
        run.log(1, {"train/loss": 2.0})
    assert sum(line.startswith("step 1/500") for line in lines_of(run)) == 1


class BrokenService:
    """A wandb whose server answers every call with an error."""

    def __init__(self, *, fails_at_start: bool):
        self.fails_at_start = fails_at_start
        self.url = "https://host/run"
        self.offline = False

    def init(self, **_: Any) -> "BrokenService":
        if self.fails_at_start:
            raise RuntimeError("no route to host\nand much more")
        return self

    def Settings(self, **_: Any) -> None:  # noqa: N802 - the name in wandb
        return None

    def setup(self, _: Any) -> None:
        return None

    def login(self, **_: Any) -> bool:
        return True

    def log(self, *_: Any, **__: Any) -> None:
        raise ConnectionError("the server went away")

    finish = log


def test_a_service_that_does_not_start_leaves_the_console(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", BrokenService(fails_at_start=True))
    run = run_with(tmp_path)
    assert isinstance(wandb.start(run), Silent)
    assert lines_of(run) == ["wandb: no route to host; logging to the console instead"]


def test_a_service_that_fails_later_is_said_once_and_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", BrokenService(fails_at_start=False))
    run = run_with(tmp_path)
    logger = wandb.start(run)
    for step in (1, 2):
        logger.log(step, {"train/loss": 2.0})
    logger.finish()
    assert lines_of(run) == ["wandb: https://host/run", "wandb: the server went away; metrics.jsonl has every step"]


# TensorBoard and Trackio


def test_tensorboard_has_each_metric_once_after_a_resume(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps in ([1, 2, 3], [2, 3, 4]):  # the second goes on from a checkpoint after step 1
        logger = tensorboard.start(run_with(tmp_path))
        for step in steps:
            logger.log(step, {"train/loss": 10.0 * len(steps) + step})
        logger.finish()
    written = EventAccumulator(str(tmp_path / "tensorboard"))
    written.Reload()
    assert [event.step for event in written.Scalars("train/loss")] == [1, 2, 3, 4]
    content = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    assert b"micro_batch_size_per_gpu" in content
    assert SECRET.encode() not in content


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.usefixtures("no_network")
def test_trackio_keeps_the_run_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:  # it reads its folder when it is imported
        monkeypatch.delitem(sys.modules, name)
    pytest.importorskip("trackio")
    run = run_with(tmp_path, "trainer.project_name=small")
    logger = trackio.start(run)
    logger.log(1, {"train/loss": 2.0})
    logger.finish()
    assert lines_of(run) == ['trackio: trackio show --project "small"']
    assert capsys.readouterr().out.splitlines() == lines_of(run)
    content = (tmp_path / "trackio" / "small.db").read_bytes()
    assert b"train/loss" in content
    assert SECRET.encode() not in content


@pytest.mark.parametrize(
    ("logger", "package"), [(tensorboard, "torch.utils.tensorboard"), (trackio, "trackio"), (mlflow, "mlflow"), (swanlab, "swanlab")]
)
def test_a_missing_package_names_the_command_that_installs_it(
    logger: Any, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError) as caught:
        logger.start(run_with(tmp_path))
    assert caught.value.fix == f'pip install "verl[{package.rpartition(".")[2]}]"'


# Secrets


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"wandb": {"api_key": "abc", "entity": "me"}}, {"wandb": {"api_key": "[hidden]", "entity": "me"}}),
        ({"hf_token": "abc", "max_new_tokens": 512, "prompt_key": "q"}, {"hf_token": "[hidden]", "max_new_tokens": 512, "prompt_key": "q"}),
        ({"files": ["a.jsonl", f"x/{SECRET}/y"]}, {"files": ["a.jsonl", "x/[hidden]/y"]}),
        ({"url": "s3://key:pass@host/a?token=abc&part=1"}, {"url": "s3://[hidden]@host/a?token=[hidden]&part=1"}),
        ({"lr": 1e-5, "none": None, "on": True}, {"lr": 1e-5, "none": None, "on": True}),
    ],
)
def test_secrets_are_hidden_and_nothing_else_is(config: dict[str, Any], expected: dict[str, Any]) -> None:
    assert redact(config) == expected


def test_redacting_leaves_the_config_as_it_was() -> None:
    config = {"a": {"password": "word"}}
    redact(config)
    assert config == {"a": {"password": "word"}}


# Loggers that fail


FAILS = """
class Logger:
    def __init__(self, run):
        self.file = open(run.directory / "own.txt", "a")

    def log(self, step, metrics):
        metrics.clear()
        print(step, file=self.file)
        if step == 2:
            FAIL

    def finish(self):
        self.file.close()
        raise OSError("no space left")


def start(run):
    return Logger(run)
"""


@pytest.mark.parametrize("fails", ["raise ConnectionError('it went away')", "exit('it went away')", "[][1]  # it went away"])
def test_a_logger_that_fails_is_told_once_and_left_aside(tmp_path: Path, fails: str) -> None:
    (tmp_path / "own.py").write_text(FAILS.replace("FAIL", fails))
    with run_with(tmp_path / "out", f"trainer.logger=[{tmp_path / 'own.py'},console]") as run:
        run.start_logging(0, 4)
        for step in range(1, 5):
            run.log(step, {"train/loss": 1.0})
    warnings = [line for line in lines_of(run) if "warning" in line]
    assert len(warnings) == 1 and "failed in log" in warnings[0] and "own.py:10)" in warnings[0] and "continues without it" in warnings[0]
    assert (tmp_path / "out/own.txt").read_text().split() == ["1", "2"]
    assert sum(line.startswith("step ") and "loss 1.0000" in line for line in lines_of(run)) == 4, (
        "a logger must not change what the next one gets"
    )


def test_a_logger_that_fails_at_the_end_is_told(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(FAILS.replace("FAIL", "pass"))
    with run_with(tmp_path / "out", f"trainer.logger={tmp_path / 'own.py'}") as run:
        run.start_logging(0, 4)
        run.log(1, {"train/loss": 1.0})
    assert any("failed in finish: OSError: no space left" in line and "own.py:14)" in line for line in lines_of(run))


@pytest.mark.parametrize(
    ("start", "said"),
    [
        ("raise ConnectionError('no route')", r"the logger fails to start: ConnectionError: no route \(.*own.py:2\)"),
        ("exit()", r"the logger fails to start: SystemExit: None \(.*own.py:2\)"),
        ("return None", "returned None, which has no 'log'"),
    ],
)
def test_a_logger_that_does_not_start_stops_the_run_before_training(tmp_path: Path, start: str, said: str) -> None:
    (tmp_path / "own.py").write_text(f"def start(run):\n    {start}\n")
    with run_with(tmp_path / "out", f"trainer.logger={tmp_path / 'own.py'}") as run, pytest.raises(UserError, match=said) as caught:
        run.start_logging(0, 4)
    assert caught.value.where == f"trainer.logger={tmp_path / 'own.py'}"


# What is written


def test_metrics_are_json_whatever_the_numbers_and_are_read_back(tmp_path: Path) -> None:
    with run_with(tmp_path, "trainer.logger=[]") as run:
        run.start_logging(0, 4)
        run.log(1, {"train/loss": float("nan"), "train/grad_norm": float("inf"), "train/lr": 0.5})
        run.keep_state({"metrics": {"train/loss": float("nan")}})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    expected = {"step": 1, "train/loss": None, "train/grad_norm": None, "train/lr": 0.5}
    assert json.loads(line, parse_constant=refuse) == expected
    assert json.loads((tmp_path / "trainer_state.json").read_text(), parse_constant=refuse) == {"metrics": {"train/loss": None}}
    (read,) = read_metrics(tmp_path)
    assert math.isnan(read["train/loss"]) and read["train/lr"] == 0.5


def test_a_wait_gets_a_line_where_one_is_due(tmp_path: Path) -> None:
    run = run_with(tmp_path)
    run.waiting("waiting, 9 s")
    run.waiting("waiting, 10 s", line_is_due=True)
    run.waiting(None)
    assert lines_of(run) == ["waiting, 10 s"]
