"""Kills at random moments: the same command goes on, and in the end weights, optimizer and metrics are those of a run without kills.

`make faults` kills fine-tuning 50 times, and PPO and reward models 50 times; `make soak` 1,000 times in all.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import rl_runs
import sft_runs
from faults.checkpoints import hashes
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
@pytest.mark.parametrize("trainer", ["fsdp_sft_trainer", "async", "ppo_trainer", "reward_trainer"])
def test_kills_at_random_moments_change_nothing(trainer: str, tmp_path: Path) -> None:
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
        survived = 0
        for line in killer.stdout:
            path, _, kills = line.rpartition(" ")
            survived += int(kills)
            assert_same(Path(path), folder / "whole")
            print("same", file=killer.stdin, flush=True)
    assert killer.returncode == 0 and survived >= KILLS


def assert_same(found: Path, whole: Path) -> None:
    assert timeless(metrics_of(found)) == timeless(metrics_of(whole))
    assert hashes(found / f"global_step_{STEPS}") == hashes(whole / f"global_step_{STEPS}")
    assert not list(found.glob("*.tmp"))
