"""Folders that tests name, and scripts of tests/ranks on several processes."""

import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
from collections.abc import Mapping
from multiprocessing.connection import wait
from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
SHARED = ROOT.parent / "shared"  # real data and tokenizers, where somebody put them beside the project
HAS_GPU = Path("/dev/nvidiactl").exists()

# Ranks are forked from a process that has imported what they need, which takes longer than most of them run.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "torch.distributed.checkpoint",
        "torch.distributed.fsdp",
        "peft",
        "verl.engine.build",
        "verl.data.documents",
        "verl.trainer.ppo_trainer",
    ]
)
MARK, ROOM = "FAULT_MARK", 1000  # a variable for tests/forked.py to write into, where /proc shows it
os.environ.setdefault(MARK, " " * ROOM)  # not again in a fork, where it would be a string of its own, which /proc does not show


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_ranks(*program: object, processes: int = 2, timeout: float = 200) -> str:
    """Run a program on so many processes, one core each, with torchrun's environment variables.

    Args:
        program: the name of a script of tests/ranks, a script's whole path, or "-m" and a module, and its words.
    Returns:
        What was printed, rank after rank.
    """
    name, *words = map(str, program)
    argv = [name, *words] if name == "-m" else [str(TESTS / "ranks" / name), *words]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / str(rank) for rank in range(processes)]
        places = [{**meeting, "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": 1} for rank in range(processes)]
        ranks = [FORKS.Process(target=_run_rank, args=(argv, *of_rank)) for of_rank in zip(places, logs, strict=True)]
        for rank in ranks:
            rank.start()
        deadline = time.monotonic() + timeout
        while (running := [rank.sentinel for rank in ranks if rank.exitcode is None]) and time.monotonic() < deadline:
            wait(running, timeout=1)
            if any(rank.exitcode for rank in ranks):
                deadline = min(deadline, time.monotonic() + 10)  # the others may say why they end
        for rank in ranks:
            rank.kill()
            rank.join()
        codes, texts = [rank.exitcode for rank in ranks], [log.read_text() if log.exists() else "" for log in logs]
    assert not any(codes), f"exit codes {codes} of {argv}\n" + "\n".join(text[-3000:] for text in texts)
    return "".join(texts)


def _run_rank(argv: list[str], variables: Mapping[str, object], log: Path) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ.update({name: str(value) for name, value in variables.items()})
    sys.argv = argv if argv[0] != "-m" else argv[1:]
    if argv[0] == "-m":
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(argv[0], run_name="__main__")
