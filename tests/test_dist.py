"""Processes that leave their group: together after good work, each by itself after an error."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

WORK = """
import sys, time
from verl import dist
from verl.errors import UserError, exit_on_user_error

def main(fails):
    try:
        dist.start()
        dist.gathered("what is told last")
        if dist.is_main() and fails:
            raise UserError("something of its own")
        if dist.is_main():
            time.sleep(2)
            print("the last line", time.time())
    finally:
        dist.stop()
    print("gone at", time.time())

exit_on_user_error(main, "fails" in sys.argv)
"""


def two(*words: str) -> list[tuple[int, str, str]]:
    """Exit status, output and errors of each process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", WORK, *words]
    each = [
        subprocess.Popen(command, env={**common, "RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    said = [process.communicate() for process in each]
    return [(process.returncode, out, err) for process, (out, err) in zip(each, said, strict=True)]


def test_processes_leave_together() -> None:
    (status, first, errors), (other_status, other, other_errors) = two()
    assert (status, other_status) == (0, 0), errors + other_errors
    last_line = float(first.splitlines()[0].removeprefix("the last line "))
    assert float(other.split()[-1]) > last_line


def test_who_fails_alone_is_not_waited_for_and_fails_alone() -> None:
    (status, _, errors), (other_status, other, other_errors) = two("fails")
    assert status == 2 and "error: something of its own" in errors
    assert other_status == 0 and "gone at" in other and "Traceback" not in other_errors
