"""Where the ranks of a run meet: torchrun's environment variables, and the store at MASTER_ADDR:MASTER_PORT."""

import os
import socket
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from verl.errors import UserError

START_SECONDS = 25.0  # for the store to answer
FIX = "start with torchrun, which sets all of these variables, or unset RANK for a single process"


@dataclass(frozen=True)
class Place:
    """This process among all.

    Attributes:
        rank, ranks: its number, from 0, and how many there are.
        host, port: of the store.
        has_server: whether this process opens the store; otherwise another one has.
    """

    rank: int
    ranks: int
    host: str
    port: int
    has_server: bool


def read_place() -> Place:
    """Read torchrun's environment variables.

    Raises:
        UserError: one is missing or wrong.
    """
    missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise _refused(f"RANK is set but {', '.join(missing)} is not", where=None)
    rank, ranks, port = (_number(name) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    if ranks < 1:
        raise _refused(f"found {ranks}, expected at least 1 process", where="WORLD_SIZE")
    if not 0 <= rank < ranks:
        raise _refused(f"found {rank}, but WORLD_SIZE={ranks}, so the ranks are 0 to {ranks - 1}", where="RANK")
    if not 0 < port < 65536:
        raise _refused(f"found {port}, expected a port from 1 to 65535", where="MASTER_PORT")
    is_client = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return Place(rank, ranks, os.environ["MASTER_ADDR"], port, rank == 0 and not is_client)


def _number(name: str) -> int:
    try:
        return int(os.environ[name])
    except ValueError:
        raise _refused(f"found {os.environ[name]!r}, expected a number", where=name) from None


def _refused(what: str, *, where: str | None, fix: str = FIX) -> UserError:
    error = UserError(what, where=where, fix=fix)
    error.tells = True  # only this rank knows
    return error


def open_store(place: Place) -> dist.Store:
    """Open the store, or connect to it.

    Raises:
        UserError: the port is in use, or nothing answers within START_SECONDS.
    """
    where = f"MASTER_ADDR={place.host} MASTER_PORT={place.port}"
    if not place.has_server:
        _wait_for_server(place, where)
    try:
        limit = timedelta(seconds=START_SECONDS)
        store = dist.TCPStore(place.host, place.port, place.ranks, place.has_server, limit, wait_for_workers=False, multi_tenant=True)
    except RuntimeError as error:
        if place.has_server:
            what, fix = f"the port cannot be opened: {_first_line(error)}", "choose another MASTER_PORT, or end the program that uses it"
        else:
            what, fix = f"what answers there is no rank 0 of a run: {_first_line(error)}", "give all processes the address of rank 0"
        raise _refused(what, where=where, fix=fix) from error
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"/verl/attempt_{attempt}", store)


def _wait_for_server(place: Place, where: str) -> None:
    deadline, fix = time.monotonic() + START_SECONDS, "give all processes the address of rank 0, and a port that no firewall closes"
    try:
        socket.getaddrinfo(place.host, place.port)
    except OSError as error:
        raise _refused(f"there is no such host: {error.strerror or error}", where=where, fix=fix) from error
    while True:
        try:
            socket.create_connection((place.host, place.port), timeout=max(0.1, deadline - time.monotonic())).close()
            return
        except OSError as error:
            if time.monotonic() >= deadline:
                what = f"rank {place.rank} reaches no rank 0 there within {START_SECONDS:g} s: {error.strerror or error}"
                raise _refused(what, where=where, fix=fix) from error
        time.sleep(0.1)


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0][:200]


def read_local_rank(gpus: int) -> int:
    """Read the number of this process on its node. Raises UserError: it is wrong, or has no GPU."""
    local_rank = _number("LOCAL_RANK")
    if not 0 <= local_rank < gpus:
        what = f"process {local_rank} of this node has no GPU: there are only {gpus}"
        raise _refused(what, where="LOCAL_RANK", fix=f"torchrun --nproc_per_node={gpus}")
    return local_rank


def wait_until_idle() -> None:
    """Wait until gloo's threads are idle, shortly after their last message.

    They then release its tensors, for which they need the GIL. An interpreter that is shutting down does not give it to them and aborts the
    process (https://github.com/pytorch/pytorch/issues/190489). The threads are checked twice, because one that waits for the GIL looks
    idle, but gets it before the second check.
    """
    if sys.platform != "linux":
        time.sleep(0.1)
        return
    idle_checks = 0
    while idle_checks < 2:
        time.sleep(0.002)
        idle_checks = 0 if "R" in _states_of_threads("pt_gloo_runloop") else idle_checks + 1


def _states_of_threads(name: str) -> list[str]:
    """Return the state of each thread of this process with that name: R is running or runnable, S is sleeping."""
    states = []
    for thread in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # the thread has ended
            number_and_name, rest = (thread / "stat").read_text().rsplit(")", 1)
            if number_and_name.endswith(f"({name}"):
                states.append(rest.split()[0])
    return states
