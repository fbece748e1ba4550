"""Programs in the sandbox: what they keep between pieces of code, how they end, how fast they start, and systems that cannot hold them."""

import asyncio
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from places import ROOT
from runs import wait_for

from verl.errors import UserError
from verl.sandbox import probe, seccomp
from verl.sandbox.limits import Limits
from verl.sandbox.sandbox import Outcome, Sandbox, shared

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")


@pytest.fixture(scope="module", params=["mounts", "landlock"])
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    try:
        made = Sandbox(wall=request.param)
    except UserError as error:
        if not error.what.startswith("this system can hold no programs"):
            raise
        pytest.skip(str(error))
    yield made
    made.close()


def ran(sandbox: Sandbox, *pieces: str, seed: int = 0, **limits: Any) -> list[Outcome]:
    """Run pieces of code, one after the other, in one program."""

    async def run() -> list[Outcome]:
        program = sandbox.program(Limits(**limits), seed)
        outcomes = [await program.run(piece) for piece in pieces]
        program.close()
        return outcomes

    return asyncio.run(run())


def test_variables_and_files_are_kept_from_piece_to_piece(sandbox: Sandbox) -> None:
    outcomes = ran(
        sandbox, "x = 20\nopen('notes', 'w').write('kept')", "def double(): return 2 * x", "print(open('notes').read())\ndouble() + 2"
    )
    assert outcomes == [Outcome("4\n"), Outcome(""), Outcome("kept\n42\n")]


def test_an_error_is_a_traceback_of_the_programs_own_lines_and_the_program_goes_on(sandbox: Sandbox) -> None:
    failed, syntax, after = ran(sandbox, "y = 1\ndef f():\n    return y / 0\nf()", "1 +", "y")
    assert failed.output == (
        'Traceback (most recent call last):\n  File "<code 1>", line 4, in <module>\n    f()\n'
        '  File "<code 1>", line 3, in f\n    return y / 0\n'
        + ("           ~~^~~\n" if sys.version_info >= (3, 11) else "")
        + "ZeroDivisionError: division by zero\n"
    )
    assert "SyntaxError" in syntax.output and after == Outcome("1\n")


@pytest.mark.parametrize(
    ("code", "limits", "output", "ended"),
    [
        ("print('before')\nwhile True: pass", {"seconds": 0.3}, "before\n", "ran longer than 0.3 s"),
        ("print('before')\nwhile True: pass", {"cpu_seconds": 0.1}, "before\n", "used more than 0.1 s of processor time"),
        ("print('x' * 10000)", {"output_bytes": 5}, "xxxxx", "printed more than 5 bytes"),
        ("import os; os._exit(3)", {}, "", "ended its process with exit code 3"),
        ("import ctypes; ctypes.string_at(0)", {}, "", "crashed (SIGSEGV)"),
    ],
)
def test_a_program_that_is_ended_says_why_and_what_it_printed_before(
    code: str, limits: dict[str, Any], output: str, ended: str, sandbox: Sandbox
) -> None:
    assert ran(sandbox, code, **limits) == [Outcome(output, ended)]


def test_limits_of_time_are_those_of_one_piece(sandbox: Sandbox) -> None:
    assert ran(sandbox, *3 * ["import time; time.sleep(0.2)"], seconds=0.4) == 3 * [Outcome("")]


def test_memory_that_is_refused_is_an_error_that_the_program_can_handle(sandbox: Sandbox) -> None:
    assert ran(sandbox, "try: x = bytearray(10**9)\nexcept MemoryError: print('too much')", memory_bytes=2**28) == [Outcome("too much\n")]


def test_random_numbers_depend_on_the_seed_alone(sandbox: Sandbox) -> None:
    code = "import random; print(random.random(), hash('text'))"
    first, again, other = (ran(sandbox, code, seed=seed) for seed in (7, 7, 8))
    assert first == again != other


def test_libraries_and_asyncio_work_in_one_thread(sandbox: Sandbox) -> None:
    code = "import asyncio, numpy as np\nasync def f(): return await asyncio.sleep(0.01, int(np.ones((9, 99)).sum()))\nasyncio.run(f())"
    assert ran(sandbox, code) == [Outcome("891\n")]


def test_what_a_program_replaces_in_its_python_harms_only_itself(sandbox: Sandbox) -> None:
    code = "import sys, os, builtins\nsys.stdout = None\nos.write = None\nbuiltins.print = None\nsys.modules.clear()"
    (outcome,) = ran(sandbox, code, seconds=1.0)
    assert outcome.ended
    assert ran(sandbox, "1") == [Outcome("1\n")]


def test_modules_are_there_when_a_program_begins() -> None:
    made = Sandbox(modules=("json",))
    assert ran(made, "import sys; 'json' in sys.modules") == [Outcome("True\n")]
    made.close()
    with pytest.raises(UserError, match="No module named 'no_such_module'"):
        Sandbox(modules=("no_such_module",))


def test_a_program_starts_in_well_under_a_tenth_of_a_second(sandbox: Sandbox) -> None:
    def seconds() -> float:
        began = time.perf_counter()
        assert ran(sandbox, "1") == [Outcome("1\n")]
        return time.perf_counter() - began

    assert statistics.median(seconds() for _ in range(9)) < 0.1


def test_256_programs_run_side_by_side_and_those_that_hang_are_ended(sandbox: Sandbox) -> None:
    """A tenth of them hangs, a twentieth ends its own process."""

    async def one(number: int) -> Outcome:
        program = sandbox.program(Limits(seconds=5.0 if number % 10 else 1.0, cpu_seconds=60))
        code = "import time; time.sleep(99)" if number % 10 == 0 else "import os; os._exit(1)" if number % 20 == 1 else f"print({number})"
        first = await program.run(code)
        outcome = first if first.ended else await program.run(f"{number} + 1")
        program.close()
        return outcome

    async def run() -> list[Outcome]:
        return list(await asyncio.gather(*[one(number) for number in range(256)]))

    began = time.monotonic()
    outcomes = asyncio.run(run())
    assert time.monotonic() - began < 11
    assert sum(outcome.ended == "ran longer than 1 s" for outcome in outcomes) == 26
    assert sum(outcome.ended == "ended its process with exit code 1" for outcome in outcomes) == 13
    assert all(outcome.output == f"{number + 1}\n" for number, outcome in enumerate(outcomes) if outcome.ended is None)


START = """
import asyncio, os, sys, time
from verl.sandbox.sandbox import Sandbox
from verl.sandbox.limits import Limits

async def main():
    program = Sandbox(wall={wall!r}).program(Limits(seconds=600, cpu_seconds=600))
    print(os.getpid(), flush=True)
    await program.run("while True: pass")
asyncio.run(main())
"""


def test_no_program_outlives_a_trainer_that_is_killed(sandbox: Sandbox) -> None:
    wall = sandbox.wall
    trainer = subprocess.Popen(
        [sys.executable, "-c", START.format(wall=wall)], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert trainer.stdout is not None and trainer.stdout.readline()
    wait_for(lambda: len(_descendants(trainer.pid)) == (3 if wall == "mounts" else 2), 20)
    processes = _descendants(trainer.pid)
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()
    wait_for(lambda: not any(_is_running(process) for process in processes), 5)


def _descendants(parent: int) -> list[int]:
    children = [int(number) for path in Path(f"/proc/{parent}/task").glob("*/children") for number in path.read_text().split()]
    return [*children, *[found for child in children for found in _descendants(child)]]


def _is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_server_that_is_killed_ends_its_programs_and_the_next_one_has_a_new_server() -> None:
    async def run() -> Outcome:
        program = shared().program(Limits())
        await program.run("1")
        shared_before = shared()
        os.kill(shared_before._server.pid, signal.SIGKILL)
        shared_before._server.wait()
        try:
            return await program.run("2")
        finally:
            program.close()

    assert "process" in str(asyncio.run(run()).ended)
    assert ran(shared(), "3") == [Outcome("3\n")]


AS_NOBODY = """
import asyncio, os
from verl.sandbox.sandbox import Sandbox
from verl.sandbox.limits import Limits

for wall in ("mounts", "landlock"):
    made = Sandbox(wall=wall)
    found = asyncio.run(made.program(Limits()).run("import os; print(os.getuid(), sum(range(10)))"))
    print(wall, os.getuid(), found.output.strip(), flush=True)
    made.close()
"""


@pytest.mark.skipif(sys.platform != "linux" or os.getuid() != 0, reason="only root can become another user")
def test_it_holds_programs_of_a_user_without_rights_too() -> None:
    pythons = [sys.executable, "/usr/bin/python3"]
    check = "import sys; assert sys.version_info >= (3, 10)"
    usable = [one for one in pythons if _as_nobody([one, "-c", check], cwd="/").returncode == 0]
    if not usable or not os.access(ROOT, os.R_OK | os.X_OK) or _as_nobody(["ls", str(ROOT)], cwd="/").returncode:
        pytest.skip("the other user can read no Python of 3.10 or newer, or not this checkout")
    done = _as_nobody([usable[0], "-c", AS_NOBODY], cwd="/")
    assert done.stdout.splitlines() == ["mounts 65534 65534 45", "landlock 65534 65534 45"], done.stderr


def _as_nobody(command: list[str], cwd: str) -> "subprocess.CompletedProcess[str]":
    variables = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        return subprocess.run(command, user=65534, group=65534, extra_groups=[], capture_output=True, text=True, env=variables, cwd=cwd)
    except PermissionError:
        return subprocess.CompletedProcess(command, 1)


# A filter of our own that takes from a process what it names, as a container does.
WITHOUT = """
import os, struct, ctypes, sys
from verl.errors import UserError
from verl.sandbox import kernel, seccomp
from verl.sandbox.sandbox import Sandbox

taken = {taken!r}
lines = [(0x20, 0, 0, 0), *[one for number in taken for one in ((0x15, 0, 1, number), (0x06, 0, 0, 0x50001))], (0x06, 0, 0, 0x7FFF0000)]
text = b"".join(struct.pack("=HBBI", *line) for line in lines)
buffer = ctypes.create_string_buffer(text, len(text))
kernel.call("prctl", kernel.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
kernel.call("prctl", 22, 2, struct.pack("@HP", len(lines), ctypes.addressof(buffer)), 0, 0)
try:
    made = Sandbox()
    print(made.wall)
    made.close()
except UserError as error:
    print(error)
"""
PRCTL, UNSHARE, LANDLOCK = 157, 272, 444


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="these are numbers of x86_64")
@pytest.mark.parametrize(
    ("taken", "said"),
    [
        ([UNSHARE], "landlock\n"),
        ([LANDLOCK], "mounts\n"),
        (
            [UNSHARE, LANDLOCK],
            "this system can hold no programs: it allows neither mounts: PermissionError: [Errno 1] unshare: Operation not permitted nor "
            "landlock: OSError: the kernel has no Landlock, or it is switched off\n  fix: allow user namespaces or Landlock (Linux 5.13 or",
        ),
        ([PRCTL], "could not be started: PermissionError: [Errno 1] prctl: Operation not permitted"),
    ],
)
def test_one_wall_is_enough_and_without_any_it_is_refused(taken: list[int], said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(taken=taken)], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert said in done.stdout, (done.stdout, done.stderr)


def test_a_sandbox_that_lets_the_probe_out_is_refused(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(probe.ATTEMPTS, "add numbers", "1 + 1")
    with pytest.raises(UserError, match=r"a test program was not held: \['add numbers'\]"):
        probe.check(sandbox)


def test_another_system_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(UserError, match="it needs Linux, found darwin"):
        Sandbox()
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(UserError, match="a processor of x86_64 or aarch64, found riscv64"):
        Sandbox()


HEADERS = {"x86_64": "/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "aarch64": "/usr/include/asm-generic/unistd.h"}


@pytest.mark.parametrize("machine", HEADERS)
def test_the_numbers_are_those_of_the_kernels_headers(machine: str) -> None:
    header = Path(HEADERS[machine])
    if not header.exists():
        pytest.skip("the kernel's headers are not installed")
    known = {name: int(number) for name, number in re.findall(r"#define __NR(?:3264)?_(\w+) (\d+)", header.read_text())}
    known.setdefault("newfstatat", known.get("fstatat", 0))
    for table in (seccomp.ALLOWED, seccomp.CONDITIONAL):
        ours = seccomp.numbers(table, machine)
        assert ours == {name: known[name] for name in ours}


@pytest.mark.parametrize("machine", HEADERS)
def test_the_filter_of_each_processor_refuses_all_that_is_not_on_the_list(machine: str) -> None:
    """The filter is run here, since this machine has one processor only."""
    ours = seccomp.numbers(seccomp.ALLOWED, machine)
    conditional = seccomp.numbers(seccomp.CONDITIONAL, machine)
    program = seccomp.instructions(machine, process=77)
    results = {number: _filtered(program, machine, number) for number in range(1000)}
    assert {number for number, result in results.items() if result == seccomp.ALLOW} == {*ours.values()}
    assert _filtered(program, machine, conditional["kill"], 77) == seccomp.ALLOW
    assert {_filtered(program, machine, conditional["kill"], other) for other in (0, 1, 78, 2**32 - 1)} == {seccomp.REFUSE}
    assert _filtered(program, machine, conditional["prlimit64"], 0, 7, 0, 1) == seccomp.ALLOW
    assert _filtered(program, machine, conditional["prlimit64"], 0, 7, 2**40, 1) == seccomp.REFUSE
    other = next(one for one in seccomp.ARCHITECTURES if one != machine)
    assert _filtered(program, other, ours["read"]) == seccomp.KILL


def _filtered(program: list[seccomp.Instruction], machine: str, number: int, *arguments: int) -> int:
    """Run a filter as the kernel would. Without arguments, all of them are -1."""
    values = {0: number, 4: seccomp.ARCHITECTURES[machine]}
    for index in range(6):
        value = arguments[index] if index < len(arguments) else 2**64 - 1
        values[16 + 8 * index], values[20 + 8 * index] = value % 2**32, value >> 32
    position, loaded = 0, 0
    while True:
        operation, if_true, if_false, operand = program[position]
        position += 1
        if operation == seccomp.RETURN:
            return operand
        if operation == seccomp.LOAD:
            loaded = values[operand]
        else:
            position += if_true if (loaded == operand if operation == seccomp.EQUAL else loaded >= operand) else if_false
