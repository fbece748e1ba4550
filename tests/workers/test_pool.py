"""Users' own code in worker processes: what it returns, how it fails, and what becomes of its processes."""

import http.server
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from places import ROOT
from runs import wait_for

from verl import plugin
from verl.config.workers import WorkersConfig
from verl.errors import AbandonedError, UserError
from verl.workers.calls import Failure
from verl.workers.pool import Watch, Workers

SCORE = "score"


class Told:
    """Who is told of a wait; a signal arrives after so many seconds."""

    def __init__(self, signal_after: float = float("inf")):
        self.said: list[str] = []
        self.lines: list[str] = []
        self._signal_at = time.monotonic() + signal_after

    def waiting(self, text: str | None, *, line_is_due: bool = False) -> None:
        self.said += [] if text is None else [text]
        self.lines += [text] if text is not None and line_is_due else []

    def stopping(self) -> bool:
        return time.monotonic() > self._signal_at


@pytest.fixture
def workers(tmp_path: Path) -> Any:
    """Make workers of a file with this text; they are ended after the test."""
    made: list[Workers] = []

    def make(text: str, *, function: str = SCORE, watch: Watch | None = None, **keys: Any) -> Workers:
        path = tmp_path / f"mine{len(made)}.py"
        path.write_text(text)
        module = plugin.load("verl.rewards", str(path))
        made.append(Workers(module, None, function, "reward mine", WorkersConfig(**keys), watch))
        return made[-1]

    yield make
    for each in made:
        each.close()


def scores(workers: Workers, *responses: str, row: dict[str, Any] | None = None, **options: bool) -> list[Any]:
    return workers.run(SCORE, [("question", response, {} if row is None else row) for response in responses], **options)


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def ends(process: int, seconds: float = 10) -> bool:
    """Return whether a process ends within this time."""
    deadline = time.monotonic() + seconds
    while is_running(process) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_running(process)


ENDS = """
import ctypes
import json
import os
import time


def score(prompt, response, row):
    if response == "good":
        return 1
    exec(response, {"os": os, "ctypes": ctypes, "json": json, "time": time})
"""


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("exit()", "raised SystemExit: None"),
        ("raise KeyboardInterrupt", "raised KeyboardInterrupt"),
        ("os._exit(0)", "ended its process with exit code 0"),
        ("ctypes.string_at(0)", "ended its process by SIGSEGV"),
        ("f = lambda: f()\nf()", "raised NameError|raised RecursionError"),
        ("json.loads('{')", "raised JSONDecodeError: Expecting property name"),
        ("time.sleep(100)", "did not return within 2 s"),
        ("while True: pass", "did not return within 2 s"),
    ],
)
def test_whatever_an_answer_does_is_a_failure_of_that_answer_alone_with_the_users_line(workers: Any, program: str, said: str) -> None:
    first, failure, last = scores(workers(ENDS, timeout_seconds=2.0), "good", program, "good")
    assert (first, last) == (1.0, 1.0)
    assert isinstance(failure, Failure) and any(failure.what.startswith(text) for text in said.split("|"))
    assert failure.place is not None and failure.place.endswith("mine0.py:11")


def test_a_worker_that_is_killed_is_replaced(workers: Any) -> None:
    failure, good = scores(workers(ENDS), "os.kill(os.getpid(), 9)", "good")
    assert good == 1.0 and failure.what == "ended its process by SIGKILL (is the memory full?)"


def test_a_fork_that_the_code_forgets_does_not_answer(workers: Any) -> None:
    text = "import os\ndef score(prompt, response, row):\n    if os.fork() == 0: exit()\n    return 2\n"
    assert scores(workers(text), "a", "b", "c") == [2, 2, 2]


def test_no_answer_sees_what_another_has_changed_in_its_row(workers: Any) -> None:
    text = (
        "def score(prompt, response, row):\n    row['tests'].append(1)\n    row['seen'] = True\n    return len(row['tests']) + len(row)\n"
    )
    row: dict[str, Any] = {"tests": []}
    assert scores(workers(text), "a", "b", row=row) == [3, 3]
    assert row == {"tests": []}


def test_global_state_is_kept_and_the_module_imported_once(workers: Any) -> None:
    text = "import os\nN = [0]\ndef score(prompt, response, row):\n    N[0] += 1\n    return N[0]\n"
    mine = workers(text)
    assert scores(mine, "a", "b") + scores(mine, "c") == [1, 2, 3]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("1", 1.0),
        ("True", 1.0),
        ("torch.tensor(1.5)", 1.5),
        ("torch.tensor([2.0])", 2.0),
        ("np.array(0.5)", 0.5),
        ("np.bool_(True)", 1.0),
        ("Fraction(1, 4)", 0.25),
        ("Decimal('0.5')", 0.5),
    ],
)
def test_whatever_float_takes_is_a_number(workers: Any, value: str, expected: float) -> None:
    heads = "import torch\nimport numpy as np\nfrom fractions import Fraction\nfrom decimal import Decimal\n"
    text = f"{heads if '(' in value else ''}def score(prompt, response, row):\n    return {value}\n"
    assert scores(workers(text), "a") == [expected]


@pytest.mark.parametrize("value", ["'0.5'", "None", "float('nan')", "float('-inf')", "10**400", "1e300", "[1]", "1j", "b'1'", "{}"])
def test_what_is_no_finite_number_is_refused_with_its_type(workers: Any, value: str) -> None:
    (failure,) = scores(workers(f"def score(prompt, response, row):\n    return {value}\n"), "a")
    kind = type(eval(value)).__name__
    assert isinstance(failure, Failure) and failure.what.endswith(f"of type {kind}, expected a finite number")


ASYNC = """
import asyncio
import os
import time


async def score(prompt, response, row):
    if response == "slow":
        await asyncio.sleep(100)
    if response == "blocks":
        time.sleep(100)
    if response == "exit":
        exit()
    if response == "leave":
        os._exit(3)
    await asyncio.sleep(0.5)
    return len(response)
"""


def test_async_answers_are_scored_at_the_same_time(workers: Any) -> None:
    mine = workers(ASYNC)
    scores(mine, "warm")
    since = time.monotonic()
    assert scores(mine, *["abc"] * 60) == [3] * 60
    assert time.monotonic() - since < 10  # one after the other would take 30 s


def test_only_the_async_answer_that_fails_is_a_failure(workers: Any) -> None:
    a, slow, exits, b = scores(workers(ASYNC, timeout_seconds=1.0), "a", "slow", "exit", "bb")
    assert (a, b) == (1, 2)
    assert slow.what.startswith("did not return within 1 s") and slow.place.endswith("mine0.py:9")
    assert exits.what == "raised SystemExit: None"


@pytest.mark.parametrize(("response", "said"), [("leave", "ended its process with exit code 3"), ("blocks", "did not return within 1 s")])
def test_an_async_answer_that_ends_the_worker_takes_no_other_with_it(workers: Any, response: str, said: str) -> None:
    a, failure, b = scores(workers(ASYNC, timeout_seconds=1.0), "a", response, "bb")
    assert (a, b) == (1, 2) and failure.what.startswith(said)


def test_a_group_is_scored_together_and_its_numbers_are_counted(workers: Any) -> None:
    text = "def score_group(prompt, responses, row):\n    return [len(r) for r in responses if r != 'lost']\n"
    mine = workers(text, function="score_group")
    good, short = mine.run("score_group", [("p", ["a", "bb"], {}), ("p", ["a", "lost"], {})])
    assert good == [1, 2] and short.what == "returned 1 numbers for 2 answers"


def test_several_workers_share_the_calls(workers: Any) -> None:
    text = "import os, time\ndef score(prompt, response, row):\n    time.sleep(0.05)\n    return os.getpid()\n"
    assert len(set(scores(workers(text, workers=2), *["a"] * 20))) == 2


def test_quick_calls_are_sent_ahead_and_each_keeps_its_own_result_or_failure(workers: Any, tmp_path: Path) -> None:
    """One quick call ends the worker, one exceeds its time limit, one raises. Every other one runs once, though it waited behind them."""
    text = f"""
import os, time
def score(prompt, response, row):
    with open({str(tmp_path / "ran")!r}, "a") as file:
        file.write(response + "\\n")
    if response == "20": os._exit(3)
    if response == "120": time.sleep(60)
    if response == "90": raise ValueError("no nineties")
    return float(response)
"""
    found = scores(workers(text, timeout_seconds=1.0), *map(str, range(200)))
    failed = {number: str(result) for number, result in enumerate(found) if isinstance(result, Failure)}
    assert sorted(failed) == [20, 90, 120]
    assert "exit code 3" in failed[20] and "no nineties" in failed[90] and "did not return within 1 s" in failed[120]
    assert [result for number, result in enumerate(found) if number not in failed] == [float(n) for n in range(200) if n not in failed]
    ran = (tmp_path / "ran").read_text().split()
    assert all(ran.count(str(number)) == 1 for number in range(200) if number != 20)


def test_a_call_that_another_one_ends_is_called_again(workers: Any) -> None:
    """A thread of call 20 ends the process while call 21 runs, which had been sent ahead."""
    text = """
import os, threading, time
runs = threading.Event()
def score(prompt, response, row):
    if response == "20":
        threading.Thread(target=lambda: (runs.wait(), os._exit(3)), daemon=True).start()
    if response == "21":
        runs.set()
        time.sleep(0.2)
    return float(response)
"""
    assert scores(workers(text), *map(str, range(40))) == [float(number) for number in range(40)]


def test_slow_calls_are_not_sent_ahead_so_that_workers_share_them(workers: Any) -> None:
    text = "import os, time\ndef score(prompt, response, row):\n    time.sleep(0.05)\n    return os.getpid()"
    found = scores(workers(text, workers=2), *["answer"] * 20)
    each = [found.count(process) for process in set(found)]
    assert len(each) == 2 and min(each) >= 8


def test_arguments_of_any_size_reach_the_worker_before_it_is_free(workers: Any) -> None:
    """What is sent ahead fits the pipe. Otherwise the trainer would wait in a write, and could not end a call that is late."""
    text = "import time\ndef score(prompt, response, row):\n    time.sleep(30 if response[0] == 's' else 0)\n    return len(response)"
    large = ["x" * 500_000] * 4
    began = time.monotonic()
    found = scores(workers(text, timeout_seconds=1.0), "q", "q", "slow", *large)
    assert found[:2] == [1.0, 1.0] and isinstance(found[2], Failure) and found[3:] == [500_000.0] * 4
    assert time.monotonic() - began < 15


def test_until_failure_returns_at_the_first_one(workers: Any) -> None:
    since = time.monotonic()
    found = scores(workers(ENDS, timeout_seconds=1.0), "good", *["time.sleep(100)"] * 50, until_failure=True)
    assert found[0] == 1.0 and isinstance(found[1], Failure) and found[2:] == [None] * 49
    assert time.monotonic() - since < 30


def test_secrets_of_the_environment_are_left_out_unless_they_are_named(workers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = {"HF_TOKEN": "x", "OPENAI_API_KEY": "x", "DB_PASSWORD": "x", "PROXY": "http://me:word@host", "JUDGE_KEY": "x"}
    for name, value in {**secret, "TOKENIZERS_PARALLELISM": "false", "KEYBOARD": "de"}.items():
        monkeypatch.setenv(name, value)
    text = "import os\ndef score(prompt, response, row):\n    return len([os.environ[n] for n in response.split()])\n"
    mine = workers(text, secrets=["JUDGE_KEY"])
    assert {*secret} - {*mine.dropped} == {"JUDGE_KEY"}
    assert scores(mine, "TOKENIZERS_PARALLELISM KEYBOARD JUDGE_KEY PATH") == [4]
    (failure,) = scores(mine, "OPENAI_API_KEY")
    assert failure.fix.endswith("reward.secrets=[OPENAI_API_KEY]")


def test_a_file_that_only_the_worker_cannot_import_is_an_error_with_its_line(workers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_TOKEN", "x")
    mine = workers("import os\nKEY = os.environ['JUDGE_TOKEN']\ndef score(prompt, response, row):\n    return 1\n")
    with pytest.raises(
        UserError, match=r"mine0.py:2: reward mine fails when it is imported: KeyError(.|\n)*reward.secrets=\[JUDGE_TOKEN\]"
    ):
        scores(mine, "a")


def test_a_wait_is_told_of_with_its_state_and_in_a_log_at_growing_intervals(workers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("verl.workers.pool.SECONDS_BEFORE_LINE", 1.5)
    told = Told()
    scores(workers("import time\ndef score(prompt, response, row):\n    time.sleep(2)\n    return 1\n", watch=told), "a", "b", "c")
    assert any(text.startswith("waiting for reward mine: 1 of 3 answers, ") for text in told.said)
    assert 1 <= len(told.lines) <= 2 < len(told.said)


def test_a_signal_ends_a_wait(workers: Any) -> None:
    mine = workers(ENDS, watch=Told(signal_after=1.0))
    since = time.monotonic()
    with pytest.raises(AbandonedError):
        scores(mine, "time.sleep(100)")
    assert time.monotonic() - since < 10


def test_a_call_costs_less_than_a_millisecond(workers: Any) -> None:
    mine = workers("def score(prompt, response, row):\n    return 1\n")
    scores(mine, "warm")
    times = []
    for _ in range(3):
        since = time.monotonic()
        scores(mine, *["answer"] * 500)
        times.append(time.monotonic() - since)
    assert min(times) / 500 < 1e-3


HOLDS = """
import sys, time
from verl import plugin
from verl.config.workers import WorkersConfig
from verl.workers.pool import Workers

mine = Workers(plugin.load("verl.rewards", sys.argv[1]), None, "score", "reward mine", WorkersConfig())
mine.run("score", [("p", sys.argv[2], {})])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("hold", ["time.sleep(100)", "ctypes.CDLL(None).sleep(100)"])
def test_workers_and_all_that_they_have_started_end_with_a_trainer_that_is_killed(tmp_path: Path, hold: str) -> None:
    pids = tmp_path / "pids"
    (tmp_path / "mine.py").write_text(
        "import ctypes, os, subprocess, time\n"
        "def score(prompt, response, row):\n"
        "    child, far = (subprocess.Popen(['sleep', '100'], start_new_session=new) for new in (False, True))\n"
        f"    open({str(pids)!r}, 'w').write(f'{{os.getpid()}} {{os.getppid()}} {{child.pid}} {{far.pid}} ')\n"
        f"    {hold}\n"
    )
    trainer = subprocess.Popen([sys.executable, "-c", HOLDS, tmp_path / "mine.py", "a"], env={**os.environ, "PYTHONPATH": str(ROOT)})
    wait_for(lambda: pids.exists() and len(pids.read_text().split()) == 4)
    processes = [int(text) for text in pids.read_text().split()]
    assert all(map(is_running, processes))
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    assert all(map(ends, processes))


def test_closed_workers_leave_no_process(workers: Callable[..., Workers]) -> None:
    mine = workers("import os\ndef score(prompt, response, row):\n    return os.getpid()\n")
    (process,) = scores(mine, "a")
    mine.close()
    assert not is_running(int(process))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("end", ["return 1.0", "os._exit(3)", "os.kill(os.getpid(), 9)", "time.sleep(100)", "ctypes.string_at(0)"])
def test_processes_in_sessions_of_their_own_end_with_their_worker(workers: Callable[..., Workers], tmp_path: Path, end: str) -> None:
    """Also a daemon, whose parent has ended before."""
    daemon = tmp_path / "daemon"
    mine = workers(
        "import ctypes, os, subprocess, time\n"
        "def score(prompt, response, row):\n"
        "    subprocess.Popen(['sh', '-c', 'sleep 100 & echo $! > ' + response], start_new_session=True).wait()\n"
        f"    open(response + '.stat', 'w').write(open(f'/proc/{{open(response).read().strip()}}/stat').read())\n    {end}\n",
        timeout_seconds=2.0,
    )
    scores(mine, str(daemon))
    process = int(daemon.read_text())
    assert (tmp_path / "daemon.stat").read_text().startswith(f"{process} (")  # it was running
    mine.close()
    assert ends(process)


def test_processes_that_multiprocessing_spawns_find_the_users_file_and_the_files_beside_it(workers: Any, tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text("def twice(x):\n    return 2 * x\n")
    mine = workers(
        "import multiprocessing, helper\n"
        "def double(x):\n    return helper.twice(x)\n"
        "def score(prompt, response, row):\n"
        "    with multiprocessing.get_context(response).Pool(2) as pool:\n        return sum(pool.map(double, [1, 2, 3]))\n",
        timeout_seconds=30.0,
    )
    assert scores(mine, "spawn", "forkserver", "fork") == [12, 12, 12]


JUDGE = """
import asyncio, json


async def score(prompt, response, row):
    reader, writer = await asyncio.open_connection("127.0.0.1", row["port"])
    writer.write(f"POST / HTTP/1.0\\r\\nContent-Length: {len(response)}\\r\\n\\r\\n{response}".encode())
    reply = (await reader.read()).decode()
    writer.close()
    return json.loads(reply.rpartition("\\r\\n")[2])
"""


class Judge(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        answer = self.rfile.read(int(self.headers["Content-Length"])).decode()
        time.sleep(0.3)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"no number" if answer == "bad" else str(len(answer)).encode())

    def log_message(self, *_: object) -> None: ...


class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 128


def test_an_async_reward_may_ask_a_server_many_questions_at_once(workers: Any) -> None:
    with Server(("127.0.0.1", 0), Judge) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        mine, row = workers(JUDGE), {"port": server.server_port}
        scores(mine, "warm", row=row)
        since = time.monotonic()
        *good, bad = scores(mine, *["abc"] * 60, "bad", row=row)
        assert good == [3] * 60 and bad.what.startswith("raised JSONDecodeError") and time.monotonic() - since < 10  # 18 s one by one
        server.shutdown()
