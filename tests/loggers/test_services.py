"""MLflow and SwanLab: their stores have the run without its secrets; a service that fails or is slow costs neither the run nor time."""

import json
import os
import signal
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runs import SECRET, run_with

from verl.loggers import mlflow, swanlab
from verl.loggers._fallback import Silent

STEPS = {1: {"train/loss": 2.0, "reward/a (b)": 0.5}, 2: {"train/loss": 1.5}}


def said_by(directory: Path) -> list[str]:
    return (directory / "train.log").read_text(encoding="utf-8").splitlines()


# The libraries themselves, on this machine's disk

no_warnings_as_errors = pytest.mark.filterwarnings("ignore")  # of the libraries and of what they import


@no_warnings_as_errors
def test_mlflow_keeps_each_metric_and_setting_in_its_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    library = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/store.db")
    for name in mlflow.DEFAULTS:
        monkeypatch.delenv(name, raising=False)
    with run_with(tmp_path / "out", "trainer.logger=mlflow", "trainer.project_name=small") as run:
        run.start_logging(0, 2)
        for step, metrics in STEPS.items():
            run.log(step, metrics)
    (line,) = said_by(tmp_path / "out")
    assert line == f'mlflow: mlflow ui --backend-store-uri "sqlite:///{tmp_path}/store.db"'
    assert capsys.readouterr().out.splitlines() == [line]
    client = library.MlflowClient()
    (found,) = client.search_runs([client.get_experiment_by_name("small").experiment_id])
    assert [(m.step, m.value) for m in client.get_metric_history(found.info.run_id, "train/loss")] == [(1, 2.0), (2, 1.5)]
    assert found.data.metrics["reward/a _b_"] == 0.5
    assert found.info.status == "FINISHED" and found.info.run_name == "run"
    assert found.data.params["data.micro_batch_size_per_gpu"] == "4"
    assert not any(SECRET in value or "secret-word" in value for value in found.data.params.values())
    assert not set(mlflow.DEFAULTS) & set(os.environ)


@no_warnings_as_errors
def test_swanlab_offline_keeps_the_run_on_disk_without_its_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("swanlab")
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    monkeypatch.setattr(sys, "argv", [*sys.argv, f"token={SECRET}"])
    before = signal.getsignal(signal.SIGINT), sys.excepthook
    with run_with(tmp_path / "out", "trainer.logger=swanlab") as run:
        run.start_logging(0, 2)
        assert signal.getsignal(signal.SIGINT) is before[0]
        for step, metrics in STEPS.items():
            run.log(step, metrics)
    assert (signal.getsignal(signal.SIGINT), sys.excepthook) == before
    (line,) = said_by(tmp_path / "out")
    assert line.startswith(f"swanlab: on disk, {tmp_path}/out/swanlog/run-")
    assert capfd.readouterr().out.splitlines() == [line]
    content = b"".join(path.read_bytes() for path in (tmp_path / "out/swanlog").rglob("*") if path.is_file())
    assert b"train/loss" in content and b"micro_batch_size_per_gpu" in content
    assert SECRET.encode() not in content and b"secret-word" not in content
    (about,) = (tmp_path / "out/swanlog").rglob("swanlab-metadata.json")
    recorded = json.loads(about.read_text())
    assert recorded["runtime"] is None and recorded["git"] is None, "neither the command line nor the address of a repository"


@no_warnings_as_errors
def test_without_a_login_swanlab_says_so_in_one_line_and_the_console_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("swanlab")
    monkeypatch.setenv("SWANLAB_ROOT", str(tmp_path / "nobody"))
    for name in ("SWANLAB_MODE", "SWANLAB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    with run_with(tmp_path / "out", "trainer.logger=swanlab") as run:
        run.start_logging(0, 2)
        run.log(1, {"train/loss": 2.0})
    first, step = said_by(tmp_path / "out")
    assert first.startswith("swanlab: no login (swanlab login, or SWANLAB_API_KEY") and first.endswith("; logging to the console instead")
    assert step == "step 1/2 · loss 2.0000"


# Services that fail or are slow, with or without the library


class Service:
    """A client of MLflow whose server does what `answer` does, for each step."""

    tracking_uri = "https://me:secret-word@host"

    def __init__(self, answer: Callable[[], None]):
        self.answer, self.ended = answer, ""

    def get_experiment_by_name(self, _: str) -> None:
        return None

    def create_experiment(self, _: str) -> str:
        return "7"

    def create_run(self, *_: Any, **__: Any) -> Any:
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id="abc"))

    def log_batch(self, _: str, *, metrics: object = None, params: object = None) -> None:
        if metrics is not None:
            self.answer()

    def set_terminated(self, _: str, status: str) -> None:
        self.ended = status


def with_service(service: Service | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def client() -> Service:
        if service is None:
            raise ConnectionError("no route to host\nand much more")
        return service

    monkeypatch.setitem(sys.modules, "mlflow", types.SimpleNamespace(MlflowClient=client))
    monkeypatch.setitem(sys.modules, "mlflow.entities", types.SimpleNamespace(Metric=tuple_of, Param=tuple_of))


def waits_for(event: threading.Event) -> Callable[[], None]:
    def wait() -> None:
        assert event.wait(30)

    return wait


def tuple_of(*values: object) -> tuple[object, ...]:
    return values


def test_a_server_of_mlflow_that_is_not_there_leaves_the_console(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_service(None, monkeypatch)
    assert isinstance(mlflow.start(run_with(tmp_path)), Silent)
    assert said_by(tmp_path) == ["mlflow: no route to host; logging to the console instead"]


def test_a_server_of_mlflow_that_goes_away_is_told_once_and_left_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ConnectionError("the server went away")

    with_service(Service(fail), monkeypatch)
    with run_with(tmp_path, "trainer.logger=[console,mlflow]") as run:
        run.start_logging(0, 50)
        for step in range(1, 51):
            run.log(step, {"train/loss": 2.0})
    lines = said_by(tmp_path)
    assert lines[0] == "mlflow: https://[hidden]@host/#/experiments/7/runs/abc"
    (warning,) = [line for line in lines if line.startswith("warning")]
    assert "the server went away" in warning
    assert sum(line.startswith("step ") for line in lines) == 50


def test_a_step_does_not_wait_for_a_slow_server_of_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_answer = threading.Event()
    service = Service(waits_for(may_answer))
    with_service(service, monkeypatch)
    logger = mlflow.start(run_with(tmp_path))
    for step in range(1, 4):
        logger.log(step, {"train/loss": 2.0})  # would wait 30 seconds
    assert not may_answer.is_set() and service.ended == ""
    may_answer.set()
    logger.finish()
    assert service.ended == "FINISHED"


def test_the_end_of_a_run_waits_for_a_dead_server_of_mlflow_only_so_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_end = threading.Event()
    monkeypatch.setattr(mlflow, "FINISH_SECONDS", 0.1)
    with_service(Service(waits_for(may_end)), monkeypatch)
    logger = mlflow.start(run_with(tmp_path))
    logger.log(1, {"train/loss": 2.0})
    with pytest.raises(TimeoutError, match="2 calls were not answered"):
        logger.finish()
    may_end.set()


def test_a_service_of_swanlab_that_does_not_start_leaves_the_console(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        class Settings:
            Terminal: Any = staticmethod(dict)
            Probe: Any = staticmethod(dict)

            def __init__(self, **_: object):
                assert _["interactive"] is False  # nobody is asked for a login

        def init(self, **_: object) -> None:
            raise RuntimeError("no route to host\nand much more")

    monkeypatch.setitem(sys.modules, "swanlab", Broken())
    assert isinstance(swanlab.start(run_with(tmp_path)), Silent)
    assert said_by(tmp_path) == ["swanlab: no route to host; logging to the console instead"]
