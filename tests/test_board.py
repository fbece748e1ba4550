"""`verl board` starts the library's own command on the runs that have logged to it, on this machine only, and ends it with itself."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from places import ROOT, free_port
from runs import run_with

from verl import board
from verl.errors import UserError


def write_run(directory: Path, logger: str) -> Path:
    with run_with(directory, f"trainer.logger={logger}", "trainer.project_name=small") as run:
        run.start_logging(0, 5)
        run.log(1, {"train/loss": 2.0})
    return directory


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs with TensorBoard files, and one without."""
    pytest.importorskip("tensorboard")
    folder = tmp_path_factory.mktemp("runs")
    for name, logger in (("a", "tensorboard"), ("b/run", "[console,tensorboard]"), ("c", "console")):
        write_run(folder / name, logger)
    (folder / "a/global_step_5").mkdir()
    return folder


def started(*words: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "verl", "board", *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_tensorboard_shows_the_runs_on_this_machine_until_the_command_ends(runs: Path, number: signal.Signals) -> None:
    with started(runs, "--port", port := free_port()) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(3)]
        assert lines[0] == f"tensorboard of {runs}/a, {runs}/b/run\n" and lines[1].endswith(f"have not logged to tensorboard: {runs}/c\n")
        assert lines[2] == f"http://127.0.0.1:{port}/ (Ctrl-C ends it)\n"
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/data/runs", timeout=10) as answer:
            assert json.load(answer) == ["a", "b/run"]
        (library,) = children(process.pid)
        listening = Path(f"/proc/{library}/net/tcp").read_text()
        assert f"0100007F:{int(port):04X}" in listening and f"00000000:{int(port):04X}" not in listening
        process.send_signal(number)
        assert process.wait(20) == 0
        deadline = time.monotonic() + 10
        while Path(f"/proc/{library}").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_trackio_gets_the_project_of_the_runs(tmp_path: Path) -> None:
    for name, project in (("a", "small"), ("b", "small"), ("c", "large")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(f"trainer: {{logger: [console, trackio], project_name: {project}}}\n")
    found = board.find_runs(tmp_path)
    assert board.chosen(found, [tmp_path]) == "trackio"
    assert board._trackio(found[:2], 7)[0] == ["trackio.cli", "show", "--project", "small"]
    assert board._trackio(found, 7) == (["trackio.cli", "show"], {"GRADIO_SERVER_PORT": "7", "GRADIO_NUM_PORTS": "1"})


def test_a_checkpoint_stands_for_its_run_and_a_run_is_shown_once(runs: Path, tmp_path: Path) -> None:
    assert [run.directory.name for run in board.find_runs(runs / "a/global_step_5")] == ["a"]
    shown = board.find_runs(runs / "a")
    words, _ = board._tensorboard(shown, tmp_path)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["a"] and words[:2] == ["tensorboard.main", "--logdir"]


def test_a_run_inside_another_is_linked_beside_it(runs: Path, tmp_path: Path) -> None:
    inner = write_run(tmp_path / "outer/inner", "tensorboard")
    outer = write_run(tmp_path / "outer", "tensorboard")
    before = sorted(path.name for path in (outer / "tensorboard").iterdir())
    (tmp_path / "board").mkdir()
    board._tensorboard([*board.find_runs(outer), *board.find_runs(inner)], tmp_path / "board")
    assert sorted(path.name for path in (tmp_path / "board/runs").iterdir()) == ["outer", "outer · inner"]
    assert sorted(path.name for path in (outer / "tensorboard").iterdir()) == before


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nothing", "nothing: is no directory\n  fix: give a run's directory"),
        ("a/tensorboard", "has no run\n  fix: give a run's directory (trainer.default_local_dir), or a folder of runs"),
        ("c", "the run has neither TensorBoard nor Trackio files\n  fix: train with trainer.logger=[console,tensorboard]"),
    ],
)
def test_what_cannot_be_shown_is_said(runs: Path, name: str, said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        board.open_board([runs / name])


def test_a_run_of_another_service_names_its_own_command(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("trainer: {logger: mlflow, project_name: small}\n")
    with pytest.raises(UserError, match=r"mlflow ui shows those of trainer\.logger=mlflow"):
        board.open_board([tmp_path])


def test_a_library_that_is_not_installed_is_named_with_its_command(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=re.escape('tensorboard is not installed\n  fix: pip install "verl[tensorboard]"')):
        board.open_board([runs])


def test_a_logger_that_no_run_has_is_said(runs: Path) -> None:
    with pytest.raises(UserError, match="none of 3 runs has logged to trackio"):
        board.open_board([runs], "trackio")


def test_a_port_that_is_taken_and_a_library_that_ends_are_errors(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(UserError, match="is taken, or cannot be listened at"):
            board.open_board([runs], port=other.getsockname()[1])
    monkeypatch.setattr(board, "_tensorboard", lambda *_: (["tensorboard.no_such_module"], {}))
    with pytest.raises(UserError, match=r"does not start: it ended with exit code 1: .*No module named"):
        board.open_board([runs])
