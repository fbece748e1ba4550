"""Commands with wrong inputs, in this process: what they print, and their exit code."""

import io
import re
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from verl.errors import exit_on_user_error

SECONDS = 5.0  # within which a wrong input is answered, on an idle machine
PATIENCE = 12.0  # the same where several tests share the cores


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str
    seconds: float


def run_command(main: Callable[[list[str]], object], words: Sequence[object]) -> Ended:
    """Run the main function of a command as the command line does."""
    out, err, since = io.StringIO(), io.StringIO(), time.monotonic()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            exit_on_user_error(main, [str(word) for word in words])
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
    return Ended(code, out.getvalue(), err.getvalue(), time.monotonic() - since)


def assert_refused(ended: Ended, pattern: str, code: int = 2) -> None:
    """One error that names the place, what was found and what to do; nothing is trained."""
    text = ended.out[-500:] + ended.err
    assert ended.code == code, text
    assert ended.err.startswith("error: ") and ended.err.count("error: ") == 1, ended.err
    assert "\n  fix: " in ended.err and "Traceback" not in ended.err, ended.err
    assert re.search(pattern, ended.err), ended.err
    assert ended.seconds < PATIENCE
    assert "step 1" not in ended.out


def is_empty_run(directory: Path) -> bool:
    """Return whether a run that was refused has left no checkpoint and no metrics. The directory is removed for the next one."""
    left = [*directory.glob("global_step_*"), *directory.glob("metrics.jsonl")]
    shutil.rmtree(directory, ignore_errors=True)
    return not left
