"""`verl board DIR…`: opens TensorBoard or Trackio on runs, by the library's own command. Read `open_board` first."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import yaml

from verl.errors import UserError

LOGGERS = ("tensorboard", "trackio")
PORTS = {"tensorboard": 6006, "trackio": 7860}  # those of the libraries; the first free one from there on
LOOPBACK = "127.0.0.1"
START_SECONDS = 120  # until the library answers
DEEPEST = 3  # levels of folders in which runs are looked for
# What the other loggers are looked at with.
ELSEWHERE = {"wandb": "wandb", "mlflow": "mlflow ui", "swanlab": "swanlab watch"}


@dataclass(frozen=True)
class Logged:
    """A run, and what it has logged to.

    Attributes:
        project: its trainer.project_name, as Trackio has it.
        loggers: names of the loggers in its settings, and tensorboard if it has such files.
    """

    directory: Path
    project: str
    loggers: frozenset[str]


def open_board(directories: Sequence[Path], logger: str | None = None, *, host: str = LOOPBACK, port: int | None = None) -> None:
    """Show runs in a browser until Ctrl-C.

    Args:
        directories: runs, or folders of runs.
        logger: one of LOGGERS; None: the first one that a run has logged to.
        host: address to listen at.
        port: None: the library's own, or the next free one.
    Raises:
        UserError: there is no such run, the library is not installed, or it does not start.
    """
    runs = list({run.directory.resolve(): run for directory in directories for run in find_runs(directory)}.values())
    logger = logger or chosen(runs, directories)
    shown = [run for run in runs if logger in run.loggers]
    if not shown:
        what = f"none of {len(runs):,} runs has logged to {logger}" if len(runs) > 1 else f"the run has not logged to {logger}"
        raise UserError(what, where=", ".join(map(str, directories)), fix=_fix(runs))
    if find_spec(logger) is None:
        raise UserError(f"{logger} is not installed", where="verl board", fix=f'pip install "verl[{logger}]"')
    if port is not None and not _is_free(host, port):
        raise UserError("is taken, or cannot be listened at", where=f"--host {host} --port {port}", fix="give another port, or none")
    found = port or next((free for free in range(PORTS[logger], PORTS[logger] + 100) if _is_free(host, free)), None)
    if found is None:
        raise UserError("cannot be listened at", where=f"--host {host}", fix=f"give an address of this machine, such as {LOOPBACK}")
    with tempfile.TemporaryDirectory(prefix="verl-board-") as folder, _ended_by_signals():
        words, variables = _tensorboard(shown, Path(folder)) if logger == "tensorboard" else _trackio(shown, found)
        place = ["--host", host] if logger == "trackio" else ["--host", host, "--port", str(found)]
        _serve([sys.executable, "-m", *words, *place], variables, Path(folder) / "log", _title(logger, shown, runs), (host, found))


def find_runs(directory: Path) -> list[Logged]:
    """Return the run in a directory, or those in the folders below it. A checkpoint stands for its run.

    Raises:
        UserError: there is no run.
    """
    directory = directory.expanduser()
    if not directory.is_dir():
        raise UserError("is no directory", where=str(directory), fix="give a run's directory, such as checkpoints/verl-sft/run")
    if not _is_run(directory) and _is_run(directory.resolve().parent) and directory.resolve().name.startswith("global_step_"):
        directory = directory.resolve().parent
    found = [directory] if _is_run(directory) else sorted(_below(directory, DEEPEST))
    if not found:
        fix = "give a run's directory (trainer.default_local_dir), or a folder of runs, such as checkpoints"
        raise UserError("has no run", where=str(directory), fix=fix)
    return [_read(run) for run in found]


def _is_run(directory: Path) -> bool:
    return (directory / "config.yaml").is_file() or (directory / "tensorboard").is_dir()


def _below(directory: Path, levels: int) -> Iterator[Path]:
    with suppress(PermissionError):
        for child in directory.iterdir():
            if child.is_dir() and not child.is_symlink():
                if _is_run(child):
                    yield child
                elif levels > 1:
                    yield from _below(child, levels - 1)


def _read(directory: Path) -> Logged:
    trainer: Any = {}
    with suppress(OSError, ValueError, yaml.YAMLError):
        values = yaml.safe_load((directory / "config.yaml").read_text(encoding="utf-8"))
        trainer = values.get("trainer") if isinstance(values, dict) else {}
    trainer = trainer if isinstance(trainer, dict) else {}
    names = trainer.get("logger") or []
    loggers = {str(name) for name in (names if isinstance(names, list) else [names])} - {"tensorboard"}
    if any(path.is_file() for path in (directory / "tensorboard").glob("*tfevents*")):
        loggers.add("tensorboard")
    return Logged(directory, str(trainer.get("project_name", "")), frozenset(loggers))


def chosen(runs: Sequence[Logged], directories: Sequence[Path]) -> str:
    """Return the first of LOGGERS that a run has logged to. Raises UserError: none has."""
    for logger in LOGGERS:
        if any(logger in run.loggers for run in runs):
            return logger
    which = "the run has" if len(runs) == 1 else f"the {len(runs):,} runs have"
    raise UserError(f"{which} neither TensorBoard nor Trackio files", where=", ".join(map(str, directories)), fix=_fix(runs))


def _fix(runs: Sequence[Logged]) -> str:
    others = [f"{ELSEWHERE[name]} shows those of trainer.logger={name}" for name in ELSEWHERE if any(name in run.loggers for run in runs)]
    return "; ".join(["train with trainer.logger=[console,tensorboard]; metrics.jsonl has every step of any run", *others])


def _title(logger: str, shown: Sequence[Logged], runs: Sequence[Logged]) -> str:
    left_out = [str(run.directory) for run in runs if run not in shown]
    names = ", ".join(str(run.directory) for run in shown[:3]) + (f" and {len(shown) - 3:,} more" if len(shown) > 3 else "")
    return f"{logger} of {names}" + (f"\nleft out, as they have not logged to {logger}: {', '.join(left_out)}" if left_out else "")


def _tensorboard(runs: Sequence[Logged], folder: Path) -> tuple[list[str], dict[str, str]]:
    """Return TensorBoard's command. Several runs are linked into one folder, under names that tell them apart."""
    links = folder / "runs"
    links.mkdir()
    paths = [run.directory.resolve() for run in runs]
    common = Path(os.path.commonpath([path.parent for path in paths]))
    for path in paths:
        within = path.relative_to(common)
        is_nested = any(other in path.parents for other in paths)  # its link must not be made inside another one
        link = links / (" · ".join(within.parts) if is_nested else within)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path / "tensorboard")
    return ["tensorboard.main", "--logdir", str(links)], {}


def _trackio(runs: Sequence[Logged], port: int) -> tuple[list[str], dict[str, str]]:
    """Return Trackio's command, with the project of the runs if it is the same for all, and the variables that set its port."""
    projects = sorted({run.project for run in runs})
    project = ["--project", projects[0]] if len(projects) == 1 else []
    return ["trackio.cli", "show", *project], {"GRADIO_SERVER_PORT": str(port), "GRADIO_NUM_PORTS": "1"}


def _is_free(host: str, port: int) -> bool:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except (OSError, OverflowError):
        return False
    return True


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """In this context, SIGTERM and SIGHUP are as Ctrl-C, so that the library's process is ended too."""

    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    except KeyboardInterrupt:
        print(flush=True)  # the end of the line of ^C
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _serve(words: list[str], variables: dict[str, str], log: Path, title: str, place: tuple[str, int]) -> None:
    """Run the library's command until it ends or is interrupted, and print the address once it answers."""
    host, port = place
    with log.open("wb") as file:
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env={**os.environ, **variables})  # noqa: S603 - words of our own
        try:
            _wait_for(process, host, port, log)
            print(f"{title}\nhttp://{f'[{host}]' if ':' in host else host}:{port}/ (Ctrl-C ends it)", flush=True)
            if host != LOOPBACK:
                print(f"warning: everybody who reaches {host} can see the runs", flush=True)
            process.wait()
        finally:
            process.terminate()
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_for(process: "subprocess.Popen[bytes]", host: str, port: int, log: Path) -> None:
    """Wait until the address answers. Raises UserError: the command ended, or does not answer."""
    until = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < until:
        with suppress(OSError), socket.create_connection((host, port), timeout=1):
            return
        time.sleep(0.1)
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    why = f"it ended with exit code {process.returncode}" if process.poll() is not None else f"no answer in {START_SECONDS} s"
    fix = f"the same by hand: {' '.join(map(str, process.args[1:] if isinstance(process.args, list) else []))}"
    raise UserError(f"does not start: {why}: {lines[-1] if lines else 'it printed nothing'}", where="verl board", fix=fix)
