"""The inside of a program: it runs pieces of code one after the other, with the same variables, as a notebook does."""

import ast
import contextlib
import linecache
import os
import random
import resource
import sys
import traceback
from typing import Any, NoReturn

from verl.sandbox import kernel, seccomp
from verl.sandbox.limits import Limits
from verl.sandbox.walls import Wall

OUTPUT, ERRORS, CODE, DONE = 1, 2, 3, 4  # file descriptors
LENGTH_BYTES = 4  # of a piece of code, before it
MOST_OPEN_FILES = 64


def run(wall: Wall, limits: Limits, folder: str | None, descriptors: tuple[int, int, int], seed: int) -> NoReturn:
    """Enclose this process, which the fork server has just forked, and run the pieces of code that come.

    Args:
        folder: see `Wall.make_folder`.
        descriptors: where its output goes, where the code comes from, and where it tells that a piece is done.
        seed: of Python's random numbers.
    """
    try:
        server = os.getppid()
        os.setsid()
        _keep_only(descriptors)
        kernel.end_with(server)
        home = wall.enclose(folder, limits.folder_bytes, limits.files)
        os.chdir(home)
        os.environ.update({"HOME": home, "TMPDIR": home})
        sys.path[0] = home  # so that it finds the modules that it writes
        _limit(limits)
        kernel.give_up_rights()
        seccomp.restrict(os.getpid())
    except BaseException as error:
        os.write(DONE, f"{type(error).__name__}: {error}".encode())
        os._exit(1)
    os.write(DONE, b".")
    random.seed(seed)
    _serve()


def _keep_only(descriptors: tuple[int, int, int]) -> None:
    """Close all file descriptors but these, which get the numbers above."""
    output, code, done = (os.dup(one) for one in descriptors)  # numbers above all that are given
    high = [os.dup(one) for one in (output, code, done)]
    while min(high) <= DONE:
        high = [os.dup(one) for one in high]
    for number, one in zip((OUTPUT, ERRORS, CODE, DONE), (high[0], high[0], *high[1:]), strict=True):
        os.dup2(one, number, inheritable=False)
    os.closerange(DONE + 1, os.sysconf("SC_OPEN_MAX"))
    stream = open(OUTPUT, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)  # noqa: SIM115
    sys.stdout = sys.stderr = sys.__stdout__ = sys.__stderr__ = stream  # type: ignore[misc]


def _limit(limits: Limits) -> None:
    for kind, most in (
        (resource.RLIMIT_AS, limits.memory_bytes),
        (resource.RLIMIT_FSIZE, limits.folder_bytes),
        (resource.RLIMIT_NOFILE, MOST_OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
    ):
        _, hardest = resource.getrlimit(kind)
        most = most if hardest == resource.RLIM_INFINITY else min(most, hardest)
        resource.setrlimit(kind, (most, most))


def _serve() -> NoReturn:
    for name in [name for name in sys.modules if name == "verl" or name.startswith("verl.")]:
        del sys.modules[name]
    variables: dict[str, Any] = {"__name__": "__main__", "__builtins__": __builtins__}
    number = 0
    while True:
        number += 1
        length = int.from_bytes(_received(LENGTH_BYTES), "big")
        code = _received(length).decode()
        with contextlib.suppress(BaseException):  # an error while an error is told
            run_piece(code, f"<code {number}>", variables)
        for stream in (sys.stdout, sys.__stdout__):
            with contextlib.suppress(BaseException):
                stream.flush()  # type: ignore[union-attr]
        os.write(DONE, b".")


def run_piece(code: str, name: str, variables: dict[str, Any]) -> None:
    """Run a piece of code. The value of its last line is printed if it is an expression, and an error as a traceback.

    Args:
        name: of the code, in tracebacks.
        variables: those that the code sees and changes.
    """
    linecache.cache[name] = len(code), None, code.splitlines(keepends=True), name
    try:
        tree = ast.parse(code, name)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, name, "exec"), variables)  # noqa: S102 - that is what it is for
        if isinstance(last, ast.Expr):
            sys.displayhook(eval(compile(ast.Expression(last.value), name, "eval"), variables))  # noqa: S307
    except SystemExit as error:
        if error.code not in (None, 0):
            print(f"exit: {error.code}")
    except BaseException as error:
        error.__traceback__ = error.__traceback__.tb_next if error.__traceback__ else None  # without the line above
        print("".join(traceback.format_exception(error)).rstrip())


def _received(length: int) -> bytes:
    data = b""
    while len(data) < length:
        piece = os.read(CODE, length - len(data))
        if not piece:
            os._exit(0)
        data += piece
    return data
