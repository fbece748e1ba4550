"""Where the ranks of a run meet: torchrun's environment variables, and the store at MASTER_ADDR:MASTER_PORT."""

import os
import socket
import time
from dataclasses import dataclass
from datetime import timedelta

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
