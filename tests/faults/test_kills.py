"""Kills at random moments: the same command goes on, and in the end weights, optimizer and metrics are those of a run without kills.

`make faults` kills fine-tuning 50 times, and PPO and reward models 50 times; `make soak` 1,000 times in all, and keeps a log of them.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest
import rl_runs
import sft_runs
from faults.checkpoints import hashes
from faults.table import SAID, TRIED
from places import ROOT, TESTS
from runs import metrics_of, timeless

from verl.demo.problems import make_problems

KILLS, SEED = int(os.environ.get("KILLS", "25")), int(os.environ.get("KILL_SEED", "1"))
STEPS = 5
SAVES = {"trainer__total_training_steps": STEPS, "trainer__save_freq": 1, "trainer__max_ckpt_to_keep": 2}


def words_of(trainer: str, folder: Path) -> list[str]:
    if trainer == "ppo_trainer":
        changes = {**SAVES, "algorithm__name": "ppo", "algorithm__kl_target": 0.05, "algorithm__kl_coef": 0.1}
        return rl_runs.words(folder, "whole", **changes)
    words = sft_runs.words(folder, "whole", **SAVES)
    if trainer == "reward_trainer":
        return [word.replace("/train.jsonl", "/pairs.jsonl") for word in words if not word.startswith("data.train_batch_size")]
    return [*words, "trainer.async_save=true"] if trainer == "async" else words


@pytest.mark.faults
@pytest.mark.timeout(0)
@pytest.mark.parametrize("trainer", ["ppo_trainer", "async", "fsdp_sft_trainer", "reward_trainer"])
def test_kills_at_random_moments_change_nothing(trainer: str, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    folder = rl_runs.write_folder(tmp_path)
    problems = [problem.row() for problem in make_problems(40, 1, seed=1)[0]]
    pairs = [{"prompt": row["question"], "chosen": row["answer"], "rejected": "No."} for row in problems]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    words = [word for word in words_of(trainer, folder) if not word.startswith("trainer.default_local_dir")]
    module = f"verl.trainer.{'fsdp_sft_trainer' if trainer == 'async' else trainer}"
    command = [sys.executable, str(Path(__file__).with_name("killed.py")), module, str(KILLS), str(SEED), str(folder), *words]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, TESTS))), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as killer:
        assert killer.stdin is not None and killer.stdout is not None
        survived = runs = 0
        for line in killer.stdout:
            path, _, kills = line.rpartition(" ")
            files = assert_same(Path(path), folder / "whole")
            survived, runs = survived + int(kills), runs + 1
            said = f"{trainer}: {survived} of {KILLS} kills survived by {runs} runs; {runs} bit-equal at their end, 0 left-overs"
            log(f"{said} (the last: {kills.strip()} kills, {files} files and {STEPS} lines of metrics compared)")
            print("same", file=killer.stdin, flush=True)
    assert killer.returncode == 0 and survived >= KILLS
    record_property(TRIED, survived)
    record_property(SAID, said)


def log(line: str) -> None:
    """Add a line to the file that KILLS_LOG names, if it names one."""
    if path := os.environ.get("KILLS_LOG"):
        with Path(path).open("a") as file:
            file.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} {line}\n")


def assert_same(found: Path, whole: Path) -> int:
    """Weights, optimizer and metrics of a run are those of another, and nothing else is there. Return how many files were compared."""
    assert timeless(metrics_of(found)) == timeless(metrics_of(whole))
    equal = hashes(whole / f"global_step_{STEPS}")
    assert hashes(found / f"global_step_{STEPS}") == equal
    assert names(found) == names(whole)
    return len(equal)


def names(run: Path) -> list[str]:
    """Return the names of a run's files, without the lines of a run that ended before its first checkpoint, which are set aside."""
    found = (str(path.relative_to(run)) for path in run.rglob("*"))
    return sorted(name for name in found if re.fullmatch(r"metrics-\d+\.jsonl", name) is None)
