"""The processes that compare expressions: limits, side by side work, memory of results, and no process left behind."""

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from verl.errors import UserError
from verl.rewards import _judge
from verl.rewards._judge import Judge

pytestmark = pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="math-verify is not installed")

HOSTILE = [
    r"9^{9^{9^9}}",
    r"\gcd(10^{10^9},3^{10^8})",
    r"100000000!",
    r"\binom{1000000000}{500000000}",
    r"\prod_{k=1}^{10^9} k",
    r"\sum_{k=1}^{100000000}\frac{1}{k}",
    r"(x+y+z)^{5000}",
    "{" * 400 + "}" * 400,
]


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge()


def test_expressions_are_compared_in_value(judge: Judge) -> None:
    assert judge.equal([(r"2\sqrt{3}", r"\sqrt{12}"), ("x+1", "x+2"), ("(x+1)^2", "x^2+2x+1")]) == [True, False, True]


def test_a_hostile_expression_is_equal_to_nothing_and_the_next_one_is_compared(judge: Judge) -> None:
    pairs = [("7", hostile) for hostile in HOSTILE] + [("0.5", r"\sqrt{0.25}")]
    started = time.perf_counter()
    assert judge.equal(pairs) == [False] * len(HOSTILE) + [True]
    assert time.perf_counter() - started < len(HOSTILE) * _judge.WAITING_SECONDS


def test_a_result_is_remembered(judge: Judge) -> None:
    pair = ("7", HOSTILE[1])
    judge.equal([pair])
    started = time.perf_counter()
    assert judge.equal([pair] * 100) == [False] * 100
    assert time.perf_counter() - started < 0.1


def test_the_server_is_started_again_after_it_was_ended_from_outside(judge: Judge) -> None:
    judge.equal([("x+3", "3+x")])
    assert judge._server is not None
    judge._server.kill()
    judge._server.wait()
    assert judge.equal([("x+4", "4+x")]) == [True]


def test_processes_that_cannot_compare_are_an_error_and_not_a_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_judge, "__name__", "verl.errors")  # which starts, and answers nothing
    with pytest.raises(UserError, match="does not start"):
        Judge().equal([("1/2", "0.5")])


@pytest.mark.skipif(sys.platform != "linux", reason="the workers are found in /proc")
def test_no_process_is_left_when_the_run_is_killed() -> None:
    code = (
        "import time; from verl.rewards._judge import Judge; judge = Judge(); judge.equal([('x', 'y')]);"
        "print(judge._server.pid, flush=True); time.sleep(600)"
    )
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    server = int(run.stdout.readline())
    workers = [int(pid) for pid in Path(f"/proc/{server}/task/{server}/children").read_text().split()]
    run.kill()
    run.wait()
    run.stdout.close()
    deadline = time.monotonic() + 2 * _judge.PARENT_CHECK_SECONDS
    while any(alive(process) for process in (server, *workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert workers and not any(alive(process) for process in (server, *workers))


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_forked_process_does_not_use_the_server_of_its_parent(judge: Judge) -> None:
    judge.equal([("x+5", "5+x")])
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if judge.equal([("x+6", "6+x")]) == [True] else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert judge.equal([("x+7", "7+x")]) == [True]
