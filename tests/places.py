"""Folders that tests name, and scripts of tests/ranks on several processes."""

import multiprocessing
import multiprocessing.connection
import os
import runpy
import socket
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
SHARED = ROOT.parent / "shared"  # real data and tokenizers, where somebody put them beside the project

# Ranks are forked from a process that has imported what they need, which takes longer than most of them run.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    ["torch.distributed.checkpoint", "torch.distributed.fsdp", "peft", "verl.engine.build", "verl.data.documents"]
)


def run_ranks(script: str, *words: object, processes: int = 2, timeout: float = 200) -> None:
    """Run a script of tests/ranks on so many processes, one core each, with torchrun's environment variables.

    It fails with what was printed if one of them does.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    variables = {
        "WORLD_SIZE": processes,
        "LOCAL_WORLD_SIZE": processes,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": 1,
    }
    argv = [str(TESTS / "ranks" / script), *map(str, words)]
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / str(rank) for rank in range(processes)]
        ranks = [
            _FORKS.Process(target=_run_rank, args=(argv, {**variables, "RANK": rank, "LOCAL_RANK": rank}, logs[rank]))
            for rank in range(processes)
        ]
        for rank in ranks:
            rank.start()
        deadline = time.monotonic() + timeout
        while any(rank.exitcode is None for rank in ranks) and not any(rank.exitcode for rank in ranks) and time.monotonic() < deadline:
            multiprocessing.connection.wait([rank.sentinel for rank in ranks if rank.exitcode is None], timeout=1)
        for rank in ranks:
            rank.join(10 if any(other.exitcode for other in ranks) else 0)  # the others may say why they end
            rank.kill()
            rank.join()
        codes = [rank.exitcode for rank in ranks]
        assert not any(codes), f"exit codes {codes} of {argv}\n" + "\n".join(log.read_text()[-3000:] for log in logs if log.exists())


def _run_rank(argv: list[str], variables: Mapping[str, object], log: Path) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ.update({name: str(value) for name, value in variables.items()})
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")
