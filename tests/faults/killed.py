"""Runs a trainer again and again and kills it at random moments, until so many kills have been survived.

    python killed.py TRAINER KILLS SEED FOLDER WHOLE key=value …

Processes are forked from this one, which has imported everything, so that a kill comes seconds earlier than in a new interpreter. Prints
a line for each run that reached its end after at least one kill: its directory, and the number of kills.
"""

import importlib
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path


def start(module: str, words: list[str], log: Path) -> int:
    """Fork a process that runs a trainer, and return its number."""
    process = os.fork()
    if process:
        return process
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    from verl.errors import exit_on_user_error

    try:
        exit_on_user_error(importlib.import_module(module).main, words)
    except SystemExit as ended:
        os._exit(ended.code if isinstance(ended.code, int) else 1)
    finally:
        os._exit(1)


def ended(process: int, seconds: float) -> int | None:
    """Wait for a process. Return its exit code, or None if it still runs after this time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


def run_through(module: str, words: list[str], log: Path) -> float:
    """Run a trainer to its end, and return the seconds that it took."""
    since = time.monotonic()
    code = ended(start(module, words, log), 600)
    assert code == 0, f"exit code {code}: {log.read_text()[-3000:]}"
    return time.monotonic() - since


def main(module: str, kills: int, seed: int, folder: Path, words: list[str]) -> None:
    importlib.import_module(module)
    log, draw, survived = folder / "killed.log", random.Random(seed), 0
    seconds = run_through(module, [*words, f"trainer.default_local_dir={folder / 'whole'}"], log)
    number = 0
    while survived < kills:
        number, of_run = number + 1, 0
        output = folder / f"killed-{number}"
        here = [*words, f"trainer.default_local_dir={output}"]
        while survived + of_run < kills:
            since, process = time.monotonic(), start(module, here, log)
            code = ended(process, draw.uniform(0, 1.2 * seconds))
            if code is not None:
                assert code == 0, f"exit code {code}: {log.read_text()[-3000:]}"
                if of_run == 0:
                    seconds = time.monotonic() - since  # the machine may be less busy than before
                break
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            of_run += 1
        run_through(module, here, log)
        survived += of_run
        print(f"{output} {of_run}", flush=True)
        if (verify := sys.stdin.readline().strip()) != "same":
            raise SystemExit(verify or "the test has ended")
        shutil.rmtree(output)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), sys.argv[5:])
