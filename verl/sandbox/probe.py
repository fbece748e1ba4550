"""A program that tries to break out, before any other is run. A sandbox that lets it is refused."""

import asyncio
import tempfile
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from verl.errors import UserError
from verl.sandbox.limits import Limits

ATTEMPTS = {
    "read a file of the user's": "open({secret!r}).read()",
    "read the password file": "open('/etc/passwd').read()",
    "write beside its folder": "open({secret!r}, 'a')",
    "read /proc": "open('/proc/self/status').read()",
    "start a process": "os.fork() or os._exit(0)",
    "run another program": "os.execv('/bin/true', ['true'])",
    "open a socket": "socket.socket()",
    "send a signal to another process": "os.kill(os.getppid(), 0)",
    "raise its limits": "resource.setrlimit(resource.RLIMIT_NOFILE, (10, 10))",
    "change a mode": "os.chmod('.', 0o700)",
}
KNOWN = ("HOME", "TMPDIR", "LC_CTYPE")  # variables that Python and `program` set
PROGRAM = """
import os, resource, socket

def succeeds(attempt):
    try:
        exec(attempt)
    except (OSError, ValueError):  # setrlimit raises a ValueError
        return False
    return True

print([name for name, attempt in {attempts!r}.items() if succeeds(attempt)], sorted(set(os.environ) - {known!r}))
"""


class Starter(Protocol):
    """What starts programs: see `verl.sandbox.sandbox.Sandbox`."""

    wall: str
    variables: tuple[str, ...]

    def program(self, limits: Limits, seed: int = 0) -> Any: ...


def check(sandbox: Starter) -> None:
    """Run it.

    Raises:
        UserError: an attempt was not refused, or no program can be run.
    """
    with tempfile.NamedTemporaryFile(prefix="verl-probe-") as secret:
        attempts = {name: attempt.format(secret=secret.name) for name, attempt in ATTEMPTS.items()}
        found = _run(sandbox, PROGRAM.format(attempts=attempts, known={*KNOWN, *sandbox.variables}))
    if found != "[] []":
        raise UserError(
            f"a test program was not held: {found}",
            where=f"the sandbox for Python ({sandbox.wall})",
            fix="do not run a model's code here, and report this with the version of the kernel (uname -a)",
        )


def _run(sandbox: Starter, code: str) -> str:
    """Run code in a program of its own, outside any event loop. Return what it has printed and why it ended."""
    program = sandbox.program(Limits(seconds=30))
    try:
        with ThreadPoolExecutor(1) as threads:  # this thread may run an event loop
            outcome = threads.submit(asyncio.run, program.run(code)).result()
    finally:
        program.close()
    return f"{outcome.output.strip()}{f' ({outcome.ended})' if outcome.ended else ''}"
