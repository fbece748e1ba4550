"""On several processes reinforcement learning is what it is on one, however the weights lie and wherever answers are drawn."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT
from rl_runs import lines_of, metrics_of, words, write_folder

STEPS = 3
SPLIT: dict[str, object] = {f"mapping__{role}": "[0]" for role in ("actor", "critic", "reference", "reward")} | {"mapping__rollout": "[1]"}
# A critic, several updates of a step and whitening over all ranks, so that every sum over ranks has a part.
PPO: dict[str, object] = {"algorithm__name": "ppo", "algorithm__updates_per_step": 2, "algorithm__kl_coef": 0.05}
LORA: dict[str, object] = {"model__lora_rank": 4, "optim__lr": 1e-2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("ranks"))


def run(processes: int, folder: Path, output: str, **changes: object) -> Path:
    argv = words(folder, output, trainer__total_training_steps=STEPS, trainer__save_freq="never", **changes)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "-m", "verl.trainer.ppo_trainer", *argv], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / output


def answers(run: Path) -> list[list[tuple[int, str]]]:
    """Prompts and answers of each step."""
    steps = [lines_of(run / "rollouts" / f"step_{step + 1}.jsonl") for step in range(STEPS)]
    return [[(line["number"], line["response"]) for line in step] for step in steps]


COMPARED = ("train/loss", "train/grad_norm", "rl/reward", "rl/reward_std", "rl/entropy", "rl/kl_k3", "rl/response_tokens")
OF_CRITIC = ("critic/loss", "critic/grad_norm", "rl/explained_variance")


def same(found: Path, expected: Path, *, has_critic: bool = False) -> None:
    assert answers(found) == answers(expected)
    for here, there in zip(metrics_of(found), metrics_of(expected), strict=True):
        for name in (*COMPARED, *(OF_CRITIC if has_critic else ())):
            assert here[name] == pytest.approx(there[name], rel=1e-4, abs=1e-5), name


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    return run(1, folder, "alone", **PPO)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_draw_the_same_answers_and_learn_the_same(folder: Path, alone: Path, strategy: str) -> None:
    same(run(2, folder, strategy, model__strategy=strategy, **PPO), alone, has_critic=True)


def test_a_rollout_on_a_process_of_its_own_draws_the_same_answers(folder: Path, alone: Path) -> None:
    found = run(2, folder, "split", **SPLIT, **PPO)
    same(found, alone, has_critic=True)
    assert all(line["rl/rollout_difference"] < 1e-5 for line in metrics_of(found))  # its weights are those of now
    assert "reward on rank 0; rollout on rank 1" in (found / "train.log").read_text()


def test_an_adapter_reaches_a_rollout_on_a_process_of_its_own(folder: Path) -> None:
    found, expected = run(2, folder, "split_lora", **SPLIT, **LORA), run(1, folder, "lora", **LORA)
    same(found, expected)
    lines = metrics_of(found)
    assert all(line["rl/rollout_difference"] < 1e-5 for line in lines)
    assert lines[-1]["rl/kl_k3"] > 1e-3  # and they are far from those that it began with
