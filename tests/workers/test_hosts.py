"""Objects of a user's class in processes of their own: they live side by side, and what goes wrong is the failure of one alone."""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from verl import plugin
from verl.errors import UserError
from verl.workers.calls import Failure
from verl.workers.host import Call, Late
from verl.workers.hosts import Host, HostEndedError, Hosts
from verl.workers.serve import _descendants

TEXT = """
import asyncio, os, random, subprocess, sys, time


class Thing:
    def __init__(self):
        self.total = 0

    def add(self, number):
        self.total += number
        return {"total": self.total, "process": os.getpid()}

    async def add_slowly(self, number):
        await asyncio.sleep(0.2)
        return self.add(number)

    def draw(self):
        return {"number": random.random()}

    def raises(self):
        raise ValueError("no")

    def no_json(self):
        return {"value": object()}

    def leaves(self):
        os._exit(3)

    def crashes(self):
        os.kill(os.getpid(), 11)

    def sleeps(self):
        time.sleep(1e6)

    def spins(self):
        while True:
            pass

    async def awaits(self):
        await asyncio.Event().wait()

    async def clings(self):
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                time.sleep(1e6)

    def leaves_others(self):
        subprocess.Popen(["sleep", "1000"], start_new_session=True)
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                time.sleep(1000)
            os._exit(0)
        time.sleep(1e6)

    def forks(self):
        os.fork()
        return {"process": os.getpid()}
"""
LINE = {name: 1 + TEXT[: TEXT.index(f"def {name}")].count("\n") for name in ("raises", "sleeps", "spins", "awaits", "leaves")}


@pytest.fixture
def use(tmp_path: Path) -> Callable[..., Any]:
    """Run a function with hosts of things, and see that no process is left."""
    path = tmp_path / "thing.py"
    path.write_text(TEXT)

    def run(work: Callable[[Hosts], Coroutine[Any, Any, Any]], most: int = 8) -> Any:
        async def whole() -> Any:
            hosts = Hosts(plugin.load("verl", str(path)), "Thing", None, "thing", most=most, secrets=[])
            try:
                return await work(hosts)
            finally:
                await hosts.close()

        before = set(_descendants(os.getpid(), ()))
        found = asyncio.run(whole())
        assert set(_descendants(os.getpid(), ())) <= before
        return found

    return run


async def called(hosts: Hosts, function: str, *arguments: Any, seconds: float = 20.0) -> Any:
    """The result of a new object's method; a failure if its process has ended."""
    host = await hosts.begin()
    try:
        return await host.call(function, *arguments, seconds=seconds, seed=1)
    except HostEndedError as error:
        return ("late" if isinstance(error.failure, Late) else "ended", error.failure)
    finally:
        host.release()


def test_objects_keep_their_state_side_by_side(use: Callable[..., Any]) -> None:
    async def work(hosts: Hosts) -> None:
        first, second = await hosts.begin(), await hosts.begin()
        for host, number in ((first, 1), (second, 10), (first, 1), (second, 10)):
            found = await host.call("add", number, seconds=20.0, seed=5 if not getattr(host, "begun", False) else None)
            host.begun = True  # type: ignore[attr-defined]
        assert found["total"] == 20
        assert (await first.call("add", 1, seconds=20.0))["total"] == 3
        first.release()
        again = await hosts.begin()
        assert (await again.call("add", 1, seconds=20.0, seed=5))["total"] == 1, "a new object"

    use(work)


def test_calls_wait_for_nothing_but_themselves(use: Callable[..., Any]) -> None:
    async def work(hosts: Hosts) -> float:
        await asyncio.gather(*(called(hosts, "add", 1) for _ in range(8)))
        begun = time.monotonic()
        await asyncio.gather(*(called(hosts, "add_slowly", 1) for _ in range(8)))
        return time.monotonic() - begun

    assert use(work) < 8 * 0.2


def test_no_more_objects_live_than_there_may_be_processes(use: Callable[..., Any]) -> None:
    async def work(hosts: Hosts) -> set[int]:
        found = await asyncio.gather(*(called(hosts, "add_slowly", 1) for _ in range(5)))
        return {one["process"] for one in found}

    assert len(use(work, most=2)) == 2


def test_random_numbers_are_those_of_the_seed(use: Callable[..., Any]) -> None:
    async def work(hosts: Hosts) -> list[Any]:
        return await asyncio.gather(*(called(hosts, "draw") for _ in range(3)))

    first, *others = use(work)
    assert others == [first, first]


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("raises", "raised ValueError: no"),
        ("no_json", "object is neither text, a number, a list nor an object"),
        ("missing", "raised AttributeError"),
    ],
)
def test_a_failure_is_that_of_one_call(use: Callable[..., Any], function: str, said: str) -> None:
    async def work(hosts: Hosts) -> Any:
        return await asyncio.gather(called(hosts, function), called(hosts, "add", 1), called(hosts, function))

    failed, added, _ = use(work)
    assert isinstance(failed, Failure) and said in failed.what
    assert added["total"] == 1
    if function == "raises":
        assert failed.place is not None and failed.place.endswith(f"thing.py:{LINE['raises'] + 1}")


@pytest.mark.parametrize(("function", "how"), [("leaves", "with exit code 3"), ("crashes", "by SIGSEGV")])
def test_a_process_that_ends_is_replaced(use: Callable[..., Any], function: str, how: str) -> None:
    async def work(hosts: Hosts) -> list[Any]:
        return [await called(hosts, function), await called(hosts, "add", 1)]

    (kind, failure), added = use(work, most=1)
    assert kind == "ended" and failure.what == f"ended its process {how}"
    assert added["total"] == 1


@pytest.mark.parametrize("function", ["sleeps", "spins", "awaits", "clings", "leaves_others"])
def test_what_hangs_is_ended_at_its_limit_with_all_that_it_has_started(use: Callable[..., Any], function: str) -> None:
    async def work(hosts: Hosts) -> Any:
        await called(hosts, "add", 1)
        begun = time.monotonic()
        found = await asyncio.gather(called(hosts, function, seconds=0.5), called(hosts, "add", 1))
        seconds = time.monotonic() - begun
        while len(_descendants(os.getpid(), ())) > before + 3 and time.monotonic() - begun < 20.0:  # the keeper and two hosts
            await asyncio.sleep(0.05)
        return found, seconds, len(_descendants(os.getpid(), ()))

    before = len(_descendants(os.getpid(), ()))
    (failure, added), seconds, left = use(work)
    assert left <= before + 3
    failure = failure if isinstance(failure, Failure) else failure[1]
    assert failure.what == "did not return within 0.5 s" and seconds < 6.0
    assert added["total"] == 1
    if function in ("sleeps", "spins", "awaits"):
        assert failure.place is not None and f"thing.py:{LINE[function]}" < failure.place.rpartition("/")[2]


def test_a_fork_of_the_users_does_not_answer_too(use: Callable[..., Any]) -> None:
    async def work(hosts: Hosts) -> Any:
        host = await hosts.begin()
        first = await host.call("forks", seconds=20.0, seed=1)
        return first, await host.call("add", 1, seconds=20.0)

    first, added = use(work)
    assert added["process"] == first["process"]


def test_a_call_that_is_given_up_ends_its_process(use: Callable[..., Any]) -> None:
    async def work(hosts: Hosts) -> bool:
        host: Host = await hosts.begin()
        task = asyncio.create_task(host.call("sleeps", seconds=1000.0, seed=1))
        await asyncio.sleep(0.1)
        task.cancel()
        await asyncio.wait({task})
        return host.has_ended

    assert use(work)


def test_a_module_that_cannot_be_imported_there_is_named(tmp_path: Path) -> None:
    path = tmp_path / "once.py"
    path.write_text(f"import os\nif os.getpid() != {os.getpid()}:\n    raise OSError('only here')\nclass Thing: pass\n")

    async def work() -> None:
        hosts = Hosts(plugin.load("verl", str(path)), "Thing", None, "thing", most=1, secrets=[])
        try:
            await hosts.begin()
        finally:
            await hosts.close()

    with pytest.raises(UserError, match="thing fails when it is imported: OSError: only here, in its own process"):
        asyncio.run(work())


def test_hosts_end_with_a_trainer_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "thing.py").write_text(TEXT)
    program = (
        "import asyncio, os, sys\nfrom verl import plugin\nfrom verl.workers.hosts import Hosts\n"
        "async def work():\n"
        f"    hosts = Hosts(plugin.load('verl', {str(tmp_path / 'thing.py')!r}), 'Thing', None, 'thing', most=2, secrets=[])\n"
        "    host = await hosts.begin()\n"
        "    print((await host.call('add', 1, seconds=60.0, seed=1))['process'], flush=True)\n"
        "    await host.call('spins', seconds=1000.0)\n"
        "asyncio.run(work())\n"
    )
    trainer = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=os.environ)
    assert trainer.stdout is not None
    process = int(trainer.stdout.readline())
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()
    deadline = time.monotonic() + 10.0
    while _runs(process) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(process)


def _runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_a_call_is_small(use: Callable[..., Any]) -> None:
    """Hundreds of objects fit beside a trainer: a call takes about a millisecond."""

    async def work(hosts: Hosts) -> float:
        host = await hosts.begin()
        await host.call("add", 1, seconds=20.0, seed=1)
        begun = time.monotonic()
        for _ in range(100):
            await host.call("add", 1, seconds=20.0)
        return (time.monotonic() - begun) / 100

    assert use(work) < 0.02
    assert Call("add", (1,), 1.0).seed is None
