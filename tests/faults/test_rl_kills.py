"""Reinforcement learning that loses a rank, its rollout's or its trainer's, or its vLLM server, at random moments.

The run ends, says what is gone, and the same command goes on: in the end, weights, optimizer, metrics and names of files are those of a
run that lost nothing. `make faults` tries it 20 times.
"""

import os
import random
import signal
import socket
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import pytest
import rl_runs
from faults.started import Started, orphans, processes, started
from faults.table import SAID, TRIED
from faults.test_kills import assert_same, log
from places import FORKS, HAS_GPU, free_port
from runs import wait_for
from served import serve_stand_in

from verl.errors import EXIT_CODE, RANK_EXIT_CODE
from verl.rollout._http import SHARED_MEMORY

SEED = int(os.environ.get("KILL_SEED", "1"))
STEPS = 5
TIMEOUT = 20 if HAS_GPU else 6
Command = Callable[[Path], AbstractContextManager[Started]]  # starts a run into a directory
Record = Callable[[str, object], None]


def words(folder: Path, output: Path, **changes: object) -> list[str]:
    keys = {
        "trainer__total_training_steps": STEPS,
        "trainer__save_freq": 1,
        "trainer__max_ckpt_to_keep": 2,
        "dist__timeout_seconds": TIMEOUT,
    }
    return rl_runs.words(folder, "x", **{**keys, **changes, "trainer__default_local_dir": output})


def survive(
    run: Command, lose: Callable[[Started], str], folder: Path, losses: int, draw: random.Random, *, code: int, back: Callable[[], None]
) -> int:
    """Start runs until so many losses have been survived, and compare each with one that has lost nothing. Return their number.

    Args:
        lose: takes something from a run, and returns what its error must say.
        code: the exit code of a run that has lost it.
        back: brings it back.
    """
    whole, survived, runs = folder / "whole", 0, 0
    seconds = to_the_end(run, whole)
    while survived < losses:
        runs, of_run = runs + 1, 0
        here = folder / f"run-{runs}"
        while survived + of_run < losses:
            since = time.monotonic()
            with run(here) as found:
                moment = since + draw.uniform(0.0, 1.1 * seconds)
                while found.process.poll() is None and time.monotonic() < moment:
                    time.sleep(0.01)
                is_done = found.process.poll() is not None
                said = "" if is_done else lose(found)
                ended, text = found.end(TIMEOUT + 60)
                assert orphans(found) == []
            back()
            log(f"{here.name}: exit code {ended} after {time.monotonic() - since:.1f} s; {said}")
            if ended == 0:  # nothing was lost, or it was not needed any more
                seconds = time.monotonic() - since if of_run == 0 else seconds  # the machine may be less busy than before
                break
            of_run += 1
            assert not is_done and ended == code and said in text and "Traceback" not in text, (
                f"exit code {ended}, expected {said!r}\n{text}"
            )
        to_the_end(run, here)
        assert_same(here, whole)
        survived += of_run
    return runs


def to_the_end(run: Command, output: Path) -> float:
    """Return the seconds that a run takes which loses nothing."""
    since = time.monotonic()
    with run(output) as found:
        code, text = found.end(300)
    assert code == 0, text
    return time.monotonic() - since


def ranks_of(found: Started) -> dict[int, int]:
    """The numbers of the launcher's processes, by rank, without those that the ranks have started."""
    ranks = {}
    for process in processes(found.mark):
        with suppress(OSError):
            parent = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
            variables = dict(pair.partition("=")[::2] for pair in Path(f"/proc/{process}/environ").read_text().split("\0"))
            if parent == found.process.pid and "RANK" in variables:
                ranks[int(variables["RANK"])] = process
    return ranks


# Ranks


@pytest.mark.faults
@pytest.mark.timeout(0)
@pytest.mark.parametrize(("training", "rollout"), [([0], [1]), ([0, 1], [2])], ids=["two", "three"])
def test_a_rank_that_is_killed_at_random_moments_changes_nothing(
    training: list[int], rollout: list[int], tmp_path: Path, record_property: Record
) -> None:
    """Of those that train and those that generate, by turns."""
    folder, losses, draw = rl_runs.write_folder(tmp_path), 7, random.Random(SEED)
    number = len(training) + len(rollout)
    mapping = {f"mapping__{role}": str(training).replace(" ", "") for role in ("actor", "critic", "reference", "reward")}
    mapping["mapping__rollout"] = str(rollout)
    killed: list[int] = []

    def run(output: Path) -> AbstractContextManager[Started]:
        argv = words(folder, output, **mapping)
        return started(["-m", "verl", "ppo", "--gpus", str(number), *argv], folder / "work", forks=True)

    def kill(found: Started) -> str:
        wait_for(lambda: len(ranks_of(found)) == number or found.process.poll() is not None)
        rank = draw.choice([training, rollout][len(killed) % 2])
        with suppress(ProcessLookupError, KeyError):  # the run has just ended
            os.kill(ranks_of(found)[rank], signal.SIGKILL)
            killed.append(rank)
        return f"error: rank {rank} "

    runs = survive(run, kill, folder, losses, draw, code=RANK_EXIT_CODE, back=lambda: None)
    record_property(TRIED, losses)
    record_property(SAID, f"RL on {number} ranks, one generates: {losses} of {losses} killed ranks survived by {runs} runs, bit-equal")


# A server


@pytest.mark.faults
@pytest.mark.timeout(0)
def test_a_server_that_is_killed_at_random_moments_is_named_and_changes_nothing(tmp_path: Path, record_property: Record) -> None:
    """A new server, with the weights of the start, gets those of the checkpoint."""
    folder, losses, draw, port = rl_runs.write_folder(tmp_path), 6, random.Random(SEED), free_port()
    url, servers = f"http://127.0.0.1:{port}", list[Any]()

    def serve() -> None:
        if not servers or not servers[-1].is_alive():
            servers.append(FORKS.Process(target=serve_stand_in, args=(folder / "model", port), daemon=True))
            servers[-1].start()
            wait_for(lambda: is_open(port))

    def run(output: Path) -> AbstractContextManager[Started]:
        serve()
        argv = words(folder, output, rollout__name="vllm", rollout__url=url)
        return started(["-m", "verl.trainer.ppo_trainer", *argv], folder / "work", forks=True)

    def kill(found: Started) -> str:
        servers[-1].kill()
        servers[-1].join()
        return f"error: {url}"

    try:
        runs = survive(run, kill, folder, losses, draw, code=EXIT_CODE, back=serve)
    finally:
        servers[-1].kill()
    assert not list(SHARED_MEMORY.glob("verl-weights-*"))
    record_property(TRIED, losses)
    record_property(SAID, f"RL with a vLLM server: {losses} of {losses} killed servers survived by {runs} runs, bit-equal")


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
