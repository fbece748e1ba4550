"""Agents' programs in processes of their own: what they give, how they fail, and that no process is left."""

import asyncio
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from verl.config.workers import WorkersConfig
from verl.errors import UserError
from verl.workers.agents import Agents, Result, load_program
from verl.workers.calls import Failure
from verl.workers.nursery import Program
from verl.workers.serve import _descendants

MARK = "AGENT_TEST_MARK"
PROGRAM = """
import asyncio, os, random, subprocess, sys, time

def run(row):
    kind = row["kind"]
    if kind == "hang":
        subprocess.Popen(["sleep", "1000"])
        subprocess.Popen(["sleep", "1000"], start_new_session=True)
        while True:
            time.sleep(1)
    if kind == "raise":
        raise ValueError("no sixes")
    if kind == "leave":
        print("out of luck")
        sys.stdout.flush()
        os._exit(9)
    if kind == "async":
        return asleep()
    return {"number": 2, "text": "done", "both": {"reward": 1, "text": "t"}, "list": [1], "nan": float("nan"), "nothing": None,
            "key": os.environ.get("OPENAI_API_KEY"), "secret": os.environ.get("MY_TOKEN", "none"), "draw": str(random.random())}[kind]

async def asleep():
    await asyncio.sleep(0)
    return 0.5
"""
COMMAND = """
import json, os, sys, time
row = json.load(sys.stdin)
print("working")
if row["kind"] == "hang":
    time.sleep(1000)
if row["kind"] == "raise":
    print("no sixes", file=sys.stderr)
    sys.exit(3)
if row["kind"] == "both":
    print(json.dumps({"reward": 1, "text": "t"}))
if row["kind"] == "list":
    print(json.dumps({"score": 1}))
"""


@contextmanager
def agents(program: str, seconds: float = 20.0, **keys: Any) -> Iterator[Agents]:
    made = Agents(load_program(program), seconds, WorkersConfig(**keys))
    try:
        yield made
    finally:
        made.close()


def ran(made: Agents, kinds: Sequence[str]) -> list[Result | Failure]:
    """One run a kind, all at the same time, each with a key and a seed of its own."""

    async def all_of_them() -> list[Result | Failure]:
        runs = (made.run({"kind": kind}, {"OPENAI_API_KEY": f"key {place}", MARK: "1"}, place) for place, kind in enumerate(kinds))
        return await asyncio.gather(*runs)

    return asyncio.run(all_of_them())


def left(made: Agents) -> list[int]:
    """Processes of runs that are still there."""
    assert made._worker is not None
    return _descendants(made._worker.process_id)


def marked() -> list[str]:
    """Commands of processes that runs have started, by the variable that these have."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # it has ended
            if f"{MARK}=1".encode() in path.read_bytes().split(b"\0"):
                found.append((path.parent / "cmdline").read_text())
    return found


@pytest.fixture
def program(tmp_path: Path) -> str:
    path = tmp_path / "agent.py"
    path.write_text(PROGRAM)
    return str(path)


def test_a_run_gives_a_reward_or_a_text_or_both_or_nothing(program: str) -> None:
    with agents(program) as made:
        found = ran(made, ["number", "text", "both", "nothing", "async"])
    assert found == [Result(2.0), Result(text="done"), Result(1.0, "t"), Result(), Result(0.5)]


def test_each_run_has_its_own_key_and_random_numbers(program: str) -> None:
    with agents(program) as made:
        keys, draws, again = (ran(made, [kind] * 5) for kind in ("key", "draw", "draw"))
    assert keys == [Result(text=f"key {place}") for place in range(5)]
    assert len({str(draw) for draw in draws}) == 5 and draws == again


def test_secrets_of_the_trainer_are_passed_on_only_if_they_are_named(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "hf_abc")
    with agents(program) as without, agents(program, secrets=["MY_TOKEN"]) as named:
        assert ran(without, ["secret"]) == [Result(text="none")] and "MY_TOKEN" in without.dropped
        assert ran(named, ["secret"]) == [Result(text="hf_abc")]


def test_what_fails_is_told_with_its_place_and_the_others_go_on(program: str) -> None:
    with agents(program, seconds=1.0) as made:
        began = time.monotonic()
        kinds = ["hang", "raise", "leave", "list", "nan"]
        found = dict(zip([*kinds, *"abcde"], ran(made, [*kinds, *["number"] * 5]), strict=True))
        assert time.monotonic() - began < 10.0
        texts = {kind: str(found[kind]) for kind in kinds}
        assert texts["hang"].startswith("did not end within 1 s (agent.seconds)") and "agent.py:" in texts["hang"]
        assert texts["raise"].startswith("raised ValueError: no sixes") and "agent.py:" in texts["raise"]
        assert texts["leave"] == "ended with exit code 9: out of luck"
        assert "returned [1] of type list, expected None, a number" in texts["list"] and "returned nan" in texts["nan"]
        assert [found[other] for other in "abcde"] == [Result(2.0)] * 5
        assert marked() == [] and left(made) == [], "what a run has started ends with it, also in a session of its own"


def test_a_command_reads_the_row_and_may_print_a_result_last(tmp_path: Path) -> None:
    path = tmp_path / "agent.py"
    path.write_text(COMMAND)
    with agents(f"{sys.executable} {path}", seconds=3.0) as made:
        hung, raised, both, wrong, nothing = ran(made, ["hang", "raise", "both", "list", ""])
    assert str(hung) == "did not end within 3 s (agent.seconds)"
    assert str(raised) == "ended with exit code 3: no sixes"
    assert both == Result(1.0, "t") and nothing == Result()
    assert isinstance(wrong, Failure) and "expected None, a number" in wrong.what


def test_a_run_that_is_no_longer_wanted_is_ended(program: str) -> None:
    async def given_up(made: Agents) -> None:
        task = asyncio.create_task(made.run({"kind": "hang"}, {MARK: "1"}, 1))
        while not marked():
            await asyncio.sleep(0.05)
        task.cancel()
        deadline = time.monotonic() + 10
        while marked() and time.monotonic() < deadline:
            await asyncio.sleep(0.05)

    with agents(program) as made:
        asyncio.run(given_up(made))
        assert marked() == [] and left(made) == []
        assert ran(made, ["number"]) == [Result(2.0)], "others can still be run"


def test_all_runs_end_with_the_trainer(program: str, tmp_path: Path) -> None:
    trainer = os.fork()
    if trainer == 0:
        try:
            with agents(program) as made:
                ran(made, ["hang"])
        finally:
            os._exit(0)
    deadline = time.monotonic() + 20
    while not marked() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert marked(), "else the test shows nothing"
    os.kill(trainer, 9)
    os.waitpid(trainer, 0)
    while marked() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert marked() == []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("nothing.py", "no such file"),
        ("no-such-command --fast", "there is no command 'no-such-command'"),
        ("", "is empty"),
        ("python 'agent", "cannot be read as a command"),
    ],
)
def test_a_program_that_is_not_there_is_refused(given: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_program(given)


def test_a_file_without_run_and_one_that_takes_no_row_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "agent.py"
    path.write_text("def play(row):\n    pass\n")
    with pytest.raises(UserError, match="has no function 'run'"):
        load_program(str(path))
    path.write_text("def run():\n    pass\n")
    with pytest.raises(UserError, match=r"run\(\) cannot be called as run\(row\)"):
        load_program(str(path))


def test_a_program_that_cannot_be_imported_in_its_process_ends_the_run(program: str) -> None:
    Path(program).write_text(f"import os\nassert os.environ.get('{MARK}') is None or 1 / 0\n{PROGRAM}")
    made = Agents(load_program(program), 20.0, WorkersConfig())
    Path(program).write_text("import no_such_package\n\n\ndef run(row):\n    pass\n")
    try:
        with pytest.raises(UserError, match="fails when it is imported: ModuleNotFoundError"):
            ran(made, ["number"] * 3)
    finally:
        made.close()


@pytest.mark.parametrize(
    "line", ["openai.OpenAI()", "os.environ['OPENAI_BASE_URL']", "os.environ['OPENAI_MODEL']", "int(os.environ['AGENT_SEED'])"]
)
def test_a_program_that_looks_for_the_endpoint_at_its_import_is_told_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-the-trainer")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://another.service/v1")
    path = tmp_path / "early.py"
    path.write_text(f"import os, openai\nFOUND = {line}\n\n\ndef run(row):\n    pass\n")
    with pytest.raises(UserError, match="fails when it is imported") as caught:
        load_program(str(path))
    assert "exist only inside run(row)" in str(caught.value.fix) and str(caught.value.where).endswith("early.py:2")
    assert os.environ["OPENAI_API_KEY"] == "sk-of-the-trainer", "the trainer's own environment is as before"
    made = Agents(Program(str(path)), 20.0, WorkersConfig())
    try:
        with pytest.raises(UserError) as caught:
            ran(made, ["number"])
    finally:
        made.close()
    assert "exist only inside run(row)" in str(caught.value.fix)


def test_the_address_of_the_trainers_service_never_reaches_an_agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("OPENAI_API_KEY", "OPENAI_BASE_URL")
    for name in names:
        monkeypatch.setenv(name, "of-the-trainer")
    path = tmp_path / "looks.py"
    path.write_text(f"import os\nEARLY = [os.environ.get(name) for name in {names}]\n\n\ndef run(row):\n    return str(EARLY)\n")
    with agents(str(path), secrets=[*names]) as made:
        assert ran(made, ["early"]) == [Result(text="[None, None]")]
        assert not {*names} & {*made.dropped}, "nobody is told to pass them on"
