"""Runs a function on several ranks of this machine, in processes that are copies of this one, so that nothing is imported again."""

import multiprocessing
import os
import pickle
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from verl.errors import UserError


def on_ranks(work: Callable[[], Any], processes: int, folder: Path) -> Any:
    """Return what rank 0 returns. The ranks join each other as under torchrun.

    Raises:
        UserError, RuntimeError: rank 0 raised a UserError, or a rank failed otherwise.
    """
    port = _free_port()
    context = multiprocessing.get_context("fork")
    folder.mkdir(parents=True, exist_ok=True)
    ranks = [context.Process(target=_rank, args=(work, rank, processes, port, folder)) for rank in range(processes)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        if process.is_alive():
            process.kill()
    result = folder / "0.pickle"
    if not result.is_file():
        logs = "\n".join(path.read_text(errors="replace")[-1500:] for path in sorted(folder.glob("*.log")))
        raise RuntimeError(f"the ranks ended with {[process.exitcode for process in ranks]}: {logs}")
    kind, value = pickle.loads(result.read_bytes())  # noqa: S301, written by this program
    if kind == "error":
        raise value
    return value


def _rank(work: Callable[[], Any], rank: int, processes: int, port: int, folder: Path) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in names.items()}}
    torch.set_num_threads(1)  # the threads of the copied process are gone
    code = 0
    with (folder / f"{rank}.log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            found: tuple[str, Any] = ("result", work())
        except UserError as error:
            found = ("error", error)
        except BaseException as error:  # also SystemExit
            traceback.print_exc()
            found, code = ("error", RuntimeError(f"{type(error).__name__}: {error}")), 1
        if rank == 0:
            partial = folder / "partial"
            partial.write_bytes(pickle.dumps(found))
            partial.rename(folder / "0.pickle")
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)  # without what the copied process would do at its end


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
