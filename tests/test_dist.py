"""Processes leave their group only when gloo's threads are at rest."""

import ctypes
import hashlib
import sys
import threading
import time
from collections.abc import Callable

import pytest

from verl import dist

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
