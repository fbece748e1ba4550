"""Python in a sandbox: the model runs programs, reads what they print, and answers when it is ready.

It calls the tool `python` with code. If its chat template has no tools (`environment.tool_calls=false`), it ends its turn with a block of
code between ```python and ```. The pieces of code of an episode run in one program, so that variables and files are kept from turn to
turn, as in a notebook. A program has one thread, may read Python's libraries and nothing else of the system, and writes in a folder of its
own, see `verl.sandbox`. One that exceeds a limit is ended, and its variables are lost, which the model is told.

It gives no rewards of its own: `reward.name` grades the answer. The metrics `episode/programs` and `episode/programs_ended` count
pieces of code that were run in an episode and those that ended their program.
"""

import re
from dataclasses import dataclass, field
from typing import Any

from verl.environments import Message, Start, Step
from verl.environments._calls import calls_in, schema
from verl.errors import UserError, at_least
from verl.sandbox import sandbox
from verl.sandbox.limits import Limits

BLOCK = re.compile(r"```(?:python|py)[ \t]*\n(.*?)\n?```\s*\Z", re.DOTALL)
MEANING = "the code; the value of its last line is printed, and variables are there in the next call"
TOOL = schema("python", "Run Python code and read what it prints.", "code", MEANING)
MIB = 2**20


@dataclass
class Settings:
    # python, search: whether the model calls a tool in the format of its chat template; false: it writes the code or the search as text.
    tool_calls: bool = True
    # python: limit of wall time for a piece of code, in seconds; below environment.step_seconds.
    code_seconds: float = 10.0
    # python: limit of processor time for a piece of code, in seconds.
    cpu_seconds: float = 10.0
    # python: memory of a program, with Python itself, in MiB.
    memory_mib: int = 512
    # python: what a program may keep in its folder, in MiB.
    folder_mib: int = 64
    # python: what a piece of code may print, in bytes. A program that prints more is ended.
    output_bytes: int = 8192
    # python: modules that programs need not wait for, because they are imported before, such as [numpy]. Programs may import others.
    modules: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Raises UserError naming the key."""
        at_least("code_seconds", self.code_seconds, 0.01)
        at_least("cpu_seconds", self.cpu_seconds, 0.01)
        at_least("memory_mib", self.memory_mib, 128)
        at_least("folder_mib", self.folder_mib, 1)
        at_least("output_bytes", self.output_bytes, 1)
        for name in self.modules:
            if not all(part.isidentifier() for part in name.split(".")):
                raise UserError(f"{name!r} is no name of a module", where="modules", fix="give names such as [numpy, sympy]")


def check_installed() -> None:
    """Raises UserError: this system can hold no programs."""
    sandbox.shared()


def prepare(settings: Settings) -> None:
    """Start what starts programs. Raises UserError: a module cannot be imported."""
    sandbox.shared(tuple(settings.modules))


class Environment:
    """See `verl.environments`."""

    def __init__(self, settings: Settings):
        self._modules, self._tools = tuple(settings.modules), [TOOL] if settings.tool_calls else []
        self._program: sandbox.Program | None = None
        self._seed = 0
        self._runs = {"programs": 0.0, "programs_ended": 0.0}
        self._limits = Limits(
            seconds=settings.code_seconds,
            cpu_seconds=settings.cpu_seconds,
            memory_bytes=settings.memory_mib * MIB,
            folder_bytes=settings.folder_mib * MIB,
            output_bytes=settings.output_bytes,
        )

    def reset(self, row: dict[str, Any], seed: int) -> Start:
        """Begin with the question of the row. The seed is that of the programs' random numbers."""
        self._seed = seed
        return Start(tools=self._tools)

    async def step(self, message: Message) -> Step:
        """Run the code of each call; the turn without one is the last."""
        calls = calls_in(message, "python", "code", _block)
        replies = [call.reply(call.error if call.text is None else await self._run(call.text)) for call in calls]
        return Step(replies, done=not calls, metrics=self._runs)

    def close(self) -> None:
        """End the program."""
        if self._program is not None:
            self._program.close()
            self._program = None

    async def _run(self, code: str) -> str:
        if self._program is None:
            self._program = sandbox.shared(self._modules).program(self._limits, self._seed)
        outcome = await self._program.run(code)
        self._runs = {"programs": self._runs["programs"] + 1, "programs_ended": self._runs["programs_ended"] + (outcome.ended is not None)}
        if outcome.ended is None:
            return outcome.output.rstrip("\n") or "(it printed nothing)"
        self.close()
        return f"{outcome.output}\n(the program {outcome.ended}; its variables are lost)".lstrip("\n")


def _block(text: str) -> str | None:
    found = BLOCK.search(text)
    return found[1] if found else None
