"""Processes join and leave their group: more than once, and only when gloo's threads are at rest."""

import ctypes
import hashlib
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from forked import run_forked
from places import run_ranks

from verl import dist
from verl.errors import UserError

PR_SET_NAME = 15
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def named(name: str, work: Callable[[], object]) -> threading.Thread:
    """A thread that the system knows by that name, at work from now on."""
    begun = threading.Event()

    def run() -> None:
        ctypes.CDLL(None).prctl(PR_SET_NAME, name.encode(), 0, 0, 0)
        begun.set()
        work()

    thread = threading.Thread(target=run)
    thread.start()
    begun.wait()
    return thread


def compute() -> None:
    """Half a second or so, without the interpreter's lock."""
    hashlib.pbkdf2_hmac("sha256", b"a", b"b", 1_500_000)


@linux
def test_the_group_is_left_when_its_threads_have_let_go_of_their_messages() -> None:
    dist.start()
    thread = named("pt_gloo_runloop", compute)
    dist.stop()
    assert not thread.is_alive()


@linux
def test_threads_that_sleep_and_other_threads_are_not_waited_for() -> None:
    dist.start()
    end = threading.Event()
    threads = [named("pt_gloo_runloop", end.wait), named("another", lambda: [compute() for _ in range(4)])]
    began = time.monotonic()
    dist.stop()
    took = time.monotonic() - began
    still_at_work = threads[1].is_alive()
    end.set()
    for thread in threads:
        thread.join()
    assert still_at_work and took < 1


# One of the two comes late, once the first and once the other, so that it would find addresses of the group before.
SEVERAL_GROUPS = """
import time
from verl import dist
for number in range(3):
    time.sleep(1.0 * (dist.os.environ["RANK"] == str(number % 2)))
    dist.start()
    assert dist.gathered((number, dist.rank())) == [(number, 0), (number, 1)]
    dist.stop()
"""


@pytest.mark.parametrize("launcher", ["torchrun", "plain"])
def test_processes_join_one_group_after_another(launcher: str, tmp_path: Path) -> None:
    program = tmp_path / "several_groups.py"
    program.write_text(SEVERAL_GROUPS)
    if launcher == "torchrun":
        done = run_forked(program, folder=tmp_path, processes=2)
        assert done.returncode == 0, done.stderr
    else:
        run_ranks(program, processes=2)


def test_a_group_that_carries_nothing_in_host_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    dist.start()
    monkeypatch.setattr(torch.distributed, "get_backend_config", lambda: "cuda:nccl")
    try:
        with pytest.raises(UserError, match=r"a process group of 'cuda:nccl'.*\n  fix: create it with init_process_group"):
            dist.start()
    finally:
        dist.stop()


def test_ranks_that_differ_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    dist.check_same("abc", what="the rows", where="data.train_files")
    monkeypatch.setattr(dist, "from_main", lambda value: "other")
    with pytest.raises(UserError, match=r"data\.train_files: the rows on \S+ differ from those on the first node"):
        dist.check_same("abc", what="the rows", where="data.train_files")
