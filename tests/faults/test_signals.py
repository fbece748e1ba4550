"""Signals in every phase: the run ends in time, with a checkpoint where there is something to save, and leaves nothing running."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from faults.started import Started, make_folder, orphans, processes, started, words
from places import ROOT
from rl_runs import words as rl_words
from runs import wait_for

from verl import signals
from verl.errors import SAVED_EXIT_CODE, Stopped

SFT, PPO, CLI = (["-m", "verl.trainer.fsdp_sft_trainer"], ["-m", "verl.trainer.ppo_trainer"], ["-m", "verl", "sft"])
TWO = [*CLI, "--gpus", "2"]
MOST_SECONDS = 10.0
ALL = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP]
slow = pytest.mark.faults


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("signals"))


def steps(run: Path, number: int) -> Callable[[], bool]:
    metrics = run / "metrics.jsonl"
    return lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= number


def check(found: Started, code: int, said: str, *, seconds: float = 60) -> str:
    """That it ends with the code within 10 seconds, says a text, and leaves nothing behind. Return all that it said."""
    returned, text = found.end(seconds)
    assert returned == code, text
    assert said in text and "Traceback" not in text, text
    assert found.took < MOST_SECONDS
    assert orphans(found) == []
    return text


def saved(run: Path) -> int:
    """The step of the newest checkpoint."""
    return int((run / "latest_checkpointed_iteration.txt").read_text())


# What may be left at once: nothing is saved


@slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
@pytest.mark.parametrize("said", [" while starting; nothing was saved", ": 0 of "])
def test_an_evaluation_that_is_stopped_says_so(number: signal.Signals, said: str, folder: Path, tmp_path: Path) -> None:
    fault = None if "starting" in said else "verl.eval.grader:Grader.grade:sleep"
    given = [f"model_path={folder / 'model'}", f"test_file={folder / 'train.jsonl'}", f"output_dir={tmp_path / 'results'}"]
    with started(["-m", "verl", "eval", *given], tmp_path / "work", fault=fault) as found:
        found.wait_until_reached() if fault else time.sleep(1.5)  # torch takes longer
        found.send(number)
        check(found, 128 + number, f"stopped by {number.name}{said}")


@slow
@pytest.mark.parametrize("number", ALL, ids=lambda number: number.name)
@pytest.mark.parametrize(
    ("fault", "doing"),
    [
        ("verl.data.documents:load_documents:sleep", "reading and tokenizing the rows"),
        ("verl.engine.build:build:sleep", "loading the model"),
        ("verl.engine.build:build:work=60", "loading the model"),  # in a library, where no handler runs
    ],
    ids=["tokenizing", "loading", "loading-in-a-library"],
)
def test_a_phase_without_steps_is_left_at_once(fault: str, doing: str, number: signal.Signals, folder: Path, tmp_path: Path) -> None:
    with started([*SFT, *words(folder, tmp_path / "run")], tmp_path / "work", fault=fault, forks=True) as found:
        found.wait_until_reached()
        found.send(number)
        check(found, 128 + number, f"stopped by {number.name} while {doing}")
    assert not list((tmp_path / "run").glob("global_step_*"))


@slow
@pytest.mark.parametrize("command", [SFT, CLI], ids=["module", "command"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_imports_are_left_at_once(command: list[str], number: signal.Signals, folder: Path, tmp_path: Path) -> None:
    """The module is imported before the trainer's `main` is called."""
    with started([*command, *words(folder, tmp_path / "run")], tmp_path / "work") as found:
        time.sleep(1.5)  # torch takes longer
        found.send(number)
        check(found, 128 + number, f"stopped by {number.name} while starting; nothing was saved")


@slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_the_verification_of_a_checkpoint_is_left_at_once_and_the_checkpoint_stays(
    number: signal.Signals, folder: Path, tmp_path: Path
) -> None:
    argv = words(folder, tmp_path / "run", "trainer.total_training_steps=2")
    subprocess.run([sys.executable, *SFT, *argv], check=True, capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    more = words(folder, tmp_path / "run", "trainer.total_training_steps=3")
    with started([*SFT, *more], tmp_path / "work", fault="verl.engine.damage:find_damage:sleep") as found:
        found.wait_until_reached()
        found.send(number)
        check(found, 128 + number, "while verifying the checkpoints")
    assert saved(tmp_path / "run") == 2


@slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_to_all_processes_while_they_tokenize_is_told_in_one_line(number: signal.Signals, folder: Path, tmp_path: Path) -> None:
    """As Ctrl-C in a terminal does: the tokenizing processes get it too."""
    rows = (folder / "train.jsonl").read_text() * 4000
    (tmp_path / "large.jsonl").write_text(rows)
    given = [f"data.train_files={tmp_path / 'large.jsonl'}", f"data.cache_dir={tmp_path / 'cache'}", "data.num_workers=2"]
    with started([*SFT, *words(folder, tmp_path / "run", *given)], tmp_path / "work") as found:
        wait_for(lambda: len(processes(found.mark)) >= 3)
        time.sleep(1.0)
        found.since = time.monotonic()
        os.killpg(found.process.pid, number)
        text = check(found, 128 + number, f"stopped by {number.name} while reading and tokenizing the rows; nothing was saved")
    assert "error" not in text
    assert not list((tmp_path / "cache").rglob("*.tmp"))


@slow
def test_tokenizing_processes_end_with_a_trainer_that_is_killed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "large.jsonl").write_text((folder / "train.jsonl").read_text() * 4000)
    given = [f"data.train_files={tmp_path / 'large.jsonl'}", f"data.cache_dir={tmp_path / 'cache'}", "data.num_workers=2"]
    with started([*SFT, *words(folder, tmp_path / "run", *given)], tmp_path / "work") as found:
        wait_for(lambda: len(processes(found.mark)) >= 4)
        found.process.kill()
        found.process.wait()
        assert orphans(found, 5.0) == []


# Steps: the run ends after one, with a checkpoint


@slow
@pytest.mark.parametrize("number", ALL, ids=lambda number: number.name)
@pytest.mark.parametrize("command", [SFT, TWO], ids=["one-process", "two-processes"])
def test_a_step_is_finished_and_saved(command: list[str], number: signal.Signals, folder: Path, tmp_path: Path) -> None:
    with started([*command, *words(folder, tmp_path / "run")], tmp_path / "work", forks=True) as found:
        wait_for(steps(tmp_path / "run", 3))
        found.send(number)
        check(found, SAVED_EXIT_CODE, f"stopped by {number.name} after step ")
    assert 3 <= saved(tmp_path / "run") <= 6
    assert steps(tmp_path / "run", saved(tmp_path / "run"))()


@slow
def test_without_a_checkpoint_the_code_is_that_of_the_signal(folder: Path, tmp_path: Path) -> None:
    with started([*SFT, *words(folder, tmp_path / "run", "trainer.save_freq=never")], tmp_path / "work") as found:
        wait_for(steps(tmp_path / "run", 2))
        found.send(signal.SIGTERM)
        check(found, 128 + signal.SIGTERM, "nothing was saved")


@slow
@pytest.mark.parametrize("number", ALL, ids=lambda number: number.name)
def test_saving_is_not_interrupted(number: signal.Signals, folder: Path, tmp_path: Path) -> None:
    fault, argv = "verl.manifest:Manifest.write:sleep=3", words(folder, tmp_path / "run", "trainer.save_freq=3")
    with started([*SFT, *argv], tmp_path / "work", fault=fault) as found:
        found.wait_until_reached()
        found.send(number)
        check(found, SAVED_EXIT_CODE, f"stopped by {number.name} after step ")
    assert saved(tmp_path / "run") == 4  # the next step notices


@slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_validation_is_given_up_and_its_step_is_saved(number: signal.Signals, folder: Path, tmp_path: Path) -> None:
    more = [f"data.val_files={folder / 'test.jsonl'}", "trainer.test_freq=2"]
    fault = "verl.engine.engine:Engine.evaluate:sleep=2"
    with started([*SFT, *words(folder, tmp_path / "run", *more)], tmp_path / "work", fault=fault) as found:
        found.wait_until_reached()
        found.send(number)
        check(found, SAVED_EXIT_CODE, f"stopped by {number.name} after step 2")
    assert saved(tmp_path / "run") == 2


@slow
def test_loggers_that_do_not_finish_are_given_up_when_all_steps_are_saved(folder: Path, tmp_path: Path) -> None:
    argv = words(folder, tmp_path / "run", "trainer.total_training_steps=2")
    with started([*SFT, *argv], tmp_path / "work", env={"FINISH_SECONDS": 60}) as found:
        wait_for((tmp_path / "run" / "trainer_state.json").exists)
        time.sleep(1.0)
        found.send(signal.SIGTERM)
        check(found, SAVED_EXIT_CODE, "stopped by SIGTERM while finishing the loggers; the same command resumes from")
    assert saved(tmp_path / "run") == 2


@slow
@pytest.mark.parametrize(
    ("fault", "call", "step"),
    [
        ("verl.rollout.native.engine:NativeRollout.generate:sleep", 2, 1),
        ("verl.rewards._scoring:Grader.scores:sleep", 2, 1),
        ("verl.engine.engine:Engine.train_step:sleep=2", 2, 2),
    ],
    ids=["generation", "scoring", "update"],
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_reinforcement_learning_ends_in_every_phase_of_a_step(
    fault: str, call: int, step: int, number: signal.Signals, folder: Path, tmp_path: Path
) -> None:
    argv = [*rl_words(folder, "x", reward__name="gsm8k", trainer__total_training_steps=9), f"trainer.default_local_dir={tmp_path / 'run'}"]
    with started([*PPO, *argv], tmp_path / "work", fault=fault, env={"FAULT_CALL": call}) as found:
        found.wait_until_reached()
        found.send(number)
        check(found, SAVED_EXIT_CODE, f"stopped by {number.name} after step {step}")
    assert saved(tmp_path / "run") == step


# A second signal, one process alone, and the launcher


@slow
@pytest.mark.parametrize("action", ["sleep=40", "work=60"], ids=["in-python", "in-a-library"])
@pytest.mark.parametrize("command", [SFT, TWO], ids=["one-process", "two-processes"])
def test_a_second_signal_ends_all_processes_at_once(action: str, command: list[str], folder: Path, tmp_path: Path) -> None:
    fault = f"verl.engine.engine:Engine.train_step:{action}"
    with started([*command, *words(folder, tmp_path / "run")], tmp_path / "work", fault=fault, env={"FAULT_CALL": 3}) as found:
        found.wait_until_reached()
        found.send(signal.SIGTERM)
        time.sleep(1.0)
        found.process.send_signal(signal.SIGTERM)
        check(found, 128 + signal.SIGTERM, "stopped at once by a second signal, SIGTERM")
    assert not list((tmp_path / "run").glob("global_step_*"))


@slow
@pytest.mark.parametrize(("fault", "code"), [(None, SAVED_EXIT_CODE), ("verl.engine.build:build:sleep", 128 + signal.SIGTERM)])
def test_a_signal_to_one_of_two_processes_ends_both(fault: str | None, code: int, folder: Path, tmp_path: Path) -> None:
    with started([*TWO, *words(folder, tmp_path / "run")], tmp_path / "work", fault=fault) as found:
        wait_for(steps(tmp_path / "run", 3) if fault is None else found.reached.exists)
        time.sleep(1.5)
        (second,) = (one for one in processes(found.mark) if b"\0RANK=1\0" in Path(f"/proc/{one}/environ").read_bytes())
        found.since = time.monotonic()
        os.kill(second, signal.SIGTERM)
        check(found, code, "stopped by SIGTERM")


@slow
def test_trainers_end_with_a_launcher_that_is_killed(folder: Path, tmp_path: Path) -> None:
    with started([*TWO, *words(folder, tmp_path / "run")], tmp_path / "work") as found:
        wait_for(steps(tmp_path / "run", 2))
        assert len(processes(found.mark)) == 3
        found.process.kill()
        found.process.wait()
        assert orphans(found, 5.0) == []


@slow
def test_a_run_under_nohup_outlives_the_connection(folder: Path, tmp_path: Path) -> None:
    nohup = shutil.which("nohup")
    assert nohup is not None
    command = ["-c", f"import os; os.execv({nohup!r}, ['nohup', {sys.executable!r}, *{SFT!r}, *{words(folder, tmp_path / 'run')!r}])"]
    with started(command, tmp_path / "work") as found:
        wait_for(steps(tmp_path / "run", 2))
        found.send(signal.SIGHUP)
        wait_for(steps(tmp_path / "run", 6))
        found.send(signal.SIGTERM)
        check(found, SAVED_EXIT_CODE, "stopped by SIGTERM")


# The time limit


@slow
def test_a_run_saves_and_ends_before_its_time_limit_and_goes_on_in_the_next(folder: Path, tmp_path: Path) -> None:
    argv = words(folder, tmp_path / "run", "trainer.max_seconds=25")
    with started([*SFT, *argv], tmp_path / "work", env={"LOG_SECONDS": 1}) as found:
        found.since = time.monotonic()
        code, text = found.end()
        assert code == SAVED_EXIT_CODE and "stopped by trainer.max_seconds=25 after step " in text, text
        assert 15 < found.took < 25
    assert saved(tmp_path / "run") >= 1


# The parts, in this process


@pytest.fixture
def handled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "_say", lambda line: None)


@pytest.mark.usefixtures("handled")
@pytest.mark.parametrize("number", ALL, ids=lambda number: number.name)
def test_a_signal_is_raised_where_it_may_be_and_noted_where_it_may_not(number: signal.Signals) -> None:
    before = signal.getsignal(number)

    def run() -> None:
        with signals.handled():
            signals.enter("loading the model")
            with signals.held():
                signal.raise_signal(number)
                assert signals.received() == number
                with pytest.raises(Stopped), signals.at_once():
                    raise AssertionError("it should have been raised already")
            signals._stop(number)

    with pytest.raises(Stopped) as stopped:
        run()
    assert signal.getsignal(number) == before and signals.received() is None
    assert stopped.value.exit_code == 128 + number
    assert str(stopped.value) == f"stopped by {number.name} while loading the model; nothing was saved"


@pytest.mark.usefixtures("handled")
def test_the_same_request_twice_is_no_second_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher passes on what its processes have got themselves."""
    again: list[int] = []
    monkeypatch.setattr(signals, "_second", lambda number, frame: again.append(number))
    with signals.handled(), signals.held():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert again == []
        monkeypatch.setattr(signals, "SECOND_SECONDS", 0.0)
        signal.raise_signal(signal.SIGTERM)
        assert again == [signal.SIGTERM]


def test_a_checkpoint_makes_the_code_of_a_stopped_run(tmp_path: Path) -> None:
    assert Stopped(signal.SIGINT, tmp_path).exit_code == Stopped(None, tmp_path).exit_code == 75
    assert Stopped(signal.SIGINT, None).exit_code == 130
